"""The inputs of a dumped graph: shapes, strides and dtypes as recorded, and for integers a safe range.

An integer that selects rows (token ids of an embedding, an index) must stay below the number of rows. The
bound is found by following the input through views and casts to what reads it. An integer that is not used
so becomes mostly 1, as a mask would be.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx
from torch._ops import HigherOrderOperator
from torch.utils import _pytree as pytree

from fxopt.ir.cost import hint

Dim = int | torch.SymInt


@dataclass(frozen=True)
class InputSpec:
    """One input.

    Attributes:
        name: its name in the graph.
        kind: "tensor", "symbol" (a size, `value` is the symbol), or "constant" (`value` is the value).
        bound: integers lie in [0, bound); None when nothing is indexed with them.
        parameter: it is a trained parameter.
    """

    name: str
    kind: str
    value: Any = None
    size: tuple[Dim, ...] = ()
    stride: tuple[Dim, ...] = ()
    dtype: torch.dtype | None = None
    device: str = "cpu"
    bound: Dim | None = None
    parameter: bool = False


def describe_inputs(gm: fx.GraphModule) -> list[InputSpec]:
    """The inputs of a graph in order."""
    return [_describe(node, gm) for node in gm.graph.find_nodes(op="placeholder")]


def recorded_value(node: fx.Node) -> Any:
    """What was recorded for a node: by normalization, or by Dynamo."""
    return node.meta.get("val", node.meta.get("example_value"))


def _describe(node: fx.Node, gm: fx.GraphModule) -> InputSpec:
    value = recorded_value(node)
    if isinstance(value, (torch.SymInt, torch.SymFloat, torch.SymBool)):
        return InputSpec(node.name, "symbol", value)
    if not isinstance(value, torch.Tensor):
        return InputSpec(node.name, "constant", value)
    if value.layout is not torch.strided:
        raise ValueError(f"input {node.name} has layout {value.layout}")
    integer = not (value.is_floating_point() or value.is_complex() or value.dtype is torch.bool)
    bounds = list(_bounds(node, gm, set())) if integer else []
    return InputSpec(
        node.name,
        "tensor",
        size=tuple(value.shape),
        stride=tuple(value.stride()),
        dtype=value.dtype,
        device=str(value.device),
        bound=min(bounds, key=hint) if bounds else None,
        parameter=isinstance(node.meta.get("example_value"), torch.nn.Parameter),
    )


# Ops that pass their first argument on, by the names that functions, methods and ATen ops share.
_PASSING = frozenset(
    ("to", "type_as", "long", "int", "_to_copy", "clone", "detach", "alias", "contiguous", "lift_fresh_copy")
    + ("view", "reshape", "_unsafe_view", "flatten", "unsqueeze", "squeeze", "expand", "expand_as", "repeat")
    + ("t", "transpose", "permute", "slice", "select", "narrow", "getitem")
)


def _bounds(node: fx.Node, gm: fx.GraphModule, seen: set[fx.Node]) -> Iterator[Dim]:
    """Numbers of rows that values of `node` select from."""
    if node in seen:
        return
    seen.add(node)
    for user in node.users:
        if user.op not in ("call_function", "call_method"):
            continue
        name = _name(user)
        rows = _rows(name, user, node)
        if rows is not None:
            yield rows
        elif name in _PASSING and user.args and user.args[0] is node:
            yield from _bounds(user, gm, seen)
        elif isinstance(user.target, HigherOrderOperator):
            yield from _inner_bounds(user, node, gm, seen)


def _name(node: fx.Node) -> str:
    """``embedding`` for ``torch.nn.functional.embedding`` and for ``aten.embedding.default``."""
    if node.op == "call_method":
        return str(node.target)
    name: str = getattr(node.target, "__name__", "")
    return name.partition(".")[0]


def _rows(name: str, user: fx.Node, node: fx.Node) -> Dim | None:
    """The size of the dimension that `user` selects in with `node`."""
    first = recorded_value(user.args[0]) if user.args and isinstance(user.args[0], fx.Node) else None
    if name == "embedding":
        tensors = [recorded_value(arg) for arg in user.all_input_nodes if arg is not node]
        tables = [value for value in tensors if isinstance(value, torch.Tensor) and value.dim() == 2]
        return tables[0].shape[0] if tables else None
    if not isinstance(first, torch.Tensor) or user.args[0] is node or first.dim() == 0:
        return None
    if name in ("gather", "index_select", "index_copy", "index_copy_", "index_add", "index_add_", "scatter"):
        dim = user.args[1] if len(user.args) > 1 else user.kwargs.get("dim", 0)
        return first.shape[dim] if isinstance(dim, int) else None
    if name in ("index", "index_put", "index_put_", "getitem", "setitem"):
        return _indexed_rows(user.args[1] if len(user.args) > 1 else None, node, first)
    if name in ("cross_entropy", "cross_entropy_loss", "nll_loss", "nll_loss_nd"):
        return first.shape[-1] if first.dim() == 1 else first.shape[1]
    return None


def _indexed_rows(index: Any, node: fx.Node, indexed: torch.Tensor) -> Dim | None:
    positions = index if isinstance(index, (tuple, list)) else (index,)
    if Ellipsis in positions or None in positions[: indexed.dim()]:
        return min(indexed.shape, key=hint) if any(position is node for position in positions) else None
    for dim, position in enumerate(positions):
        if position is node and dim < indexed.dim():
            return indexed.shape[dim]
    return None


def _inner_bounds(user: fx.Node, node: fx.Node, gm: fx.GraphModule, seen: set[fx.Node]) -> Iterator[Dim]:
    """Through a call of a sub-graph, whose inputs are the last arguments of the call."""
    for arg in user.all_input_nodes:
        inner = getattr(gm, str(arg.target), None) if arg.op == "get_attr" else None
        if not isinstance(inner, fx.GraphModule):
            continue
        placeholders = inner.graph.find_nodes(op="placeholder")
        given = pytree.tree_leaves(user.args)
        for outer, placeholder in zip(given[len(given) - len(placeholders) :], placeholders, strict=False):
            if outer is node:
                yield from _bounds(placeholder, inner, seen)
