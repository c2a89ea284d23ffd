"""compressed-tensors: codes in int32 words along rows, counted from the middle of their range."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from fxopt.ir.quantized_weight import QuantizedWeight
from fxopt.ir.sources.bits import fields, nibbles
from fxopt.ir.sources.gptq import column_order
from fxopt.ir.sources.refusal import CannotConvert


def from_words(
    words: torch.Tensor,
    scales: torch.Tensor,
    shape: Sequence[int],
    *,
    bits: int,
    group_size: int | None,
    zeros: torch.Tensor | None = None,
    group_index: torch.Tensor | None = None,
) -> QuantizedWeight:
    """w = (codes - zeros) * scales, both counted from 0 here; without `zeros` from the middle.

    Args:
        words: int32 (N, ceil(K * bits / 32)), fields along K. shape: (N, K). bits: 4 or 8.
        scales: (N, ceil(K / G)). group_size: G; None or -1 is K.
        zeros: int32 (ceil(N * bits / 32), ceil(K / G)), fields along N.
        group_index: (K,), the group of each column.
    """
    rows, columns = (int(size) for size in shape)
    if bits not in (4, 8):
        raise CannotConvert(f"codes of {bits} bits")
    group = columns if group_size is None or group_size <= 0 else group_size
    codes = fields(words.detach().contiguous(), bits)[:, :columns]
    table = scales.detach().reshape(rows, -1)
    points = None
    if zeros is not None:
        points = fields(zeros.detach().t().contiguous(), bits)[:, :rows].t().contiguous()
    order = column_order(group_index, columns, group)
    if order is not None:
        codes = codes.index_select(1, order)
    if bits == 8 and points is None:
        codes = (codes ^ 128).view(torch.int8)
    return QuantizedWeight.from_codes(
        "int4" if bits == 4 else "int8", codes, table, group_size=group, zeros=points, columns=order
    )


def from_nvfp4(packed: torch.Tensor, scales: torch.Tensor, global_scale: torch.Tensor) -> QuantizedWeight:
    """w = e2m1(codes) * scales / global_scale.

    Args:
        packed: uint8 (N, K / 2), the first of two codes in the low bits. scales: float8_e4m3fn (N, K / 16).
        global_scale: one number.
    """
    table = scales.detach().float() / global_scale.detach().float().reshape(())
    return _e2m1(packed, table)


def from_mxfp4(packed: torch.Tensor, exponents: torch.Tensor) -> QuantizedWeight:
    """w = e2m1(codes) * 2^(exponents - 127): `packed` as above, exponents uint8 (N, K / 32)."""
    if exponents.dtype is not torch.uint8:
        raise CannotConvert(f"exponents of {exponents.dtype}")
    return _e2m1(packed, torch.exp2(exponents.detach().float() - 127))


def _e2m1(packed: torch.Tensor, scales: torch.Tensor) -> QuantizedWeight:
    codes = nibbles(packed.detach(), high_first=False)
    if codes.shape[1] % scales.shape[1]:
        raise CannotConvert(f"{scales.shape[1]} groups of {codes.shape[1]} columns")
    return QuantizedWeight.from_codes("fp4_e2m1", codes, scales, group_size=codes.shape[1] // scales.shape[1])
