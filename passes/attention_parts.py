"""What scores are made of: factors, masks, and the product of Q and K."""

from __future__ import annotations

import operator
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import fx

from fxopt.ir import facts
from fxopt.ir.facts import val
from fxopt.ir.formula import S
from fxopt.ir.program import ScoreProgram

from .attention_layout import Lead
from .attention_products import Operand


@dataclass(frozen=True)
class Multiplier:
    """A tensor that scores with the lead `at` are multiplied with, or divided by."""

    node: fx.Node
    at: Lead
    divides: bool = False

    @property
    def is_per_matrix(self) -> bool:
        """One number for all the scores of a head: it might as well be a factor of Q."""
        return all(facts.same_size(size, 1) for size in val(self.node).shape[-2:])


@dataclass(frozen=True)
class Factor:
    """A product of numbers, of nodes that hold numbers, some of them in the denominator, and of tensors."""

    number: float = 1.0
    over: tuple[fx.Node, ...] = ()
    under: tuple[fx.Node, ...] = ()
    tensors: tuple[Multiplier, ...] = ()

    def times(self, scalar: Any) -> Factor:
        if isinstance(scalar, fx.Node):
            return replace(self, over=(*self.over, scalar))
        return replace(self, number=self.number * float(scalar))

    def divided(self, scalar: Any) -> Factor:
        if isinstance(scalar, fx.Node):
            return replace(self, under=(*self.under, scalar))
        return replace(self, number=self.number / float(scalar))

    def scaled(self, tensor: Multiplier) -> Factor:
        return replace(self, tensors=(*self.tensors, tensor))

    @property
    def is_one(self) -> bool:
        return self == Factor()

    @property
    def is_number(self) -> bool:
        return not (self.over or self.under or self.tensors)

    @property
    def is_positive(self) -> bool:
        """Known to be; of a node nothing is known."""
        return self.number > 0 and self.is_number

    def build(self, graph: fx.Graph) -> float | fx.Node:
        """The scalars' product, computed at the graph's insertion point where nodes take part."""
        value: float | fx.Node = self.number
        for node in self.over:
            value = node if value == 1.0 else graph.call_function(operator.mul, (node, value))
        for node in self.under:
            value = graph.call_function(operator.truediv, (value, node))
        return value


@dataclass
class Mask:
    """One step of masking: ``factor * node`` is added, or `fill` replaces where `node` (bool) is `where`.

    `lead` and `dtype` are those of the scores after the step.
    """

    node: fx.Node
    lead: Lead
    dtype: torch.dtype
    factor: Factor = Factor()
    fill: float | None = None
    where: bool = True


@dataclass
class Scores:
    """``score(factor * query @ key^T) + masks``.

    `product` is the node of the product, `lead` the widest one that the scores are viewed with on the way.
    """

    query: Operand
    key: Operand
    factor: Factor
    product: fx.Node
    masks: list[Mask] = field(default_factory=list)  # the innermost first
    score: ScoreProgram = ScoreProgram(S)
    lead: Lead = ()
    floored: bool = False  # raised to the lowest number where it would be below

    @property
    def product_lead(self) -> Lead:
        return tuple(val(self.product).shape[:-2])


def keeps_rows(node: fx.Node) -> bool:
    """A view of a batch of matrices as another batch of the same matrices."""
    before, after = val(node.args[0]), val(node)
    return before.dim() >= 2 and after.dim() >= 2 and facts.same_shape(before.shape[-2:], after.shape[-2:])


def seen(node: fx.Node) -> str:
    """An operation, and where the user wrote it."""
    return f"{node.target} ({facts.location(node)})"


def readers(node: fx.Node) -> str:
    """A value and those who read it, and where the user wrote it."""
    names = ", ".join("the graph's output" if user.op == "output" else user.name for user in node.users)
    return f"{node.name} is read by {names or 'nobody'} ({facts.location(node)})"
