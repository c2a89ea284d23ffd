"""Products of batches of matrices, matmul, bmm, mm and einsum, as operands in the order of the op."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from fxopt.ir import facts
from fxopt.ir.contract import Miss
from fxopt.ir.facts import is_call, val

from .attention_layout import Lead

aten = torch.ops.aten

MATRIX_PRODUCTS = (aten.matmul.default, aten.bmm.default, aten.mm.default)
PRODUCTS = (*MATRIX_PRODUCTS, aten.einsum.default)

# Dimensions of a node in a new order; None stands for a new one of size one.
Order = tuple[int | None, ...]


@dataclass(frozen=True)
class Operand:
    """A tensor as (lead..., rows, columns)."""

    node: fx.Node
    order: Order

    @property
    def shape(self) -> Lead:
        sizes = val(self.node).shape
        return tuple(1 if dim is None else sizes[dim] for dim in self.order)

    @property
    def lead(self) -> Lead:
        return self.shape[:-2]

    @property
    def transposed(self) -> Operand:
        """With its last two dimensions swapped."""
        *lead, rows, columns = self.order
        return Operand(self.node, (*lead, columns, rows))


@dataclass(frozen=True)
class Product:
    """``left @ right^T`` of (lead..., rows, depth) and (lead..., columns, depth).

    `order`: the dimensions of the result, as places in (lead..., rows, columns).
    """

    left: Operand
    right: Operand
    order: tuple[int, ...]

    @property
    def swapped(self) -> Product:
        """``(left @ right^T)^T``: the same product with its operands in the other order."""
        last = len(self.order) - 1
        swap = {last: last - 1, last - 1: last}
        return Product(self.right, self.left, tuple(swap.get(place, place) for place in self.order))

    @property
    def is_ordered(self) -> bool:
        """The result is (lead..., rows, columns)."""
        return self.order == tuple(range(len(self.order)))


def read_product(node: fx.Node) -> Product | Miss:
    """The operands of one of `PRODUCTS`."""
    if is_call(node, aten.einsum.default):
        return _einsum(node)
    left, right = node.args[0], node.args[1]
    if not facts.is_tensor(left) or not facts.is_tensor(right):
        return Miss("a product of two tensors", node.name)
    ranks = [val(left).dim(), val(right).dim()]
    if min(ranks) < 2:
        return Miss("a product of matrices", f"ranks {ranks[0]} and {ranks[1]}")
    first, second = (_aligned(each, max(ranks)) for each in (left, right))
    return Product(first, second.transposed, tuple(range(max(ranks))))


def _aligned(node: Any, rank: int) -> Operand:
    own = val(node).dim()
    return Operand(node, (None,) * (rank - own) + tuple(range(own)))


def _einsum(node: fx.Node) -> Product | Miss:
    """One label is summed, one is of the rows only, one of the columns only; the others are the lead."""
    equation = str(node.args[0])
    tensors: Any = node.args[1]
    if len(tensors) != 2 or not all(facts.is_tensor(each) for each in tensors):
        return Miss("a product of two tensors", equation)
    inputs, _, output = equation.replace(" ", "").partition("->")
    left, _, right = inputs.partition(",")
    repeated = any(len(set(each)) < len(each) for each in (left, right, output))
    if not output or "." in equation or repeated:
        return Miss("an equation with an output, each label once in a tensor", equation)
    summed = [label for label in left if label in right and label not in output]
    rows = [label for label in output if label in left and label not in right]
    columns = [label for label in output if label in right and label not in left]
    if len(summed) != 1 or set(left) | set(right) != {*summed, *output} or not columns or not rows:
        return Miss("a product of matrices", equation)
    return _labelled(tensors, (left, right, output), summed[0], rows, columns)


def _labelled(
    tensors: list[fx.Node], labels: tuple[str, str, str], summed: str, rows: list[str], columns: list[str]
) -> Product:
    """Of several labels that one operand alone has, the last is its row; the other has size one there."""
    left, right, output = labels
    lead = [label for label in output if label not in (rows[-1], columns[-1])]
    operands = []
    for node, own, row in ((tensors[0], left, rows[-1]), (tensors[1], right, columns[-1])):
        order = tuple(own.index(label) if label in own else None for label in (*lead, row, summed))
        operands.append(Operand(node, order))
    places = (*lead, rows[-1], columns[-1])
    return Product(operands[0], operands[1], tuple(places.index(label) for label in output))
