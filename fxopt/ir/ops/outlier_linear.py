"""``fxopt::outlier_linear``: x @ w^T + bias with int8 weights, and features of x with a large entry apart.

A feature with an entry of at least `threshold` in any token would cost all others of that token their
precision: it keeps its own. Dettmers et al., "LLM.int8()", 2022, section 3.2. No number is read from a
device: there, both products are of all features. On a processor the features are picked.

    x                 (..., K), floating
    codes, scales     int8 (N, K) and (N, 1), as `fxopt.ir.quantized_weight` has them
    bias              (N,) or None

A composite of ``packed_outliers``, which is opaque to the host as ``packed_linear`` is, for the same reason.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from fxopt.ir.ops.op import NAMESPACE, define_op, without_autocast
from fxopt.ir.ops.packed_linear import differentiable, is_transformed

SCHEMA = "(Tensor x, Tensor codes, Tensor scales, Tensor? bias, *, float threshold) -> Tensor"
_INT8 = {"format": "int8", "activation": "int8"}


@without_autocast
def outlier_linear(
    x: torch.Tensor,
    codes: torch.Tensor,
    scales: torch.Tensor,
    bias: torch.Tensor | None,
    *,
    threshold: float,
) -> torch.Tensor:
    """The result (..., N), of the dtype of x."""
    if not is_transformed():
        found: torch.Tensor = torch.ops.fxopt.packed_outliers(x, codes, scales, bias, threshold=threshold)
        return found
    return _of_all_features(x, codes, scales, bias, _apart(x, threshold), differentiable)


def _of_all_features(
    x: torch.Tensor,
    codes: torch.Tensor,
    scales: torch.Tensor,
    bias: torch.Tensor | None,
    apart: torch.Tensor,
    product: Callable[..., torch.Tensor],
) -> torch.Tensor:
    """The sum of both products, without reading which features are apart."""
    weight, group = (codes, scales, None, None), x.shape[-1]
    rounded = product(x.masked_fill(apart, 0), *weight, bias, group_size=group, **_INT8)
    rest = x.masked_fill(apart.logical_not(), 0)
    return rounded + product(rest, *weight, None, group_size=group, format="int8", activation="")


def _apart(x: torch.Tensor, threshold: float) -> torch.Tensor:
    """Which features (K,) have a large entry."""
    return (x.abs() >= threshold).reshape(-1, x.shape[-1]).any(0)


@without_autocast
def packed_outliers(
    x: torch.Tensor,
    codes: torch.Tensor,
    scales: torch.Tensor,
    bias: torch.Tensor | None,
    *,
    threshold: float,
) -> torch.Tensor:
    """The same."""
    group, product = x.shape[-1], torch.ops.fxopt.packed_linear
    apart = _apart(x, threshold)
    if x.device.type != "cpu":
        return _of_all_features(x, codes, scales, bias, apart, product)
    parts = (codes, scales, None, None, bias)
    if not apart.any():
        found: torch.Tensor = product(x, *parts, group_size=group, **_INT8)
        return found
    rounded: torch.Tensor = product(x.masked_fill(apart, 0), *parts, group_size=group, **_INT8)
    places = apart.nonzero().flatten()
    part = codes.index_select(1, places).to(x.dtype) * scales.to(x.dtype)
    return rounded + torch.nn.functional.linear(x.index_select(-1, places), part)


def _fake(x: torch.Tensor, codes: torch.Tensor, *_: Any, **__: Any) -> torch.Tensor:
    return x.new_empty((*x.shape[:-1], codes.shape[0]))


def _save(ctx: Any, inputs: Any, keyword_only_inputs: dict[str, Any], output: Any) -> None:
    x, codes, scales, bias = inputs
    ctx.save_for_backward(codes, scales)
    ctx.in_features = x.shape[-1]
    ctx.bias_dtype = None if bias is None else bias.dtype


def _gradients(ctx: Any, grad: torch.Tensor) -> tuple[Any, ...]:
    of_x = of_bias = None
    codes, scales = ctx.saved_tensors
    if ctx.needs_input_grad[0]:
        of_x = torch.ops.fxopt.packed_linear_backward(
            grad, codes, scales, None, None,
            format="int8", group_size=ctx.in_features, in_features=ctx.in_features,
        )  # fmt: skip
    if ctx.bias_dtype is not None and ctx.needs_input_grad[3]:
        of_bias = grad.flatten(0, -2).sum(0, dtype=torch.float32).to(ctx.bias_dtype)
    return of_x, None, None, of_bias


def register(library: torch.library.Library) -> None:
    """Make the ops and their gradient known to torch's dispatcher."""
    library.define(f"outlier_linear{SCHEMA}")
    library.impl("outlier_linear", outlier_linear, "CompositeImplicitAutograd")
    define_op(library, f"packed_outliers{SCHEMA}", packed_outliers, _fake)
    torch.library.register_autograd(
        f"{NAMESPACE}::packed_outliers", _gradients, setup_context=_save, lib=library
    )
