"""Products of batches of matrices, matmul, bmm, mm and einsum, as operands in the order of the op."""

from __future__ import annotations

import string
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from fxopt.ir import facts
from fxopt.ir.contract import Miss
from fxopt.ir.facts import is_call, val

from .attention_layout import Lead
from .transpositions import swaps

aten = torch.ops.aten

MATRIX_PRODUCTS = (aten.matmul.default, aten.bmm.default, aten.mm.default)
_TURNS = (
    aten.transpose.int, aten.permute.default, aten.mT.default, aten.t.default, aten.adjoint.default,
)  # fmt: skip
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


def read_product(node: fx.Node, weights: fx.Node | None = None) -> Product | Miss:
    """The operands of one of `PRODUCTS`; of `weights` the last two dimensions are rows and columns."""
    if is_call(node, aten.einsum.default):
        return _einsum(node, weights)
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


def _einsum(node: fx.Node, weights: fx.Node | None) -> Product | Miss:
    """One label is summed, one is of the rows only, one of the columns only; the others are the lead."""
    equation = str(node.args[0])
    tensors: Any = node.args[1]
    if len(tensors) != 2 or not all(facts.is_tensor(each) for each in tensors):
        return Miss("a product of two tensors", equation)
    inputs, _, output = _without_ellipsis(equation, [val(each).dim() for each in tensors]).partition("->")
    left, _, right = inputs.partition(",")
    repeated = any(len(set(each)) < len(each) for each in (left, right, output))
    if not output or "." in output or repeated:
        return Miss("an equation with an output, each label once in a tensor", equation)
    summed = [label for label in left if label in right and label not in output]
    rows = [label for label in output if label in left and label not in right]
    columns = [label for label in output if label in right and label not in left]
    if len(summed) != 1 or set(left) | set(right) != {*summed, *output} or not columns or not rows:
        return Miss("a product of matrices", equation)
    # Of several labels that one operand alone has, the others are of the lead, of size one elsewhere.
    known = [own[-2] for node, own in zip(tensors, (left, right), strict=True) if node is weights]
    row, column = (_chosen(each, known or list(output[-2:])) for each in (rows, columns))
    return _labelled(tensors, (left, right, output), summed[0], row, column)


def _without_ellipsis(equation: str, ranks: list[int]) -> str:
    """With labels in the place of `...`, whose dimensions broadcast from the last one on."""
    inputs, arrow, output = equation.replace(" ", "").partition("->")
    own = inputs.split(",")
    counts = [
        rank - len(each.replace("...", "")) if "..." in each else 0
        for rank, each in zip(ranks, own, strict=True)
    ]
    unused = [letter for letter in string.ascii_letters if letter not in equation]
    labels = "".join(unused[: max(counts)])
    named = [
        each.replace("...", labels[len(labels) - count :]) for count, each in zip(counts, own, strict=True)
    ]
    return ",".join(named) + arrow + output.replace("...", labels)


def _chosen(labels: list[str], wanted: list[str]) -> str:
    return next((label for label in labels if label in wanted), labels[-1])


def _labelled(
    tensors: list[fx.Node], labels: tuple[str, str, str], summed: str, row: str, column: str
) -> Product:
    left, right, output = labels
    lead = [label for label in output if label not in (row, column)]
    operands = []
    for node, own, last in ((tensors[0], left, row), (tensors[1], right, column)):
        order = tuple(own.index(label) if label in own else None for label in (*lead, last, summed))
        operands.append(Operand(node, order))
    places = (*lead, row, column)
    return Product(operands[0], operands[1], tuple(places.index(label) for label in output))


def transposition(node: fx.Node) -> fx.Node | None:
    """The source of a transposition of the last two dimensions."""
    return node.args[0] if is_call(node, *_TURNS) and swaps(node) else None  # type: ignore[return-value]
