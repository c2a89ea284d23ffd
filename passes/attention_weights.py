"""What is below a softmax in attention: casts, dropout, zeros in the place of probabilities, and the product
with V.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import fx

from fxopt.ir import facts
from fxopt.ir.contract import Miss
from fxopt.ir.facts import argument, is_call, val

from .attention_layout import Lead
from .attention_parts import keeps_rows, readers, seen
from .attention_products import PRODUCTS, Operand, Product, read_product, transposition
from .attention_steps import VIEWS, read_fill
from .transpositions import swap

aten = torch.ops.aten


@dataclass(frozen=True)
class Weighted:
    """The product of the probabilities with V. `root` is the last node of the site.

    `lead` is that of the probabilities in the product; `sliced` says that they lose their last column first,
    `guarded` that those which are NaN become 0.
    """

    root: fx.Node
    value: Operand
    lead: Lead
    order: tuple[int, ...]
    dropout_p: float = 0.0
    sliced: bool = False
    zeroed: Zeroed | None = None
    guarded: bool = False


@dataclass(frozen=True)
class Zeroed:
    """Probabilities that are set to 0 where `condition` is `where`."""

    condition: fx.Node
    where: bool


def read_weighted(softmax: fx.Node) -> Weighted | Miss:
    """Follow the probabilities down to their product with V; nobody else may read them."""
    node, dropout, sliced, zeroed, guarded = softmax, 0.0, False, None, False
    turned = False  # the probabilities have keys as rows
    while True:
        guard = _without_nan(node)
        if guard is not None:
            node, guarded = guard, True
            continue
        users = [user for user in node.users if user.op != "output"]
        if len(users) != 1 or len(node.users) != 1:
            return Miss("probabilities that only the product with V reads", readers(node))
        user = users[0]
        if is_call(user, *PRODUCTS):
            found = _product(user, node, turned)
            if isinstance(found, Miss):
                return found
            return replace(found, dropout_p=dropout, sliced=sliced, zeroed=zeroed, guarded=guarded)
        if transposition(user) is node:
            turned = not turned
        elif facts.drops(user):
            if dropout:
                return Miss("one dropout", "two")
            dropout = float(argument(user, "p"))
        elif _drops_last(user) and not (dropout or sliced or turned):
            sliced = True
        elif _zeroed(user, node) is not None and not (dropout or sliced or zeroed or turned):
            zeroed = _zeroed(user, node)
        elif not (
            is_call(user, aten.dropout.default, *KEEPING)
            or facts.is_float_cast(user)
            or (is_call(user, *VIEWS) and keeps_rows(user))
        ):
            return Miss("casts, dropout and the product with V below the softmax", seen(user))
        node = user


def _without_nan(weights: fx.Node) -> fx.Node | None:
    """What reads nothing but `weights`, as their only reader, and gives them with 0 for NaN."""
    for user in weights.users:
        others = {each for each in user.all_input_nodes if weights in each.all_input_nodes}
        alone = set(weights.users) == {user, *others} and all(set(each.users) == {user} for each in others)
        if alone and (_replaces_nan(user, weights) or _fills_nan(user, weights)):
            return user
    return None


def _replaces_nan(node: fx.Node, weights: fx.Node) -> bool:
    """Infinities do not occur."""
    return is_call(node, aten.nan_to_num.default) and argument(node, "nan") in (None, 0)


def _fills_nan(node: fx.Node, weights: fx.Node) -> bool:
    """``weights.masked_fill(weights.isnan(), 0)``, or the same by `where`."""
    fill = read_fill(node)
    if fill is not None:
        source, condition, number, where = fill
    elif is_call(node, aten.where.self) and is_call(node.args[1], *ZEROS):
        condition, _, source = node.args
        number, where = 0.0, True
    else:
        return False
    is_nan = is_call(condition, aten.isnan.default) or (
        is_call(condition, aten.ne.Tensor) and condition.args[1] is weights
    )
    return is_nan and where and number == 0 and source is weights and condition.args[0] is weights


ZEROS = (aten.zeros_like.default, aten.new_zeros.default, aten.zeros.default)
KEEPING = (aten.contiguous.default, aten.clone.default)


def _drops_last(node: fx.Node) -> bool:
    """``x[..., :-1]``"""
    if not is_call(node, aten.slice.Tensor) or not facts.is_last_dim(node, argument(node, "dim")):
        return False
    plain = argument(node, "start") in (None, 0) and argument(node, "step") == 1
    return plain and facts.same_size(val(node).shape[-1], val(node.args[0]).shape[-1] - 1)


def _zeroed(node: fx.Node, weights: fx.Node) -> Zeroed | None:
    fill = read_fill(node)
    if fill is None or fill[0] is not weights or fill[2] != 0 or not facts.is_tensor(fill[1]):
        return None
    keeps = facts.same_shape(val(node).shape, val(weights).shape)
    return Zeroed(fill[1], fill[3]) if keeps else None


def _product(node: fx.Node, weights: fx.Node, turned: bool) -> Weighted | Miss:
    """`turned`: the last two dimensions of `weights` are keys and queries, not queries and keys."""
    found = read_product(node, weights)
    if isinstance(found, Miss):
        return found
    if found.right.node is weights:
        found = found.swapped
    if found.left.node is not weights or found.right.node is weights:
        return Miss("a product of probabilities with V", f"{node.name} multiplies them with themselves")
    rank = val(weights).dim()
    if found.left.order != (swap(rank) if turned else tuple(range(rank))):
        return Miss("a product with V over the last dimension of the probabilities", seen(node))
    lead = tuple(val(weights).shape[:-2])
    if not facts.same_shape(lead, _result_lead(found, node)):
        return Miss("a product with V of the probabilities' batch", seen(node))
    return Weighted(node, found.right.transposed, lead, found.order)


def _result_lead(found: Product, node: fx.Node) -> list[Any]:
    sizes: dict[int, Any] = dict(zip(found.order, val(node).shape, strict=True))
    return [sizes[place] for place in range(len(found.order) - 2)]
