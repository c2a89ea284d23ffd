"""Keys and values that are a linear function of something that all heads share, and which part of the weight
makes a head.

What is looked for is not a spelling: a tensor (B, H, S, D) that shares the memory of ``linear(x, weight)`` is
a choice of its columns if a step along batch or sequence leads to the next row, and its strides say which
columns those are.
"""

from __future__ import annotations

import operator
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from fxopt.ir import facts
from fxopt.ir.facts import argument, is_call, val
from fxopt.ir.propagate import storage_of

from .attention_layout import Steps

aten = torch.ops.aten

COPIES = (aten.contiguous.default, aten.clone.default)


@dataclass(frozen=True)
class Heads:
    """A tensor (B, H, S, D), or (B, S, H, D) if `transposed`."""

    node: fx.Node
    transposed: bool = False

    @property
    def value(self) -> torch.Tensor:
        """(B, H, S, D)."""
        own: torch.Tensor = val(self.node)
        if not self.transposed:
            return own
        with own.fake_mode:  # type: ignore[attr-defined]
            return own.transpose(1, 2)

    @property
    def width(self) -> facts.Size:
        return val(self.node).shape[-1]  # type: ignore[no-any-return]

    @property
    def is_shared(self) -> bool:
        """Every head has the same numbers, in the same memory."""
        heads, stride = self.value.shape[1], self.value.stride(1)
        return facts.same_size(heads, 1) or (isinstance(stride, int) and stride == 0)

    @property
    def inner(self) -> Heads:
        """What it is a copy, or the transposition, of."""
        node, transposed = self.node, self.transposed
        while True:
            source: Any = node.args[0] if node.args else None
            if is_call(node, aten.transpose.int) and _dims(node) == {1, 2} and facts.rank(node) == 4:
                transposed = not transposed
            elif not is_call(node, *COPIES):
                return Heads(node, transposed)
            node = source

    def parts(self) -> list[Heads]:
        """Of which tensors it is the concatenation along D; itself where it is none."""
        node, transposed = self.inner.node, self.inner.transposed
        if not is_call(node, aten.cat.default) or not facts.is_last_dim(node, argument(node, "dim")):
            return [self]
        return [Heads(part, transposed) for part in argument(node, "tensors")]

    def in_graph(self, graph: fx.Graph) -> fx.Node:
        """(B, H, S, D), or (B, 1, S, D) if it is shared."""
        heads = 2 if self.transposed else 1
        node = self.node
        if self.is_shared and not facts.same_size(self.value.shape[1], 1):
            node = graph.call_function(aten.slice.Tensor, (node, heads, 0, 1))
        return graph.call_function(aten.transpose.int, (node, 1, 2)) if self.transposed else node


def _dims(node: fx.Node) -> set[Any]:
    return {dim % 4 if isinstance(dim, int) else dim for dim in node.args[1:3]}


@dataclass(frozen=True)
class Projection:
    """(B, H, S, D) made of (B, 1, S, N): number d of head h is ``x @ weight[first + h * step + d]``."""

    linear: fx.Node
    heads: int
    width: int
    first: int
    step: int
    steps: Steps

    @property
    def source(self) -> fx.Node:
        return self.linear.args[0]  # type: ignore[return-value]

    @property
    def weight(self) -> fx.Node:
        """(rows, N)."""
        return self.linear.args[1]  # type: ignore[return-value]

    @property
    def depth(self) -> int:
        return val(self.weight).shape[1]  # type: ignore[no-any-return]

    def latent(self, graph: fx.Graph) -> fx.Node:
        """The source as (B, 1, S, N)."""
        node = self.source
        for op, args in self.steps:
            node = graph.call_function(op, (node, *args))
        return node

    def matrices(self, graph: fx.Graph) -> fx.Node:
        """The part of the weight of each head: (H, D, N)."""
        node, rows = self.weight, self.heads * self.step
        begin = min(self.first, val(self.weight).shape[0] - rows)
        if rows < val(self.weight).shape[0]:
            node = graph.call_function(aten.slice.Tensor, (node, 0, begin, begin + rows))
        node = graph.call_function(aten.unflatten.int, (node, 0, [self.heads, self.step]))
        inner = self.first - begin
        if self.width < self.step:
            node = graph.call_function(aten.slice.Tensor, (node, 1, inner, inner + self.width))
        return node


def find_projection(tensor: Heads) -> Projection | None:
    """The linear function that made a (B, H, S, D), or None."""
    inner = tensor.inner
    linear = _linear_under(inner.node)
    found = None if linear is None else _rows(linear)
    if linear is None or found is None:
        return None
    rows, steps = found
    view, own = inner.value, val(linear)
    _, heads, _, width = view.shape
    first, step = view.storage_offset() - own.storage_offset(), view.stride(1)
    numbers = (heads, width, first, step, *val(linear.args[1]).shape)
    if not all(isinstance(number, int) for number in numbers):
        return None
    if view.dtype != own.dtype or any(not _next_row_is_next(view, rows, dim) for dim in (0, 2)):
        return None
    step, columns = width if heads == 1 else step, own.shape[-1]
    inside = first >= 0 and first + (heads - 1) * step + width <= columns and heads * step <= columns
    if view.stride(3) != 1 or own.stride(-1) != 1 or step < width or not inside:
        return None
    return Projection(linear, heads, width, first, step, steps)


def _next_row_is_next(view: torch.Tensor, rows: torch.Tensor, dim: int) -> bool:
    """A step along a dimension of the view is one along that dimension of the rows."""
    if not facts.same_size(view.shape[dim], rows.shape[dim]):
        return False
    return facts.same_size(view.shape[dim], 1) or facts.same_size(view.stride(dim), rows.stride(dim))


def _linear_under(node: Any) -> fx.Node | None:
    """The call whose result a node is a view of."""
    memory = storage_of(val(node))
    while not is_call(node, aten.linear.default):
        if node.op != "call_function" or not node.args:
            return None
        source = node.args[0]
        if node.target is operator.getitem:  # one of several views
            source = source.args[0]
        if not facts.is_tensor(source) or storage_of(val(source)) != memory:
            return None
        node = source
    return node  # type: ignore[no-any-return]


def _rows(linear: fx.Node) -> tuple[torch.Tensor, Steps] | None:
    """The result as (B, 1, S, columns), and how to bring it, and the argument, there."""
    own = val(linear)
    steps: Steps = []
    if own.dim() == 3:
        steps = [(aten.unsqueeze.default, (1,))]
    elif own.dim() == 4 and facts.same_size(own.shape[2], 1) and not facts.same_size(own.shape[1], 1):
        steps = [(aten.transpose.int, (1, 2))]
    elif own.dim() != 4 or not facts.same_size(own.shape[1], 1):
        return None
    with own.fake_mode:
        for op, args in steps:
            own = op(own, *args)
    return own, steps
