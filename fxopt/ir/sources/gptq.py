"""GPTQ and AWQ: int32 words of eight codes, zero points packed likewise, and groups in an order of their own.

Frantar et al., "GPTQ", 2022; Lin et al., "AWQ", 2023. Layouts as AutoGPTQ, AutoAWQ and GPTQModel write them.
"""

from __future__ import annotations

import torch

from fxopt.ir.quantized_weight import QuantizedWeight
from fxopt.ir.sources.bits import AWQ_ORDER, fields
from fxopt.ir.sources.refusal import CannotConvert


def from_gptq(
    words: torch.Tensor,
    zeros: torch.Tensor,
    scales: torch.Tensor,
    group_index: torch.Tensor | None,
    *,
    bits: int,
    group_size: int,
    zeros_format: int,
) -> QuantizedWeight:
    """w[n, k] = (codes[k, n] - zeros[g, n]) * scales[g, n], where g is the group of column k.

    Args:
        words: int32 (K * bits / 32, N), fields along K. zeros: int32 (K / G, N * bits / 32), along N.
        scales: (K / G, N). group_index: (K,) the group of each column, or None: k // G.
        bits: 4 or 8. group_size: G, or -1 for K.
        zeros_format: 1 where zero points are stored less one (the files), 2 where as they are.
    """
    _check_bits(bits)
    if zeros_format not in (1, 2):
        raise CannotConvert(f"zero points of format {zeros_format}")
    codes = fields(words.t().contiguous(), bits)
    points = fields(zeros.contiguous(), bits)[:, : scales.shape[1]].t().float()
    if zeros_format == 1:
        # All bits set are 0 less one to some writers and 2^bits less one to others.
        if points.numel() and points.amax() == (1 << bits) - 1:
            raise CannotConvert(
                "a zero point of format 1 with all bits set, which readers take for different ones"
            )
        points = points + 1
    size = codes.shape[1] if group_size <= 0 else group_size
    return _grouped(codes, points, scales.t(), group_index, bits, size)


def from_awq(
    words: torch.Tensor, zeros: torch.Tensor, scales: torch.Tensor, *, bits: int, group_size: int
) -> QuantizedWeight:
    """w[n, k] = (codes[k, n] - zeros[g, n]) * scales[g, n], words of eight outputs in AWQ's order.

    Args:
        words: int32 (K, N / 8). zeros: int32 (K / G, N / 8). scales: (K / G, N).
    """
    if bits != 4:
        raise CannotConvert(f"codes of {bits} bits in AWQ's order")
    codes = fields(words.contiguous(), bits, AWQ_ORDER).t()
    points = fields(zeros.contiguous(), bits, AWQ_ORDER).t().float()
    size = codes.shape[1] if group_size <= 0 else group_size
    return _grouped(codes, points, scales.t(), None, bits, size)


def _grouped(
    codes: torch.Tensor,
    points: torch.Tensor,
    scales: torch.Tensor,
    group_index: torch.Tensor | None,
    bits: int,
    group_size: int,
) -> QuantizedWeight:
    columns = column_order(group_index, codes.shape[1], group_size)
    if columns is not None:
        codes = codes.index_select(1, columns)
    return QuantizedWeight.from_codes(
        "int4" if bits == 4 else "int8",
        codes.contiguous(),
        scales.contiguous(),
        group_size=group_size,
        zeros=points.contiguous(),
        columns=columns,
    )


def column_order(group_index: torch.Tensor | None, count: int, group_size: int) -> torch.Tensor | None:
    """The columns in the order of their groups; None where that is their own order."""
    if group_index is None or not group_index.numel():
        return None
    index = group_index.detach().long()
    natural = torch.arange(count, device=index.device) // group_size
    if torch.equal(index, natural):
        return None
    order = index.argsort(stable=True)
    if not torch.equal(index[order], natural):
        raise CannotConvert(f"groups that have not {group_size} columns each")
    return order


def _check_bits(bits: int) -> None:
    if bits not in (4, 8):
        raise CannotConvert(f"codes of {bits} bits")
