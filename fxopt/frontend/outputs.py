"""Strides of outputs are part of the answer: a rewrite may change them inside a graph, not at its border."""

from __future__ import annotations

from typing import Any

import torch
from torch import fx

from fxopt.ir.facts import same_strides
from fxopt.ir.propagate import evaluate, fake_mode_of

aten = torch.ops.aten


def output_layout(graph: fx.Graph) -> list[Any]:
    """The fake values of the outputs, in order; None for what is no tensor."""
    return [_tensor(arg) for arg in _outputs(graph)]


def keep_output_layout(gm: fx.GraphModule, wanted: list[Any]) -> None:
    """Copy outputs whose strides have changed into the strides of `wanted`."""
    mode = fake_mode_of(gm.graph)
    output = gm.graph.output_node()
    changed = False
    for arg, before in zip(_outputs(gm.graph), wanted, strict=True):
        after = _tensor(arg)
        if before is None or after is None or after.shape != before.shape or same_strides(before, after):
            continue
        with gm.graph.inserting_before(output):
            copy = with_strides(gm.graph, arg, before)
        if mode is not None:
            copy.meta["val"] = evaluate(copy, mode)
        output.replace_input_with(arg, copy)
        changed = True
    if changed:
        gm.recompile()


def _outputs(graph: fx.Graph) -> list[Any]:
    returned = graph.output_node().args[0]
    return list(returned) if isinstance(returned, (tuple, list)) else [returned]


def _tensor(arg: Any) -> Any:
    value = arg.meta.get("val") if isinstance(arg, fx.Node) else None
    return value if isinstance(value, torch.Tensor) else None


def with_strides(graph: fx.Graph, node: fx.Node, like: torch.Tensor) -> fx.Node:
    """A copy of `node` with the order of dimensions in memory of `like`, at the insertion point."""
    order = sorted(range(like.dim()), key=lambda dim: _hint(like.stride()[dim]), reverse=True)
    inverse = [order.index(dim) for dim in range(like.dim())]
    permuted = graph.call_function(aten.permute.default, (node, order))
    dense = graph.call_function(aten.clone.default, (permuted,), {"memory_format": torch.contiguous_format})
    copy = graph.call_function(aten.permute.default, (dense, inverse))
    mode = fake_mode_of(graph)
    for inner in (permuted, dense):
        if mode is not None:
            inner.meta["val"] = evaluate(inner, mode)
    return copy


def _hint(stride: int | torch.SymInt) -> int:
    return stride.node.hint if isinstance(stride, torch.SymInt) else stride
