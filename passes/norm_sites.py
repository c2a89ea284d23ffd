"""Questions that the norm passes share: what is squared, averaged, scaled and shifted."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import fx

from fxopt.ir import facts
from fxopt.ir.contract import Context
from fxopt.ir.facts import argument, is_call, is_number, val

aten = torch.ops.aten

ADDS = (aten.add.Tensor, aten.add.Scalar)
MULS = (aten.mul.Tensor,)


Eps = float | fx.Node


def added_eps(node: Any) -> tuple[fx.Node, Eps] | None:
    """(operand, eps) of ``operand + eps``. A number that may change from call to call is a node."""
    if not is_call(node, *ADDS) or not is_number(argument(node, "alpha", 1), 1):
        return None
    for operand, eps in facts.commuted(node):
        if facts.is_tensor(operand) and facts.is_scalar(eps):
            return operand, eps if isinstance(eps, fx.Node) else float(eps)
    return None


def row_mean_of(node: Any) -> fx.Node | None:
    """What is averaged over the last dimension, which is kept with size one."""
    if not is_call(node, aten.mean.dim) or not argument(node, "keepdim"):
        return None
    dims = argument(node, "dim") or []
    if len(dims) != 1 or not facts.is_last_dim(node.args[0], dims[0]):
        return None
    source: fx.Node = node.args[0]
    return source


def square_of(node: Any) -> fx.Node | None:
    """What is squared: x ** 2, x * x or square(x)."""
    found: Any = None
    if (
        is_call(node, aten.pow.Tensor_Scalar)
        and is_number(node.args[1], 2)
        or is_call(node, aten.square.default)
        or (is_call(node, *MULS) and node.args[0] is node.args[1])
    ):
        found = node.args[0]
    return found if isinstance(found, fx.Node) else None


def same_source(a: Any, b: Any) -> bool:
    """Two nodes that hold the same values, up to casts that keep every value."""
    if not isinstance(a, fx.Node) or not isinstance(b, fx.Node):
        return False
    return facts.peel_widening(a) is facts.peel_widening(b)


def is_row_vector(node: Any, size: facts.Size) -> bool:
    """A tensor of shape (size,)."""
    return facts.is_tensor(node) and len(val(node).shape) == 1 and facts.same_size(val(node).shape[0], size)


def offset_of(node: fx.Node) -> tuple[fx.Node, float]:
    """(w, c) for ``c + w`` with a Python number c; (node, 0) for anything else."""
    found = added_eps(node)
    if found is None or isinstance(found[1], fx.Node):
        return node, 0.0
    return found[0], found[1]


def through_casts(node: fx.Node) -> fx.Node:
    """Down through floating casts, each the only reader of what it casts, and not beyond one that rounds."""
    rounded = False
    while True:
        user = facts.only_user(node)
        if user is None or not facts.is_float_cast(user):
            return node
        if rounded and facts.dtype(user) != facts.dtype(node):
            return node
        rounded = rounded or not facts.is_widening(user)
        node = user


def casts_between(first: fx.Node, last: fx.Node) -> list[fx.Node]:
    """The casts after `first` up to `last`."""
    found: list[fx.Node] = []
    while last is not first:
        found.insert(0, last)
        last = last.args[0]  # type: ignore[assignment]
    return found


def single_readers(nodes: Iterator[fx.Node] | list[fx.Node]) -> fx.Node | None:
    """The first of `nodes` that has more than one reader."""
    return next((node for node in nodes if len(node.users) != 1), None)


def stale(values: list[fx.Node], root: fx.Node, ctx: Context) -> str | None:
    """Why `values` cannot be read at `root` instead of where the site reads them."""
    for value in values:
        why = ctx.facts.unsafe_read([value], value, root)
        if why is not None:
            return why
    return None


def residual_of(node: fx.Node) -> tuple[fx.Node, fx.Node] | None:
    """The two addends of equal shape and dtype that make `node`."""
    if not is_call(node, aten.add.Tensor) or not is_number(argument(node, "alpha"), 1):
        return None
    a, b = node.args[0], node.args[1]
    if not facts.is_tensor(a) or not facts.is_tensor(b):
        return None
    alike = facts.same_shape(val(a).shape, val(b).shape) and val(a).dtype == val(b).dtype == val(node).dtype
    return (a, b) if alike else None  # type: ignore[return-value]


def read_later(node: fx.Node, inside: set[fx.Node], root: fx.Node) -> bool:
    """Everyone outside of the site who reads `node` comes after `root`."""
    return all(user in inside or root < user for user in node.users)
