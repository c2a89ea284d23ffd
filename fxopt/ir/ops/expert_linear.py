"""``fxopt::expert_linear``: each token is multiplied with the quantized weight of one of E experts.

    x           (S, K), floating
    experts     (S,) integer: whose weight a token meets; rows of tokens with another number than 0 to E - 1
                are zero, as those that are another rank's
    codes, scales, offsets, format, group_size, activation   as ``fxopt::qlinear`` has them, of a weight
                (E N, K): the matrices of the experts below each other
    count       E

Of ``packed_experts``, which is opaque to the host, as ``packed_linear`` is and for the same reason. On a
processor, and for many tokens, those of an expert are multiplied together. Elsewhere the matrices of few
tokens are picked, so that no number is read from the device.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import fx

from fxopt.ir.contract import Verdict
from fxopt.ir.graph_facts import Facts
from fxopt.ir.ops.op import NAMESPACE, Provider, SemanticOp, define_op, without_autocast
from fxopt.ir.ops.packed_linear import Rounding, is_transformed, per_token, straight_through
from fxopt.ir.quantized_weight import QuantizedWeight
from fxopt.ir.weight_formats import FORMATS

_OPERANDS = "Tensor experts, Tensor codes, Tensor scales, Tensor? offsets"
SCHEMA = f"(Tensor x, {_OPERANDS}, *, int count, str format, int group_size, str activation) -> Tensor"
BACKWARD = (
    f"packed_experts_backward(Tensor grad, {_OPERANDS}, *, int count, str format, int group_size,"
    " int in_features) -> Tensor"
)
_Maybe = torch.Tensor | None


@without_autocast
def packed_experts(
    x: torch.Tensor,
    experts: torch.Tensor,
    codes: torch.Tensor,
    scales: torch.Tensor,
    offsets: _Maybe,
    *,
    count: int,
    format: str,
    group_size: int,
    activation: str,
) -> torch.Tensor:
    """The result (S, N), of the dtype of x."""
    rows = codes.shape[0] // count
    weight = QuantizedWeight(FORMATS[format], x.shape[-1], group_size, codes, scales, offsets)
    if x.device.type != "cpu" and x.shape[0] <= count:
        return picked_product(x, experts, weight, count, activation)
    kinds = {"format": format, "group_size": group_size, "activation": activation}

    def product(tokens: torch.Tensor, of_expert: QuantizedWeight) -> torch.Tensor:
        parts = (of_expert.codes, of_expert.scales, of_expert.offsets, None, None)
        found: torch.Tensor = torch.ops.fxopt.packed_product(tokens, *parts, **kinds)
        return found

    return _by_expert(x, experts, weight, count, rows, product)


def picked_product(
    x: torch.Tensor,
    experts: torch.Tensor,
    weight: QuantizedWeight,
    count: int,
    activation: str,
    rounded: Rounding = per_token,
) -> torch.Tensor:
    """`packed_experts` with a matrix for each token, for few tokens."""
    tokens, rows = x.shape[0], weight.shape[0] // count
    places = experts.clamp(0, count - 1)
    parts = {
        name: each.unflatten(0, (count, rows)).index_select(0, places).flatten(0, 1)
        for name, each in weight.tensors.items()
    }
    computed = torch.promote_types(x.dtype, torch.float32) if activation else x.dtype
    wide = weight.replaced(**parts).dequantize(computed).view(tokens, rows, x.shape[-1])
    out = torch.bmm(wide, rounded(x.to(computed), activation).unsqueeze(-1)).squeeze(-1)
    return out.masked_fill((experts != places).unsqueeze(-1), 0).to(x.dtype)


def _by_expert(
    x: torch.Tensor,
    experts: torch.Tensor,
    weight: QuantizedWeight,
    count: int,
    width: int,
    product: Callable[[torch.Tensor, QuantizedWeight], torch.Tensor],
) -> torch.Tensor:
    """`product` of the tokens of each expert with its matrix, (S, `width`)."""
    rows = weight.shape[0] // count
    known = torch.where((experts >= 0) & (experts < count), experts, count)
    order = known.argsort(stable=True)
    tokens = x.index_select(0, order)
    found = x.new_zeros((x.shape[0], width))
    start = 0
    for expert, number in enumerate(torch.bincount(known, minlength=count + 1).tolist()[:count]):
        if number:
            stop = start + number
            part = weight.rows(expert * rows, (expert + 1) * rows)
            found[start:stop] = product(tokens[start:stop], part)
            start = stop
    return torch.empty_like(found).index_copy_(0, order, found)


@without_autocast
def packed_experts_backward(
    grad: torch.Tensor,
    experts: torch.Tensor,
    codes: torch.Tensor,
    scales: torch.Tensor,
    offsets: _Maybe,
    *,
    count: int,
    format: str,
    group_size: int,
    in_features: int,
) -> torch.Tensor:
    """The gradient with respect to x: of each token, grad @ w of its expert."""
    weight = QuantizedWeight(FORMATS[format], in_features, group_size, codes, scales, offsets)
    kinds = {"format": format, "group_size": group_size, "in_features": in_features}

    def product(rows: torch.Tensor, of_expert: QuantizedWeight) -> torch.Tensor:
        parts = (of_expert.codes, of_expert.scales, of_expert.offsets, None)
        found: torch.Tensor = torch.ops.fxopt.packed_linear_backward(rows, *parts, **kinds)
        return found

    return _by_expert(grad, experts, weight, count, in_features, product)


def _fake(
    x: torch.Tensor, experts: torch.Tensor, codes: torch.Tensor, *_: Any, count: int, **__: Any
) -> torch.Tensor:
    return x.new_empty((x.shape[0], codes.shape[0] // count))


def _fake_backward(grad: torch.Tensor, *_: Any, in_features: int, **__: Any) -> torch.Tensor:
    return grad.new_empty((grad.shape[0], in_features))


def _save(ctx: Any, inputs: Any, keyword_only_inputs: dict[str, Any], output: Any) -> None:
    x, *operands = inputs
    ctx.save_for_backward(*operands)
    ctx.in_features = x.shape[-1]
    ctx.weight = {name: keyword_only_inputs[name] for name in ("count", "format", "group_size")}


def _gradients(ctx: Any, grad: torch.Tensor) -> tuple[Any, ...]:
    of_x = None
    if ctx.needs_input_grad[0]:
        backward = torch.ops.fxopt.packed_experts_backward
        of_x = backward(grad, *ctx.saved_tensors, **ctx.weight, in_features=ctx.in_features)
    return of_x, None, None, None, None


def expert_linear(
    x: torch.Tensor,
    experts: torch.Tensor,
    codes: torch.Tensor,
    scales: torch.Tensor,
    offsets: torch.Tensor | None,
    **attributes: Any,
) -> torch.Tensor:
    """The result (S, N), of the dtype of x."""
    if is_transformed():
        return _in_plain_ops(x, experts, codes, scales, offsets, **attributes)
    out: torch.Tensor = torch.ops.fxopt.packed_experts(x, experts, codes, scales, offsets, **attributes)
    return out


def _in_plain_ops(
    x: torch.Tensor,
    experts: torch.Tensor,
    codes: torch.Tensor,
    scales: torch.Tensor,
    offsets: torch.Tensor | None,
    *,
    count: int,
    format: str,
    group_size: int,
    activation: str,
) -> torch.Tensor:
    """The same for transforms of `torch.func`: no number is read."""
    weight = QuantizedWeight(FORMATS[format], x.shape[-1], group_size, codes, scales, offsets)
    return picked_product(x, experts, weight, count, activation, straight_through)


def _always(_: fx.Node, __: Facts) -> Verdict:
    return Verdict.yes("the tokens of an expert are multiplied together")


EXPERT_LINEAR = SemanticOp(
    name="expert_linear",
    schema=SCHEMA,
    body=expert_linear,
    providers=(Provider("product of experts", _always, expert_linear),),
)


def register(library: torch.library.Library) -> None:
    """Make the op and its gradient known to torch's dispatcher."""
    define_op(library, f"packed_experts{SCHEMA}", packed_experts, _fake)
    define_op(library, BACKWARD, packed_experts_backward, _fake_backward)
    torch.library.register_autograd(
        f"{NAMESPACE}::packed_experts", _gradients, setup_context=_save, lib=library
    )
