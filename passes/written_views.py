"""A write to a view, undone: the tensor with a part in the place of the view, and other views of that."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import fx
from torch._ops import OpOverload

from fxopt.ir import facts
from fxopt.ir.facts import is_call
from fxopt.ir.views import views_up
from fxopt.ir.writes import STANDS_FOR_WRITE

aten = torch.ops.aten


def _scattered(scatter: OpOverload) -> Callable[[fx.Graph, fx.Node, fx.Node], fx.Node]:
    def put(graph: fx.Graph, view: fx.Node, part: fx.Node) -> fx.Node:
        made = graph.call_function(scatter, (view.args[0], part, *view.args[1:]), view.kwargs)
        made.meta[STANDS_FOR_WRITE] = True
        return made

    return put


def _reshaped(graph: fx.Graph, view: fx.Node, part: fx.Node) -> fx.Node:
    return graph.call_function(aten.reshape_as.default, (part, view.args[0]))


def _again(graph: fx.Graph, view: fx.Node, part: fx.Node) -> fx.Node:
    return graph.call_function(view.target, (part, *view.args[1:]), view.kwargs)  # type: ignore[arg-type]


# A view -> what puts a changed one back into the tensor that it is a view of.
_PUT_BACK: dict[Any, Callable[[fx.Graph, fx.Node, fx.Node], fx.Node]] = {
    aten.slice.Tensor: _scattered(aten.slice_scatter.default),
    aten.select.int: _scattered(aten.select_scatter.default),
    **dict.fromkeys(
        (aten.view.default, aten.reshape.default, aten.unsqueeze.default, aten.squeeze.default,
         aten.squeeze.dim, aten.flatten.using_ints, aten.unflatten.int), _reshaped),
    **dict.fromkeys((aten.transpose.int, aten.t.default, aten.mT.default, aten.alias.default), _again),
}  # fmt: skip


def can_put_back(view: fx.Node) -> bool:
    """`put_back` knows the way from a view to its base."""
    *steps, _ = views_up(view)
    return all(is_call(step, *_PUT_BACK) for step in steps)


def put_back(graph: fx.Graph, view: fx.Node, part: fx.Node) -> fx.Node:
    """The base of `view`, with `part` in the place of the view."""
    *steps, _ = views_up(view)
    for step in steps:
        part = _PUT_BACK[step.target](graph, step, part)
    return part


def can_view_again(view: fx.Node) -> bool:
    """`view_again` may repeat the views that lead from the base to `view`."""
    *steps, _ = views_up(view)
    return all(isinstance(step.target, OpOverload) and not facts.is_write(step) for step in steps)


def view_again(graph: fx.Graph, view: fx.Node, base: fx.Node) -> fx.Node:
    """The same view of another base."""
    *steps, _ = views_up(view)
    for step in reversed(steps):
        base = _again(graph, step, base)
    return base
