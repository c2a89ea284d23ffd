"""optimum-quanto: groups of a flattened weight, half of them in the low bits; shifts beside the scales."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from fxopt.ir.quantized_weight import QuantizedWeight
from fxopt.ir.sources.affine import from_blocks
from fxopt.ir.sources.bits import halves
from fxopt.ir.sources.refusal import CannotConvert


def from_bytes(codes: torch.Tensor, scale: torch.Tensor, axis: int | None) -> QuantizedWeight:
    """w = codes * scale.

    Args:
        codes: int8 or float8_e4m3fn (N, K). scale: (N, 1), or one number. axis: 0; None is one scale for all.
    """
    if axis not in (0, None):
        raise CannotConvert(f"scales along axis {axis}")
    rows, columns = codes.shape
    return from_blocks(codes, scale, (1 if scale.numel() > 1 else rows, columns))


def from_bits(
    packed: torch.Tensor,
    scale: torch.Tensor,
    shift: torch.Tensor,
    *,
    shape: Sequence[int],
    bits: int,
    group_size: int | None,
    axis: int,
) -> QuantizedWeight:
    """w = codes * scale - shift where the shift is floating, else (codes - shift) * scale.

    Args:
        packed: uint8; of the codes (N K / G, G) row r is in the low and row r + half in the high bits.
        scale, shift: (N K / G, 1). group_size: G, or None for K. axis: 0.
    """
    rows, columns = shape
    if bits != 4 or axis != 0:
        raise CannotConvert(f"codes of {bits} bits along axis {axis}")
    group = columns if group_size is None else group_size
    if columns % group:
        raise CannotConvert(f"groups of {group} run over the ends of rows of {columns}")
    wanted = rows * columns // group
    codes = halves(packed.detach(), high_first=False)[:wanted]
    if codes.numel() != rows * columns:
        raise CannotConvert(f"{packed.dtype} {tuple(packed.shape)} for {rows} x {columns}")
    table = (rows, columns // group)
    scales, given = scale.detach().reshape(table), shift.detach().reshape(table)
    if given.dtype.is_floating_point:
        # Codes of fxopt count from -8.
        offsets, zeros = 8 * scales.float() - given.float(), None
    else:
        offsets, zeros = None, given
    return QuantizedWeight.from_codes(
        "int4", codes.reshape(rows, columns), scales, group_size=group, offsets=offsets, zeros=zeros
    )
