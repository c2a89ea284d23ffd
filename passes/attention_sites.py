"""What is above a softmax in attention: the scores, read down to the product of Q and K.

Scores are read as ``score(factor * Q K^T) + sum of masks``: scalar factors, additive masks and filled masks
are collected in any order of nesting, on either operand; casts and reshapes that keep the rows are seen
through.
"""

from __future__ import annotations

import operator
from dataclasses import dataclass, field, replace
from typing import Any

import sympy
import torch
from torch import fx

from fxopt.ir import facts
from fxopt.ir.contract import Miss
from fxopt.ir.facts import argument, is_call, is_number, val
from fxopt.ir.formula import S
from fxopt.ir.ops.masking import LOWEST_SHARE
from fxopt.ir.program import ScoreProgram

from .attention_layout import Lead
from .attention_products import PRODUCTS, Operand, read_product

aten = torch.ops.aten

VIEWS = (aten.view.default, aten.reshape.default, aten._unsafe_view.default)
# What a trace makes of ``torch.tensor(number)``.
_LITERALS = (aten.lift_fresh_copy.default, aten.lift_fresh.default, aten.detach_.default, aten.detach.default)


@dataclass(frozen=True)
class Factor:
    """A product of numbers and of nodes that hold numbers, some of them in the denominator."""

    number: float = 1.0
    over: tuple[fx.Node, ...] = ()
    under: tuple[fx.Node, ...] = ()

    def times(self, scalar: Any) -> Factor:
        if isinstance(scalar, fx.Node):
            return replace(self, over=(*self.over, scalar))
        return replace(self, number=self.number * float(scalar))

    def divided(self, scalar: Any) -> Factor:
        if isinstance(scalar, fx.Node):
            return replace(self, under=(*self.under, scalar))
        return replace(self, number=self.number / float(scalar))

    @property
    def is_one(self) -> bool:
        return self == Factor()

    @property
    def is_number(self) -> bool:
        return not self.over and not self.under

    @property
    def is_positive(self) -> bool:
        """Known to be; of a node nothing is known."""
        return self.number > 0 and self.is_number

    def build(self, graph: fx.Graph) -> float | fx.Node:
        """The value, computed at the graph's insertion point where nodes take part."""
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

    @property
    def product_lead(self) -> Lead:
        return tuple(val(self.product).shape[:-2])


def read_scores(node: fx.Node, factor: Factor = Factor()) -> Scores | Miss:  # noqa: B008 - immutable
    """Read the input of a softmax. Each value on the way must have no other reader."""
    if node.op != "call_function" or not facts.is_tensor(node):
        return Miss(
            "a product of Q and K above the softmax", node.op if node.op != "call_function" else node.name
        )
    if is_call(node, *PRODUCTS):
        return _product(node, factor)
    if is_call(node, aten.baddbmm.default):
        return _baddbmm(node, factor)
    if is_call(node, aten.tanh.default):
        return _capped(node, factor)
    step = _step(node, factor)
    if step is None:
        return Miss("scale, mask and casts between QK^T and softmax", seen(node))
    inner, inner_factor, masks = step
    found = _read_below(inner, inner_factor)
    if isinstance(found, Miss):
        return found
    found.masks += masks
    lead = tuple(val(node).shape[:-2])
    if len(lead) >= len(found.lead):
        found.lead = lead
    return found


def _read_below(inner: fx.Node, factor: Factor) -> Scores | Miss:
    if len(inner.users) != 1:
        return Miss("scores that only the softmax reads", f"{inner.name} is read {len(inner.users)} times")
    return read_scores(inner, factor)


def seen(node: fx.Node) -> str:
    """An operation, and where the user wrote it."""
    return f"{node.target} ({facts.location(node)})"


