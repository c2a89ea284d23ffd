"""``fxopt::rms_norm``, ``fxopt::add_rms_norm``: x / sqrt(mean(x^2) + eps) * weight, as the model casts."""

from __future__ import annotations

import torch

from fxopt.ir.ops.op import SemanticOp


def rms_norm(
    x: torch.Tensor,
    weight: torch.Tensor | None,
    eps: float,
    *,
    weight_offset: float,
    compute_dtype: torch.dtype,
    norm_dtype: torch.dtype,
    weight_dtype: torch.dtype,
    out_dtype: torch.dtype,
) -> torch.Tensor:
    """Root-mean-square norm over the last dimension.

    Args:
        x: (..., N).
        weight: (N,) or None.
        eps: added to the mean square.
        weight_offset: added to the weight; 1 in the Gemma family.
        compute_dtype: dtype of the squares, their mean and the normalized value.
        norm_dtype: what the normalized value is cast to before the weight.
        weight_dtype: what the weight is cast to before its offset and the product.
        out_dtype: dtype of the result.

    Returns:
        (..., N), of `out_dtype`.

    Source: Zhang and Sennrich, "Root Mean Square Layer Normalization", 2019, eq. 4.
    """
    wide = x.to(compute_dtype)
    scale = torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + eps)
    normed = (wide * scale).to(norm_dtype)
    if weight is None:
        return normed.to(out_dtype)
    factor = weight.to(weight_dtype)
    if weight_offset:
        factor = factor + weight_offset
    return (normed * factor).to(out_dtype)


def add_rms_norm(
    x: torch.Tensor,
    residual: torch.Tensor,
    weight: torch.Tensor | None,
    eps: float,
    *,
    weight_offset: float,
    compute_dtype: torch.dtype,
    norm_dtype: torch.dtype,
    weight_dtype: torch.dtype,
    out_dtype: torch.dtype,
) -> tuple[torch.Tensor, torch.Tensor]:
    """`rms_norm` of ``x + residual``; returns (the norm, the sum)."""
    total = x + residual
    normed = rms_norm(
        total,
        weight,
        eps,
        weight_offset=weight_offset,
        compute_dtype=compute_dtype,
        norm_dtype=norm_dtype,
        weight_dtype=weight_dtype,
        out_dtype=out_dtype,
    )
    return normed, total


_CASTS = (
    "*, float weight_offset, ScalarType compute_dtype, ScalarType norm_dtype, ScalarType weight_dtype, "
    "ScalarType out_dtype"
)

RMS_NORM = SemanticOp(
    name="rms_norm",
    schema=f"(Tensor x, Tensor? weight, Scalar eps, {_CASTS}) -> Tensor",
    body=rms_norm,
)

ADD_RMS_NORM = SemanticOp(
    name="add_rms_norm",
    schema=f"(Tensor x, Tensor residual, Tensor? weight, Scalar eps, {_CASTS}) -> (Tensor, Tensor)",
    body=add_rms_norm,
)
