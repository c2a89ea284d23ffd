"""Which operators exchange the last two dimensions of a tensor."""

from __future__ import annotations

from typing import Any

import torch
from torch import fx

from fxopt.ir import facts
from fxopt.ir.facts import is_call

aten = torch.ops.aten


def swap(rank: int) -> tuple[int, ...]:
    """The order of two or more dimensions with the last two exchanged."""
    return (*range(rank - 2), rank - 1, rank - 2)


def swaps(node: fx.Node) -> bool | None:
    """Whether a transposition or permutation exchanges the last two dimensions; False: it moves none, None:
    others.

    Args:
        node: a call of ``transpose``, ``permute``, ``t``, ``mT``, ``adjoint`` or numpy's ``T``.
    """
    rank, arguments = facts.rank(node), list[Any](node.args[1:])
    order = list(range(rank))
    swapped = swap(rank) if rank > 1 else tuple(order)
    if is_call(node, aten.permute.default):
        order = [each % rank for each in arguments[0]]
    elif is_call(node, aten.transpose.int):
        one, other = (each % rank for each in arguments)
        order[one], order[other] = other, one
    else:
        # That of numpy reverses all dimensions.
        order = order[::-1] if is_call(node, aten.numpy_T.default) else [*swapped]
    return {swapped: True, tuple(range(rank)): False}.get(tuple(order))
