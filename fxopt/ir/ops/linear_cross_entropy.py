"""``fxopt::linear_cross_entropy``: the cross-entropy of softcap(scale * (hidden weight^T + bias)).

    hidden           (..., H)
    weight           (V, H), and bias (V,) or None
    target           (...) int64, indices of the vocabulary
    reduction        as in `Reduction`; the mean is over the targets that are not ignored
    ignore_index     the target of rows that have no loss and no gradient
    label_smoothing  the part of the target that is spread over the vocabulary
    scale, softcap   z = softcap * tanh(scale * logits / softcap); a softcap of 0 is none
    compute_dtype    of the logits and what follows: float32 or float64
    out_dtype        of the result
    recompute        the backward computes the logits again, instead of the forward the gradients

It is made of ops that stay whole until they run, as the number of chunks may change from call to call. What
the losses are multiplied with later is one number unless they are returned one by one, so the gradients are
computed with the loss, but for that number: no product is computed twice (Hsu et al., "Liger Kernel", 2024,
section 3.2). Whose gradients are wanted shows only where autograd runs: `cross_entropy_total` stands in the
graph until then.
"""

from __future__ import annotations

from typing import Any

import torch

from fxopt.ir.ops.cross_entropy_chunks import Loss, Operands, Wanted, in_chunks
from fxopt.ir.ops.op import NAMESPACE, SemanticOp, define_op, without_autocast

NONE, MEAN, SUM = range(3)  # as ATen numbers reductions

_OPERANDS = "Tensor hidden, Tensor weight, Tensor? bias, Tensor target"
_ATTRIBUTES = "int ignore_index, float label_smoothing, float scale, float softcap, ScalarType compute_dtype"
_WANTED = "bool[] wanted"

TOTAL = f"cross_entropy_total({_OPERANDS}, *, {_ATTRIBUTES}) -> Tensor"
WITH_GRADIENTS = (
    f"cross_entropy_with_gradients({_OPERANDS}, *, {_ATTRIBUTES}, {_WANTED}) "
    "-> (Tensor, Tensor, Tensor, Tensor)"
)
ROWS = f"cross_entropy_rows({_OPERANDS}, *, {_ATTRIBUTES}) -> Tensor"
ROWS_BACKWARD = (
    f"cross_entropy_rows_backward(Tensor grad, {_OPERANDS}, *, {_ATTRIBUTES}, {_WANTED}) "
    "-> (Tensor, Tensor, Tensor)"
)


def linear_cross_entropy(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    target: torch.Tensor,
    *,
    reduction: int,
    ignore_index: int,
    out_dtype: torch.dtype,
    recompute: bool,
    **attributes: Any,
) -> torch.Tensor:
    """The loss: a scalar, or of the shape of `target` without reduction. See the top of the file."""
    rows = (hidden.reshape(-1, hidden.shape[-1]), weight, bias, target.reshape(-1))
    attributes["ignore_index"] = ignore_index
    if reduction == NONE:
        losses = torch.ops.fxopt.cross_entropy_rows(*rows, **attributes)
        return losses.view(target.shape).to(out_dtype)  # type: ignore[no-any-return]
    if recompute:
        total = torch.ops.fxopt.cross_entropy_rows(*rows, **attributes).sum()
    else:
        total = torch.ops.fxopt.cross_entropy_total(*rows, **attributes)
    if reduction == MEAN:
        count = (rows[3] != ignore_index).sum()
        # Of no rows the mean is NaN and the gradients are 0, which a division by 0 would make NaN as well.
        mean = total / count.clamp(min=1)
        total = torch.where(count > 0, mean, torch.full_like(mean, torch.nan))
    return total.to(out_dtype)  # type: ignore[no-any-return]


LINEAR_CROSS_ENTROPY = SemanticOp(
    name="linear_cross_entropy",
    schema=(
        f"({_OPERANDS}, *, int reduction, {_ATTRIBUTES}, ScalarType out_dtype, bool recompute) -> Tensor"
    ),
    body=linear_cross_entropy,
)


def _loss(attributes: dict[str, Any]) -> Loss:
    return Loss(dtype=attributes.pop("compute_dtype"), **attributes)


@without_autocast
def cross_entropy_total(
    hidden: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, target: torch.Tensor, **given: Any
) -> torch.Tensor:
    """The sum of the losses."""
    recorded = torch.is_grad_enabled()
    wanted = [recorded and each is not None and each.requires_grad for each in (hidden, weight, bias)]
    operands = (hidden, weight, bias, target)
    total: torch.Tensor
    if any(wanted):
        total, *_ = torch.ops.fxopt.cross_entropy_with_gradients(*operands, **given, wanted=wanted)
    else:
        total = torch.ops.fxopt.cross_entropy_rows(*operands, **given).sum()
    return total


