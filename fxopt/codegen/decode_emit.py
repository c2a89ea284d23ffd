"""``fxopt::cached_attention`` in a graph -> calls of its kernels, in place."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import fx

from fxopt.codegen.attention_emit import NAME, Emit
from fxopt.codegen.decode_attention import decode_kernel
from fxopt.codegen.decode_problem import Problem
from fxopt.codegen.kernel_file import KernelFile
from fxopt.codegen.price import least_seconds
from fxopt.ir.contract import Cost, Evidence, Status
from fxopt.ir.facts import argument, location, val
from fxopt.ir.linear import Unsupported
from fxopt.ir.program import MaskProgram, ScoreProgram
from fxopt.ir.same_value import same_value
from fxopt.ir.target import Target

Fastest = Callable[[KernelFile], KernelFile]
_TENSORS = ("query", "key", "value", "key_scale", "value_scale", "query_rest", "key_rest", "span", "sinks")


def itself(kernel: KernelFile) -> KernelFile:
    """The kernel as its tables have it."""
    return kernel


def emit_cached(
    graph: fx.Graph, target: Target | None, emit: Emit | None, fastest: Fastest = itself
) -> tuple[list[KernelFile], list[Evidence]]:
    """The kernels of the attentions over caches, and what was done.

    Args:
        emit: makes the op that is called instead. None: the graph stays as it is. fastest: a kernel or one of
            its alternatives.
    """
    found = graph.find_nodes(op="call_function", target=torch.ops.fxopt.cached_attention.default)
    calls = [(node, argument(node, "span")) for node in found]
    return emit_calls(calls, problem_of, decode_kernel, _replace, target, emit, fastest)


def emit_calls(
    calls: Sequence[tuple[fx.Node, fx.Node | None]],
    problem_of: Callable[[fx.Node], tuple[Any, Any]],
    kernel_of: Callable[[Any, Target | None], KernelFile],
    put: Callable[[fx.Node, Any, Any], None],
    target: Target | None,
    emit: Emit | None,
    fastest: Fastest,
) -> tuple[list[KernelFile], list[Evidence]]:
    """The kernels of calls of one op, and what was done.

    A call of which no kernel can be made stays: its op computes it, by torch.

    Args:
        calls: with what says where their keys begin and end. problem_of: what a call computes, and its
            inputs; it, and `kernel_of`, raise `Unsupported`. put: has a node call an op with these inputs.
        emit, fastest: as for `emit_cached`.
    """
    kernels, evidence = list[KernelFile](), list[Evidence]()
    made: dict[Any, KernelFile] = {}
    if emit is not None:
        _share_spans(calls)
    for node, _ in calls:
        try:
            problem, inputs = problem_of(node)
            kernel = kernel_of(problem, target)
        except Unsupported as refusal:
            evidence.append(Evidence(NAME, node.name, location(node), Status.ILLEGAL, str(refusal)))
            continue
        first = kernel.digest
        if first not in made:
            made[first] = fastest(kernel)
        kernel = made[first]
        kernels.append(kernel)
        evidence.append(_applied(node, kernel, target))
        if emit is not None:
            put(node, emit(kernel), inputs)
    return kernels, evidence


def _share_spans(readers: Iterable[tuple[fx.Node, fx.Node | None]]) -> None:
    """Layers under one mask read where its keys begin and end from one tensor, computed once."""
    spans: list[fx.Node] = []
    for node, span in readers:
        if span is None:
            continue
        first = next((one for one in spans if same_value(one, span)), span)
        if first is span:
            spans.append(span)
            continue
        node.replace_input_with(span, first)
        _erase_unread(span)
    for span in spans:
        if len(span.users) > 1:
            _have_in_memory(span)


def _have_in_memory(node: fx.Node) -> None:
    """Inductor makes a copy for each kernel that is called with a small tensor, but of one with strides."""
    value = val(node)
    with node.graph.inserting_after(node):
        given = (node, list(value.shape), list(value.stride()))
        placed = node.graph.call_function(torch.ops.aten.as_strided.default, given)
    placed.meta.update(node.meta)
    node.replace_all_uses_with(placed, delete_user_cb=lambda user: user is not placed)


def _erase_unread(node: fx.Node) -> None:
    """Erase an operator that nothing reads, and what was computed for it alone."""
    if node.op == "call_function" and not node.users:
        read = node.all_input_nodes
        node.graph.erase_node(node)
        for each in read:
            _erase_unread(each)


def problem_of(node: fx.Node) -> tuple[Problem, list[Any]]:
    """What a call of ``fxopt::cached_attention`` computes, and what its kernel takes."""
    given = {name: argument(node, name) for name in _TENSORS}
    nodes = {name: arg for name, arg in given.items() if arg is not None}
    captures, sizes = (list(argument(node, name) or ()) for name in ("captures", "sizes"))
    problem = Problem(
        tensors={name: val(arg) for name, arg in nodes.items()},
        captures=tuple(val(arg) for arg in captures),
        sizes=tuple(val(arg) if isinstance(arg, fx.Node) else arg for arg in sizes),
        scale=argument(node, "scale"),
        dead_rows=argument(node, "dead_rows"),
        mask=MaskProgram.parse(argument(node, "mask", "True")),
        score=ScoreProgram.parse(argument(node, "score", "")),
        shared=nodes["key"] is nodes["value"],
    )
    return problem, [*nodes.values(), *captures, *sizes]


def _replace(node: fx.Node, op: Any, inputs: list[Any]) -> None:
    with node.graph.inserting_before(node):
        call = node.graph.call_function(op, tuple(inputs))
    call.meta |= node.meta
    node.replace_all_uses_with(call)
    node.graph.erase_node(node)


def _applied(node: fx.Node, kernel: KernelFile, target: Target | None) -> Evidence:
    """What is said of an attention whose kernel is used."""
    moved, flops = kernel.about.seen
    least = ""
    if target is not None:
        seconds = least_seconds(kernel.about, target)
        least = f", not below {seconds * 1e6:.2f} us on {target.name} with a full cache"
    cost = Cost(moved, flops, len(kernel.launches))
    reason = f"an attention becomes the kernel {kernel.name}: {'; '.join(kernel.about.configuration)}{least}"
    return Evidence(NAME, node.name, location(node), Status.APPLIED, reason, after=cost)
