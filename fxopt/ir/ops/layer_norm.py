"""``fxopt::layer_norm``: (x - mean) / sqrt(var + eps) * weight + bias, with the model's own casts."""

from __future__ import annotations

import torch

from fxopt.ir.ops.op import SemanticOp, is_symbol


def layer_norm(
    x: torch.Tensor,
    weight: torch.Tensor | None,
    bias: torch.Tensor | None,
    eps: float,
    *,
    compute_dtype: torch.dtype,
    norm_dtype: torch.dtype,
    out_dtype: torch.dtype,
) -> torch.Tensor:
    """Layer norm over the last dimension, with the population variance.

    Args:
        x: (..., N).
        weight: (N,) or None; multiplied in its own dtype.
        bias: (N,) or None; added in its own dtype.
        eps: added to the variance.
        compute_dtype: dtype of mean, variance and normalized value.
        norm_dtype: what the normalized value is cast to before weight and bias.
        out_dtype: dtype of the result.

    Returns:
        (..., N), of `out_dtype`.

    Source: Ba, Kiros and Hinton, "Layer Normalization", 2016, eq. 3 and 4.
    """
    normed = _standardized(x.to(compute_dtype), eps).to(norm_dtype)
    if weight is not None:
        normed = normed * weight
    if bias is not None:
        normed = normed + bias
    return normed.to(out_dtype)


def _standardized(x: torch.Tensor, eps: float) -> torch.Tensor:
    if not is_symbol(eps):
        return torch.nn.functional.layer_norm(x, (x.shape[-1],), None, None, eps)
    # The op takes no symbol: it would make a guard of the number, and a recompile of each of its values.
    centred = x - x.mean(-1, keepdim=True)
    return centred * torch.rsqrt(centred.pow(2).mean(-1, keepdim=True) + eps)


LAYER_NORM = SemanticOp(
    name="layer_norm",
    schema=(
        "(Tensor x, Tensor? weight, Tensor? bias, Scalar eps, *, ScalarType compute_dtype, "
        "ScalarType norm_dtype, ScalarType out_dtype) -> Tensor"
    ),
    body=layer_norm,
)