@without_autocast
def cross_entropy_with_gradients(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    target: torch.Tensor,
    *,
    wanted: list[bool],
    **attributes: Any,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """The sum of the losses and its gradients, empty where not wanted."""
    losses, *gradients = in_chunks(Operands(hidden, weight, bias, target), _loss(attributes), Wanted(*wanted))
    return losses.sum(), *gradients  # type: ignore[return-value]


@without_autocast
def cross_entropy_rows(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    target: torch.Tensor,
    **attributes: Any,
) -> torch.Tensor:
    """The losses (N,), 0 where ignored."""
    return in_chunks(Operands(hidden, weight, bias, target), _loss(attributes), Wanted())[0]


@without_autocast
def cross_entropy_rows_backward(
    grad: torch.Tensor,
    hidden: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    target: torch.Tensor,
    *,
    wanted: list[bool],
    **attributes: Any,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """The gradients of sum(grad * losses), empty where not wanted."""
    given = Operands(hidden, weight, bias, target)
    return in_chunks(given, _loss(attributes), Wanted(*wanted), grad)[1:]


def _fake_gradients(
    hidden: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, *, compute_dtype: torch.dtype,
    wanted: list[bool], **_: Any,
) -> tuple[torch.Tensor, ...]:  # fmt: skip
    return tuple(
        torch.empty_like(each, dtype=compute_dtype) if asked and each is not None
        else hidden.new_empty(0, dtype=compute_dtype)
        for each, asked in zip((hidden, weight, bias), wanted, strict=True)
    )  # fmt: skip


def _fake_with_gradients(
    hidden: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, _: torch.Tensor, **given: Any
) -> tuple[torch.Tensor, ...]:
    return hidden.new_empty((), dtype=given["compute_dtype"]), *_fake_gradients(hidden, weight, bias, **given)


def _fake_rows(hidden: torch.Tensor, *_: Any, compute_dtype: torch.dtype, **__: Any) -> torch.Tensor:
    return hidden.new_empty(hidden.shape[0], dtype=compute_dtype)


def _fake_rows_backward(
    _: torch.Tensor, hidden: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None,
    __: torch.Tensor, **given: Any,
) -> tuple[torch.Tensor, ...]:  # fmt: skip
    return _fake_gradients(hidden, weight, bias, **given)


def _save_gradients(ctx: Any, inputs: Any, keyword_only_inputs: dict[str, Any], output: Any) -> None:
    ctx.wanted = keyword_only_inputs["wanted"]
    ctx.dtypes = [each.dtype if each is not None else None for each in inputs[:3]]
    ctx.save_for_backward(*(each for each, asked in zip(output[1:], ctx.wanted, strict=True) if asked))
    ctx.mark_non_differentiable(*output[1:])


def _scaled(ctx: Any, grad: torch.Tensor, *_: Any) -> tuple[torch.Tensor | None, ...]:
    saved = iter(ctx.saved_tensors)
    found = [
        (next(saved) * grad).to(dtype) if asked else None
        for asked, dtype in zip(ctx.wanted, ctx.dtypes, strict=True)
    ]
    return *found, None


def _save_operands(ctx: Any, inputs: Any, keyword_only_inputs: dict[str, Any], output: Any) -> None:
    ctx.attributes = dict(keyword_only_inputs)
    ctx.save_for_backward(*inputs)


def _recomputed(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
    given = ctx.saved_tensors
    wanted = list(ctx.needs_input_grad[:3])
    found = torch.ops.fxopt.cross_entropy_rows_backward(grad, *given, **ctx.attributes, wanted=wanted)
    return *(
        each.to(like.dtype) if asked else None
        for each, like, asked in zip(found, given[:3], wanted, strict=True)
    ), None


def register(library: torch.library.Library) -> None:
    """Make the ops that `linear_cross_entropy` is made of known to torch's dispatcher."""
    library.define(TOTAL)
    library.impl("cross_entropy_total", cross_entropy_total, "CompositeImplicitAutograd")
    for schema, body, fake in (
        (WITH_GRADIENTS, cross_entropy_with_gradients, _fake_with_gradients),
        (ROWS, cross_entropy_rows, _fake_rows),
        (ROWS_BACKWARD, cross_entropy_rows_backward, _fake_rows_backward),
    ):
        define_op(library, schema, body, fake)
    for name, gradients, save in (
        ("cross_entropy_with_gradients", _scaled, _save_gradients),
        ("cross_entropy_rows", _recomputed, _save_operands),
    ):
        torch.library.register_autograd(f"{NAMESPACE}::{name}", gradients, setup_context=save, lib=library)
