"""``fxopt::block_attention`` and its backward in a graph -> calls of their kernels, in place."""

from __future__ import annotations

import math
import operator
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import fx
from torch.utils import _pytree as pytree

from fxopt.codegen.attention_backward import backward_kernel
from fxopt.codegen.attention_backward import with_other_tiles as other_backward_tiles
from fxopt.codegen.attention_descriptors import with_descriptors
from fxopt.codegen.attention_example import example_text
from fxopt.codegen.attention_kernel import forward_kernel
from fxopt.codegen.attention_kernel import with_other_tiles as other_forward_tiles
from fxopt.codegen.attention_learned import check_extents
from fxopt.codegen.attention_program import Capture
from fxopt.codegen.attention_spec import Spec, alignment, are_far
from fxopt.codegen.elementwise import TRITON_TYPES
from fxopt.codegen.kernel_file import About, KernelFile
from fxopt.codegen.price import multiplied
from fxopt.ir.contract import Cost, Evidence, Status, Verdict
from fxopt.ir.cost import hint
from fxopt.ir.facts import argument, is_floating, location, val
from fxopt.ir.formula import captures_of
from fxopt.ir.graph_facts import Facts
from fxopt.ir.linear import Unsupported
from fxopt.ir.ops.attention_providers import flash_has_it, reaches_grad
from fxopt.ir.ops.block_attention import block_arguments, kernel_arguments
from fxopt.ir.ops.masking import NONE, ZERO
from fxopt.ir.ops.tile_plan import live_scores
from fxopt.ir.program import MaskProgram, ScoreProgram
from fxopt.ir.propagate import fake_mode_of
from fxopt.ir.target import Target

NAME = "emit-attention"
DTYPES = (torch.float16, torch.bfloat16, torch.float32)
WIDEST = 256
LEAST_ARCH = 80  # with the matrix instructions that the tiles are made for

Emit = Callable[[KernelFile], Any]


def kernel_serves(node: fx.Node, facts: Facts, devices: frozenset[str]) -> Verdict:
    """Whether a kernel takes the place of a call of ``fxopt::attention``, with the condition that decides.

    Args:
        devices: types of devices for which kernels are made.
    """
    query, value = val(node.args[0]), val(node.args[2])
    if query.device.type not in devices:
        return Verdict.no("")
    if argument(node, "query_rest") is not None:
        return Verdict.no("kernels take Q and K in one part")
    if query.dtype not in DTYPES or max(query.shape[-1], value.shape[-1]) > WIDEST:
        return Verdict.no(f"kernels are for heads of up to {WIDEST} {', '.join(map(str, DTYPES))}")
    mask = argument(node, "attn_mask")
    if mask is None and (flash_has_it(node) or _only_dropped(node)):
        return Verdict.no("flash kernels have it")
    opaque = mask is not None and not argument(node, "mask")
    if opaque and is_floating(mask) and query.dtype is torch.float16 and argument(node, "dead_rows") != ZERO:
        return Verdict.no("a float16 mask is added in float32, where its lowest number absorbs no score")
    return _spec_serves(node, facts)


def _only_dropped(node: fx.Node) -> bool:
    """Scores that are scaled, and weights that are dropped: flash kernels of GPUs have that."""
    return not any(argument(node, name) for name in ("score", "wide_scores")) and (
        argument(node, "sinks") is None
    )


def _spec_serves(node: fx.Node, facts: Facts) -> Verdict:
    mode = fake_mode_of(node.graph)
    args, kwargs = pytree.tree_map_only(fx.Node, val, (tuple(node.args), dict(node.kwargs)))
    try:
        assert mode is not None
        with mode, torch.no_grad():
            given, attributes = kernel_arguments(*args, **kwargs)
            operands, attributes = block_arguments(*given, **attributes)
        spec = spec_of(operands, attributes)
        example = example_text(spec, ())
        forward_kernel(spec, None, example)
        if facts.differentiates(node):
            places = _learned_places(node, spec)
            check_extents(spec, places, operands[0], operands[1], operands[5])
            backward_kernel(spec, places, None, example)
    except Unsupported as refusal:
        return Verdict.no(f"no kernel has {refusal}")
    return Verdict.yes(f"mask {spec.mask}, score {spec.score}: no fused kernel of torch has code for it")


