"""A linear layer whose weight is in fxopt's layout: what `adopt_modules` puts in the place of others."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from fxopt.ir.ops import register_ops
from fxopt.ir.quantized_weight import QuantizedWeight
from fxopt.ir.sources.found import Found
from fxopt.ir.weight_formats import FORMATS

_PARTS = ("codes", "scales", "offsets", "columns")


class QuantizedLinear(nn.Module):
    """y = x @ w^T + bias, in eager mode and in graphs.

    Attributes:
        in_features, out_features, format, group_size, activation: as `fxopt::qlinear` has them.
        source: the library that has quantized the weight, and what it calls it.
        threshold: features of x with an entry as large as this are multiplied apart; 0 for none.
        compute_dtype: what x is cast to before the product; None for its own.
        codes, scales, offsets, columns: the weight.
        bias: (N,) or None.
    """

    def __init__(
        self,
        found: Found,
        bias: torch.Tensor | None = None,
        *,
        threshold: float = 0.0,
        compute_dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        register_ops()
        weight = found.weight
        self.out_features, self.in_features = weight.shape
        self.format, self.group_size = weight.format.name, weight.group_size
        self.activation, self.source = found.activation, found.source
        self.threshold, self.compute_dtype = threshold, compute_dtype
        for name in _PARTS:
            self.register_buffer(name, getattr(weight, name))
        if bias is not None and not isinstance(bias, nn.Parameter):
            bias = nn.Parameter(bias, requires_grad=False)
        self.register_parameter("bias", bias)

    @property
    def quantized(self) -> QuantizedWeight:
        """The weight, in the memory of the buffers."""
        parts: dict[str, Any] = {name: getattr(self, name) for name in _PARTS}
        return QuantizedWeight(FORMATS[self.format], self.in_features, self.group_size, **parts)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """(..., K) -> (..., N), of the dtype of x."""
        given = x if self.compute_dtype is None else x.to(self.compute_dtype)
        bias = None if self.bias is None else self.bias.to(given.dtype)
        if self.threshold:
            out = torch.ops.fxopt.outlier_linear(
                given, self.codes, self.scales, bias, threshold=self.threshold
            )
        else:
            out = torch.ops.fxopt.packed_linear(
                given, self.codes, self.scales, self.offsets, self.columns, bias,
                format=self.format, group_size=self.group_size, activation=self.activation,
            )  # fmt: skip
        own: torch.Tensor = out.to(x.dtype)
        return own

    def extra_repr(self) -> str:
        rounded = f", activation={self.activation}" if self.activation else ""
        apart = f", threshold={self.threshold}" if self.threshold else ""
        return (
            f"in_features={self.in_features}, out_features={self.out_features}, "
            f"bias={self.bias is not None}, format={self.format}, group_size={self.group_size}"
            f"{rounded}{apart}, source={self.source!r}"
        )
