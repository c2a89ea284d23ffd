"""What surrounds a softmax in attention: the scores above it, the product with V below it.

Scores are read as ``factor * (Q K^T) + sum of masks``: scalar factors, additive masks and filled masks are
collected in any order of nesting, on either operand; casts and reshapes that keep the rows are seen
through.
"""

from __future__ import annotations

import operator
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import fx

from fxopt.ir import facts
from fxopt.ir.contract import Miss
from fxopt.ir.facts import argument, is_call, is_number, val
from fxopt.ir.ops.masking import LOWEST_SHARE

aten = torch.ops.aten

VIEWS = (aten.view.default, aten.reshape.default, aten._unsafe_view.default)
PRODUCTS = (aten.matmul.default, aten.bmm.default)
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
    def is_positive(self) -> bool:
        """Known to be; of a node nothing is known."""
        return self.number > 0 and not self.over and not self.under

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

    `rank` and `dtype` are those of the scores after the step.
    """

    node: fx.Node
    rank: int
    dtype: torch.dtype
    factor: Factor = Factor()
    fill: float | None = None
    where: bool = True


@dataclass
class Scores:
    """``factor * query @ key^T + masks``; `shape` is the widest view of the scores seen on the way."""

    query: fx.Node
    key_t: fx.Node
    factor: Factor
    product: fx.Node
    masks: list[Mask] = field(default_factory=list)  # the innermost first
    shape: tuple[Any, ...] = ()


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
    step = _step(node, factor)
    if step is None:
        return Miss("scale, mask and casts between QK^T and softmax", str(node.target))
    inner, inner_factor, masks = step
    if len(inner.users) != 1:
        return Miss("scores that only the softmax reads", f"{inner.name} is read {len(inner.users)} times")
    found = read_scores(inner, inner_factor)
    if isinstance(found, Miss):
        return found
    found.masks += masks
    if len(val(node).shape) >= len(found.shape):
        found.shape = tuple(val(node).shape)
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
            return operand, factor, [Mask(mask, val(node).dim(), facts.dtype(node), factor)]
    return None


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
    single = (*VIEWS, *facts.CASTS, aten.div.Tensor, aten.mul.Scalar)
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
    return scores, factor, [Mask(mask, val(node).dim(), facts.dtype(node), fill=fill, where=where)]


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


def _operand(node: Any, factor: Factor) -> tuple[fx.Node, Factor]:
    """Through casts that keep every value and scalar factors of one operand of the product."""
    while isinstance(node, fx.Node):
        if facts.is_float_cast(node) and facts.is_widening(node):
            node = node.args[0]
            continue
        scaled = _scaled(node, factor)
        if scaled is None:
            break
        node, factor = scaled
    return node, factor


def _product(node: fx.Node, factor: Factor) -> Scores | Miss:
    left, right = node.args[0], node.args[1]
    if not facts.is_tensor(left) or not facts.is_tensor(right):
        return Miss("a product of two tensors", node.name)
    if val(left).dim() != val(right).dim() or val(left).dim() not in (3, 4):
        return Miss("Q and K of rank 3 or 4", f"ranks {val(left).dim()} and {val(right).dim()}")
    query, factor = _operand(left, factor)
    key_t, factor = _operand(right, factor)
    return Scores(query, key_t, factor, node, [], tuple(val(node).shape))


def _baddbmm(node: fx.Node, factor: Factor) -> Scores | Miss:
    """beta * input + alpha * (b1 @ b2)."""
    beta, alpha = argument(node, "beta"), argument(node, "alpha")
    if not facts.is_scalar(beta) or not facts.is_scalar(alpha):
        return Miss("beta and alpha that are numbers", f"beta {beta}, alpha {alpha}")
    query, scaled = _operand(node.args[1], factor.times(alpha))
    key_t, scaled = _operand(node.args[2], scaled)
    added = Mask(node.args[0], 3, facts.dtype(node), factor.times(beta))  # type: ignore[arg-type]
    masks = [] if is_number(beta, 0) else [added]
    return Scores(query, key_t, scaled, node, masks, tuple(val(node).shape))


@dataclass(frozen=True)
class Weighted:
    """The product of the probabilities with V. `root` is the last node of the site."""

    root: fx.Node
    value: fx.Node
    dropout_p: float


def read_weighted(softmax: fx.Node) -> Weighted | Miss:
    """Follow the probabilities down to their product with V; nobody else may read them."""
    node, dropout = softmax, 0.0
    while True:
        users = [user for user in node.users if user.op != "output"]
        if len(users) != 1 or len(node.users) != 1:
            return Miss("probabilities that only the product with V reads", _readers(node))
        user = users[0]
        if is_call(user, *PRODUCTS):
            if user.args[0] is not node or user.args[1] is node:
                return Miss("probabilities as left operand", f"{user.name} has them on the right")
            return Weighted(user, user.args[1], dropout)  # type: ignore[arg-type]
        if is_call(user, aten.dropout.default):
            if facts.drops(user):
                if dropout:
                    return Miss("one dropout", "two")
                dropout = float(argument(user, "p"))
        elif not (facts.is_float_cast(user) or (is_call(user, *VIEWS) and keeps_rows(user))):
            return Miss("casts, dropout and the product with V below the softmax", str(user.target))
        node = user


def _readers(node: fx.Node) -> str:
    names = ", ".join("the graph's output" if u.op == "output" else u.name for u in node.users)
    return f"{node.name} is read by {names or 'nobody'}"