def _learned_places(node: fx.Node, spec: Spec) -> list[int]:
    """The captures of the score of which autograd may want a gradient."""
    named = captures_of(spec.score.result)
    captures = [*(argument(node, "captures") or ())]
    if argument(node, "attn_mask") is not None:  # the last one, where no formula stands for it
        captures.append(argument(node, "attn_mask"))
    return [place for place, each in enumerate(captures) if f"c{place}" in named and reaches_grad(each)]


def spec_of(operands: Sequence[Any], attributes: dict[str, Any]) -> Spec:
    """Of the operands (tensors, fake ones too) and the attributes of ``fxopt::block_attention``.

    Raises:
        Unsupported: they are none that a kernel takes.
    """
    query, key, value, sinks, _, captures, sizes = operands
    for each in (query, key, value, *captures):
        if each.dtype not in TRITON_TYPES or each.layout is not torch.strided:
            raise Unsupported(f"a tensor of {each.dtype}")
    if not query.dtype == key.dtype == value.dtype:
        raise Unsupported(f"operands of {query.dtype}, {key.dtype} and {value.dtype}")
    if not all(isinstance(size, int) for size in (query.shape[1], key.shape[1], query.shape[-1])):
        raise Unsupported("a number or a width of heads that changes")
    return Spec(
        dtype=query.dtype,
        group=query.shape[1] // key.shape[1],
        width=query.shape[-1],
        width_v=value.shape[-1],
        mask=MaskProgram.parse(attributes["mask"]),
        score=ScoreProgram.parse(attributes["score"]),
        scale=attributes["scale"],
        captures=tuple(Capture.of(f"c{place}", each) for place, each in enumerate(captures)),
        sizes=tuple(f"n{place}" for place in range(len(sizes))),
        sinks=None if sinks is None else sinks.dtype,
        dead_rows=attributes["dead_rows"] if attributes["dead_rows"] != NONE else ZERO,
        stops=attributes["stops"],
        stopped=tuple(attributes["stopped"]),
        dropout_p=attributes["dropout_p"],
        alignment=math.gcd(alignment((query, key, value)), query.shape[-1], value.shape[-1]),
        far=are_far((query, key, value)),
    )


def emit_attention(
    graph: fx.Graph,
    target: Target | None,
    as_op: Emit | None,
    fastest: Callable[[KernelFile], KernelFile] = lambda kernel: kernel,
) -> tuple[list[KernelFile], list[Evidence]]:
    """The kernels of the calls in a graph after autograd that were made for one, and what was done.

    Args:
        as_op: the op that launches a kernel; it is called in the place of the call. None leaves the graph
            as it is.
        fastest: a kernel or one of its alternatives.
    """
    kernels: dict[str, KernelFile] = {}
    chosen: dict[str, KernelFile] = {}
    evidence = []
    forward, backward = (
        getattr(torch.ops.fxopt, name).default for name in ("block_attention", "block_attention_backward")
    )
    for node in list(graph.nodes):
        called = node.op == "call_function" and node.target in (forward, backward)
        if not called or not node.kwargs.get("by_kernel"):
            continue
        first = _kernel(node, node.target is backward, target)
        if first.digest not in chosen:
            chosen[first.digest] = fastest(first)
        kernel = chosen[first.digest]
        kernels.setdefault(kernel.digest, kernel)
        evidence.append(_evidence(node, kernel, target))
        if as_op is not None:
            _replace(graph, node, as_op(kernel), node.target is backward)
    return list(kernels.values()), evidence


def _operands(node: fx.Node, backward: bool) -> tuple[list[Any], dict[str, Any], list[int]]:
    """The arguments of the forward among those of a node, its attributes, and what is learned."""
    attributes: dict[str, Any] = dict(node.kwargs)
    learned = list(attributes.pop("learned", ()))
    return list(node.args)[3 if backward else 0 :], attributes, learned


def _kernel(node: fx.Node, backward: bool, target: Target | None) -> KernelFile:
    operands, attributes, learned = _operands(node, backward)
    values = pytree.tree_map_only(fx.Node, val, operands)
    spec = spec_of(values, attributes)
    example = example_text(spec, values, backward=backward)
    about = _about(node, spec, values, backward)
    if backward:
        more: list[torch.Tensor] = pytree.tree_map_only(fx.Node, val, list(node.args[:2]))
        known = math.gcd(spec.alignment, alignment(more))
        spec = replace(spec, alignment=known, far=spec.far or are_far(more))
        kernel = backward_kernel(spec, learned, target, example, about)
        return other_backward_tiles(kernel, spec, learned, target, about)
    kernel = forward_kernel(spec, target, example, about)
    kernel = with_descriptors(kernel, spec, target, about, values)
    return other_forward_tiles(kernel, spec, target, about)