def _capped(node: fx.Node, factor: Factor) -> Scores | Miss:
    """``factor * tanh(scores)``, which is c * tanh(s / c) for c = factor and s = c * scores."""
    if not factor.is_number or factor.number == 0:
        return Miss("a softcap that is a number", f"{factor} ({facts.location(node)})")
    found = _read_below(node.args[0], Factor())  # type: ignore[arg-type]
    if isinstance(found, Miss):
        return found
    if found.masks:
        return Miss("a softcap of scores without a mask", f"a mask inside of {seen(node)}")
    if found.score != ScoreProgram(S):
        return Miss("one softcap", f"another in {seen(node)}")
    cap = (
        sympy.nsimplify(abs(factor.number)) if factor.number.is_integer() else sympy.Float(abs(factor.number))
    )
    found.score = ScoreProgram(cap * sympy.tanh(S / cap))
    found.factor = found.factor.times(factor.number)
    return found


Step = tuple[fx.Node, Factor, list[Mask]]


def _step(node: fx.Node, factor: Factor) -> Step | None:
    """One operation between the product and the softmax: what is under it, its factor, the masks it adds."""
    if facts.is_float_cast(node):
        return node.args[0], factor, []  # type: ignore[return-value]
    if is_call(node, *VIEWS) and keeps_rows(node):
        return node.args[0], factor, []  # type: ignore[return-value]
    scaled = _scaled(node, factor)
    if scaled is not None:
        return *scaled, []
    if is_call(node, aten.add.Tensor):
        return _addition(node, factor)
    return _filled(node, factor)


def keeps_rows(node: fx.Node) -> bool:
    before, after = val(node.args[0]), val(node)
    return before.dim() >= 2 and after.dim() >= 2 and facts.same_shape(before.shape[-2:], after.shape[-2:])


def _scaled(node: fx.Node, factor: Factor) -> tuple[fx.Node, Factor] | None:
    """The operand of a product with, or a quotient by, a number; and `factor` with that number in it."""
    if is_call(node, aten.mul.Tensor, aten.mul.Scalar):
        for operand, number in facts.commuted(node):
            if facts.is_tensor(operand) and facts.is_scalar(number):
                return operand, factor.times(number)
    divides = is_call(node, aten.div.Tensor, aten.div.Scalar)
    if divides and facts.is_scalar(node.args[1]) and node.args[1] != 0:
        return node.args[0], factor.divided(node.args[1])  # type: ignore[return-value]
    return None


def _addition(node: fx.Node, factor: Factor) -> Step | None:
    """The operand that leads to the product, and the other one as a mask."""
    if not is_number(argument(node, "alpha"), 1):
        return None
    for operand, mask in facts.commuted(node):
        if facts.is_tensor(operand) and facts.is_floating(mask) and _leads_to_product(operand):
            if not facts.same_shape(val(operand).shape, val(node).shape):
                return None
            return operand, factor, [_mask(mask, node, factor=factor)]
    return None


def _mask(mask: fx.Node, after: fx.Node, **more: Any) -> Mask:
    return Mask(mask, tuple(val(after).shape[:-2]), facts.dtype(after), **more)


def _leads_to_product(node: Any, depth: int = 12) -> bool:
    """A cheap look upwards: Q K^T can be reached through single readers."""
    if depth == 0 or not isinstance(node, fx.Node) or len(node.users) != 1:
        return False
    if is_call(node, *PRODUCTS, aten.baddbmm.default):
        return True
    if is_call(node, aten.add.Tensor, aten.mul.Tensor):
        return any(_leads_to_product(arg, depth - 1) for arg in node.args[:2])
    filled = _fill_of(node)
    if filled is not None:
        return _leads_to_product(filled[0], depth - 1)
    single = (*VIEWS, *facts.CASTS, aten.div.Tensor, aten.mul.Scalar, aten.tanh.default)
    return is_call(node, *single) and _leads_to_product(node.args[0], depth - 1)


