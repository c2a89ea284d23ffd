"""HQQ: groups of a flattened weight, the first half of them in the high bits, and floating zero points.

Badri and Shaji, "Half-Quadratic Quantization of Large Machine Learning Models", 2023; layout of hqq 0.2.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from fxopt.ir.quantized_weight import QuantizedWeight
from fxopt.ir.sources.bits import halves
from fxopt.ir.sources.refusal import CannotConvert


def from_hqq(
    packed: torch.Tensor,
    scale: torch.Tensor,
    zero: torch.Tensor,
    *,
    shape: Sequence[int],
    bits: int,
    group_size: int | None,
    axis: int,
) -> QuantizedWeight:
    """w = (codes - zero) * scale, over groups of neighbours in the weight's row-major order.

    Args:
        packed: 4 bits: uint8 (N K / G / 2, G), group i in the high bits of row i, and group i + N K / G / 2
            in its low bits. 8 bits: uint8 (N K / G, G).
        scale, zero: (N K / G, 1), floating.
        group_size: G, or None for K. axis: 1; groups along the other axis have a scale for each column.
    """
    rows, columns = shape
    if axis != 1:
        raise CannotConvert(f"groups along axis {axis}: neighbouring columns share no scale")
    if bits not in (4, 8):
        raise CannotConvert(f"codes of {bits} bits")
    group = columns if group_size is None else group_size
    if columns % group:
        raise CannotConvert(f"groups of {group} run over the ends of rows of {columns}")
    codes = packed.detach() if bits == 8 else halves(packed.detach(), high_first=True)
    if codes.dtype is not torch.uint8 or codes.numel() != rows * columns:
        raise CannotConvert(f"{packed.dtype} {tuple(packed.shape)} for {rows} x {columns}")
    table = (rows, columns // group)
    return QuantizedWeight.from_codes(
        "int4" if bits == 4 else "int8",
        codes.reshape(rows, columns),
        scale.detach().reshape(table),
        group_size=group,
        zeros=zero.detach().reshape(table),
    )