def _about(node: fx.Node, spec: Spec, values: Sequence[Any], backward: bool) -> About:
    query, key, value = values[:3]
    batch, heads, rows, columns = map(hint, (*query.shape[:3], key.shape[2]))
    live = live_scores(spec.mask, tuple(map(hint, values[6])), rows, columns)
    each = (5.0 if backward else 2.0) * (spec.width + spec.width_v)  # operations of a score
    flops = int(each * batch * heads * live)
    passes = 2 if backward else 1
    out = batch * heads * rows * spec.width_v
    moved = sum(hint(each.numel()) for each in (query, key, value)) + out
    operands = "query.numel() + key.numel() + value.numel()"
    written = f"batch * heads * rows * {spec.width_v}"
    return About(
        summary="attention" + (", backward" if backward else ""),
        lines=tuple(filter(None, (location(node),))),
        replaces=(str(node.target),),
        shapes=tuple(f"{name}: {list(one.shape)}" for name, one in zip(_OPERANDS, values[:3], strict=True)),
        moved=f"{passes} * ({operands} + {written}) * query.element_size()",
        flops=f"int({each} * batch * heads * rows * columns)",
        seen=(passes * moved * query.element_size(), flops),
        multiplied=multiplied(flops, query.dtype),
    )


_OPERANDS = ("query", "key", "value")


def _evidence(node: fx.Node, kernel: KernelFile, target: Target | None) -> Evidence:
    moved, flops = kernel.about.seen
    where = "" if target is None else f" for {target.name}"
    return Evidence(
        rewrite=NAME,
        anchor=node.name,
        location=location(node),
        status=Status.APPLIED,
        reason=f"{node.target} becomes the kernel {kernel.name}{where}: "
        f"{'; '.join(kernel.about.configuration)}",
        before=Cost(moved, flops, 1),
        after=Cost(moved, flops, len(kernel.launches)),
    )


def _replace(graph: fx.Graph, node: fx.Node, op: Any, backward: bool) -> None:
    """Call `op` with the tensors and sizes of `node`, and give its results to the readers of `node`."""
    operands, _, learned = _operands(node, backward)
    query, key, value, sinks, seed, captures, sizes = operands
    with graph.inserting_before(node):
        saved = [_rows_together(graph, each) for each in node.args[:2]] if backward else []
        saved += [node.args[2]] if backward else []
        tensors = [_rows_together(graph, each) for each in (query, key, value)]
        others = [*captures, *(each for each in (sinks, seed) if each is not None), *sizes]
        call = graph.call_function(op, (*saved, *tensors, *others))
    # The op's results, one after the other: of sinks none without them.
    flat = [
        (0,),
        (1,),
        (2,),
        *([(3,)] if sinks is not None else []),
        *((4, at) for at in range(len(learned))),
    ]
    places = flat if backward else [(0,), (1,)]
    call.meta["val"] = tuple(_at(node.meta["val"], place) for place in places)
    for number, place in enumerate(places):
        for reader in _readers(node, place):
            with graph.inserting_before(reader):
                result = graph.call_function(operator.getitem, (call, number))
            result.meta |= reader.meta
            reader.replace_all_uses_with(result)
            graph.erase_node(reader)
    for reader in list(node.users):
        graph.erase_node(reader)
    graph.erase_node(node)


def _at(value: Any, place: tuple[int, ...]) -> Any:
    for index in place:
        value = value[index]
    return value


def _readers(node: fx.Node, place: tuple[int, ...]) -> list[fx.Node]:
    """The nodes that stand for ``node[place]``."""
    found = [node]
    for index in place:
        found = [
            user
            for one in found
            for user in one.users
            if user.target is operator.getitem and user.args[1] == index
        ]
    return found


def _rows_together(graph: fx.Graph, node: Any) -> Any:
    """The tensor with the numbers of a row side by side: a gradient may be an expanded number."""
    value = node.meta["val"]
    if value.stride(-1) == 1 or value.shape[-1] == 1:
        return node
    copy = graph.call_function(
        torch.ops.aten.clone.default, (node,), {"memory_format": torch.contiguous_format}
    )
    copy.meta |= {**node.meta, "val": value.clone(memory_format=torch.contiguous_format)}
    return copy