def _filled(node: fx.Node, factor: Factor) -> Step | None:
    """``masked_fill(scores, mask, fill)`` and ``where(mask, scores, fill)``, either way around."""
    read = _fill_of(node)
    if read is None or not all(facts.is_tensor(each) for each in read[:2]):
        return None
    scores, mask, fill, where = read
    if not is_absorbing(fill, facts.dtype(scores)) or not factor.is_positive:
        return None
    if not facts.same_shape(val(scores).shape, val(node).shape):
        return None
    return scores, factor, [_mask(mask, node, fill=fill, where=where)]


def _fill_of(node: fx.Node) -> tuple[Any, Any, float, bool] | None:
    """(scores, mask, fill, where): the fill replaces where the mask is `where`."""
    if is_call(node, aten.masked_fill.Scalar, aten.masked_fill.Tensor):
        scores, mask, fill = node.args[:3]
        return (scores, mask, float(constant(fill)), True) if is_number(constant(fill)) else None
    if not is_call(node, aten.where.ScalarOther, aten.where.ScalarSelf, aten.where.self):
        return None
    mask, first, second = node.args[:3]
    if is_number(constant(second)):
        return first, mask, float(constant(second)), False
    return (second, mask, float(constant(first)), True) if is_number(constant(first)) else None


def is_absorbing(fill: float, dtype: torch.dtype) -> bool:
    """So low that adding a score does not change it: to fill with it is to add it."""
    return fill <= torch.finfo(dtype).min * LOWEST_SHARE


def constant(node: Any) -> Any:
    """The number that a node is known to be, made by `full` or a tensor of one literal; else the node."""
    if not isinstance(node, fx.Node) or not facts.is_tensor(node) or val(node).dim() > 0:
        return node
    if is_call(node, aten.full.default, aten.scalar_tensor.default):
        return node.args[1] if is_call(node, aten.full.default) else node.args[0]
    if is_call(node, *_LITERALS, *facts.CASTS):
        return constant(node.args[0])
    held = getattr(node.graph.owning_module, str(node.target), None) if node.op == "get_attr" else None
    return held.item() if type(held) is torch.Tensor and len(node.users) == 1 else node


def _operand(operand: Operand, factor: Factor) -> tuple[Operand, Factor]:
    """Through casts that keep every value and scalar factors of one operand of the product."""
    node: Any = operand.node
    while isinstance(node, fx.Node):
        if facts.is_float_cast(node) and facts.is_widening(node):
            node = node.args[0]
            continue
        scaled = _scaled(node, factor)
        if scaled is None:
            break
        node, factor = scaled
    return replace(operand, node=node), factor


def _product(node: fx.Node, factor: Factor) -> Scores | Miss:
    found = read_product(node)
    if isinstance(found, Miss):
        return found
    if not found.is_ordered:
        return Miss("scores with queries as rows and keys as columns, last", seen(node))
    query, factor = _operand(found.left, factor)
    key, factor = _operand(found.right, factor)
    return Scores(query, key, factor, node, lead=tuple(val(node).shape[:-2]))


def _baddbmm(node: fx.Node, factor: Factor) -> Scores | Miss:
    """beta * input + alpha * (b1 @ b2)."""
    beta, alpha = argument(node, "beta"), argument(node, "alpha")
    if not facts.is_scalar(beta) or not facts.is_scalar(alpha):
        return Miss("beta and alpha that are numbers", f"beta {beta}, alpha {alpha}")
    own = (0, 1, 2)
    query, scaled = _operand(Operand(node.args[1], own), factor.times(alpha))  # type: ignore[arg-type]
    key, scaled = _operand(Operand(node.args[2], own).transposed, scaled)  # type: ignore[arg-type]
    lead = tuple(val(node).shape[:-2])
    added = Mask(node.args[0], lead, facts.dtype(node), factor.times(beta))  # type: ignore[arg-type]
    return Scores(query, key, scaled, node, [] if is_number(beta, 0) else [added], lead=lead)
