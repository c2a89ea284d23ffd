"""``fxopt::cached_append_attention`` in a graph -> calls of its kernels, in place.

AOTAutograd leaves an op that writes to its inputs as torch's ``auto_functionalized_v2`` of it, which returns
what is written, too; whoever compiles the graph decides whether that is done in place. So does the kernel's
op, in the place of the other.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import fx
from torch.utils import _pytree as pytree

from fxopt.codegen.append_attention import CACHES, AppendProblem, append_kernel
from fxopt.codegen.attention_emit import Emit
from fxopt.codegen.decode_emit import Fastest, emit_calls, itself
from fxopt.codegen.kernel_file import KernelFile
from fxopt.ir.contract import Evidence
from fxopt.ir.facts import val
from fxopt.ir.linear import Unsupported
from fxopt.ir.program import MaskProgram, ScoreProgram
from fxopt.ir.target import Target

# Those of the kernel, in order.
_TENSORS = ("query", "k_new", "v_new", "cos", "sin", *CACHES, "length", "span", "sinks")
# What ``auto_functionalized_v2`` says of an operand that is a view of a base.
_OF_VIEWS = ("size", "slice_dim", "alias")


def emit_appends(
    graph: fx.Graph, target: Target | None, emit: Emit | None, fastest: Fastest = itself
) -> tuple[list[KernelFile], list[Evidence]]:
    """The kernels of the attentions that append first, and what was done. As `emit_cached`."""
    functional = torch.ops.higher_order.auto_functionalized_v2
    own = torch.ops.fxopt.cached_append_attention.default
    found = [node for node in graph.find_nodes(op="call_function", target=functional) if node.args[0] is own]
    calls: list[tuple[fx.Node, Any]] = [(node, node.kwargs["span"]) for node in found]
    return emit_calls(calls, problem_of, append_kernel, _put, target, emit, fastest)


def _put(node: fx.Node, op: Any, inputs: dict[str, Any]) -> None:
    caches = (name for name in CACHES if node.kwargs[_base_index(name)] is not None)
    written = {name: node.kwargs[name] for name in ("_all_bases", *map(_base_index, caches))}
    node.args, node.kwargs = (op,), {**inputs, **written}


def _base_index(name: str) -> str:
    """What ``auto_functionalized_v2`` calls the place of a written operand among all of them."""
    return f"_{name}_base_index"


def problem_of(node: fx.Node) -> tuple[AppendProblem, dict[str, Any]]:
    """What a call computes, and what its kernel takes by name, but for the caches.

    Raises:
        Unsupported: a cache is a part of another tensor.
    """
    given: dict[str, Any] = dict(node.kwargs)
    bases = given["_all_bases"]
    for name in CACHES:
        place = given[_base_index(name)]
        if place is not None and any(f"_{name}_{what}" in given for what in _OF_VIEWS):
            raise Unsupported(f"the {name}s of a cache that is a part of another tensor")
        given[name] = None if place is None else bases[place]
    nodes = {name: given[name] for name in _TENSORS if given.get(name) is not None}
    captures, sizes = (list(given.get(name) or ()) for name in ("captures", "sizes"))
    problem = AppendProblem(
        tensors={name: val(arg) for name, arg in nodes.items()},
        captures=tuple(val(arg) for arg in captures),
        sizes=tuple(pytree.tree_map_only(fx.Node, val, sizes)),
        scale=given["scale"],
        dead_rows=given["dead_rows"],
        mask=MaskProgram.parse(given.get("mask", "True")),
        score=ScoreProgram.parse(given.get("score", "")),
        interleaved=given.get("interleaved", False),
    )
    inputs = {name: arg for name, arg in nodes.items() if name not in CACHES}
    inputs |= {one.name: arg for one, arg in zip(problem.captured, captures, strict=True)}
    return problem, inputs | dict(zip(problem.size_names, sizes, strict=True))
