"""Dense weights -> quantized weights, by rounding each to the nearest code.

Scales of 4-bit formats are rounded to bfloat16 before codes are chosen, so that kernels which take them in
that dtype compute with exactly the weight that is stored; those of 8-bit formats, one a row, stay in float32.
"""

from __future__ import annotations

from typing import Any

import torch

from fxopt.ir.quantized_weight import QuantizedWeight, ceil_div, pack_nibbles
from fxopt.ir.weight_formats import FORMATS, INT4, Format

# Of a weight, rounded at once: what is needed in between is some ten times as large.
_NUMBERS_AT_ONCE = 2**20


class NotFinite(ValueError):
    """A weight that has no finite scale."""


def quantize(
    dense: torch.Tensor,
    name: str,
    group_size: int | None = None,
    *,
    symmetric: bool = False,
    checked: bool = True,
) -> QuantizedWeight:
    """Round a weight to a format.

    Args:
        dense: (N, K), floating.
        name: of one of `FORMATS`.
        group_size: columns that share a scale; None is the format's default, 0 is all.
        symmetric: int4 only: without offsets. Otherwise the codes of a group cover what lies between its
            smallest and its largest weight.
        checked: raise for infinities and NaN; else their groups become NaN.

    Returns:
        the nearest codes; int8, fp8, nf4 and fp4 scaled by the largest magnitude of each group.

    Raises:
        NotFinite: `dense` has an infinity or NaN, and `checked`.
        KeyError: no such format.
    """
    kind = FORMATS[name]
    group = kind.default_group if group_size is None else group_size
    group = min(group or dense.shape[1], dense.shape[1])
    step = max(1, _NUMBERS_AT_ONCE // max(1, dense.shape[1]))
    parts = [_rounded(rows.float(), kind, group, symmetric, checked) for rows in dense.detach().split(step)]
    codes, scales = torch.cat([part[0] for part in parts]), torch.cat([part[1] for part in parts])
    found = [part[2] for part in parts if part[2] is not None]
    return QuantizedWeight(kind, dense.shape[1], group, codes, scales, torch.cat(found) if found else None)


def quantize_parameter(
    dense: torch.Tensor, name: str, group_size: int | None = None, *, transposed: bool, checked: bool = True
) -> QuantizedWeight:
    """Round a matrix, or each of a stack of matrices as those of experts.

    Args:
        dense: (N, K), or (E, N, K): E matrices below each other. transposed: (K, N), or (E, K, N).
        name, group_size, checked: as above.

    Returns:
        a weight (N, K), or (E N, K).
    """
    parts = [quantize(each, name, group_size, checked=checked) for each in matrices(dense, transposed)]
    if len(parts) == 1:
        return parts[0]
    joined: dict[str, Any] = {
        field: torch.cat([part.tensors[field] for part in parts]) for field in parts[0].tensors
    }
    return parts[0].replaced(**joined)


def matrices(dense: torch.Tensor, transposed: bool) -> tuple[torch.Tensor, ...]:
    """The matrices (N, K) that a parameter is made of; views."""
    turned = dense.detach().mT if transposed else dense.detach()
    return (turned,) if turned.dim() == 2 else turned.unbind()


def decibels(dense: torch.Tensor, weight: QuantizedWeight, *, transposed: bool = False) -> float:
    """`signal_to_noise` of a parameter and what it was rounded to, of some rows at a time."""
    step = max(1, _NUMBERS_AT_ONCE // max(1, weight.in_features))
    signal = noise = torch.zeros((), dtype=torch.float64, device=weight.device)
    start = 0
    for matrix in matrices(dense, transposed):
        for rows in matrix.split(step):
            wide, kept = rows.double(), weight.rows(start, start + rows.shape[0]).dequantize().double()
            signal, noise = signal + wide.square().sum(), noise + (wide - kept).square().sum()
            start += rows.shape[0]
    return float(10 * torch.log10(signal / noise)) if noise else float("inf")


def _rounded(
    wide: torch.Tensor, kind: Format, group: int, symmetric: bool, checked: bool
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
    """Stored codes, scales and offsets of some rows, in float32."""
    if checked and not wide.isfinite().all():
        raise NotFinite("it has entries that are not finite")
    scales, offsets = group_scales(wide, kind, group, symmetric)
    if checked and not all(each.isfinite().all() for each in (scales, offsets) if each is not None):
        raise NotFinite("it has entries that are too far apart for a scale")
    codes = nearest_codes(wide, kind, *(spread(each, group, wide.shape[1]) for each in (scales, offsets)))
    return (pack_nibbles(codes) if kind.bits == 4 else codes), scales, offsets


def group_scales(
    wide: torch.Tensor, kind: Format, group: int, symmetric: bool
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Scales, and offsets where the format has them: (N, ceil(K / group)) each, of (N, K) in float32."""
    if kind is INT4 and not symmetric:
        lowest, highest = _extremes(wide, group)
        scales = _bf16((highest - lowest) / 15)
        # The lowest weight has code 0, which stands for -8.
        return scales, _bf16(lowest + 8 * scales.float())
    lowest, highest = _extremes(wide, group)
    largest = torch.maximum(lowest.abs(), highest.abs()) / kind.largest
    return (_bf16(largest) if kind.bits == 4 else largest), None


def _bf16(numbers: torch.Tensor) -> torch.Tensor:
    return numbers.to(torch.bfloat16)


def _extremes(wide: torch.Tensor, group: int) -> tuple[torch.Tensor, torch.Tensor]:
    rows, count = wide.shape
    groups = ceil_div(count, group)
    missing = groups * group - count
    # A short last group is filled with its own last column.
    filled = torch.cat((wide, wide[:, -1:].expand(rows, missing)), 1) if missing else wide
    lowest, highest = filled.view(rows, groups, group).aminmax(dim=-1)
    return lowest, highest


def spread(of_groups: torch.Tensor | None, group: int, count: int) -> torch.Tensor | None:
    """Numbers of groups for each column, in float32."""
    return None if of_groups is None else of_groups.float().repeat_interleave(group, 1)[:, :count]


def nearest_codes(
    wide: torch.Tensor, kind: Format, scales: torch.Tensor | None, offsets: torch.Tensor | None
) -> torch.Tensor:
    """The codes, one an entry, whose weights are nearest to `wide`; all of one shape, in float32."""
    if scales is None:
        raise ValueError("no scales")
    shifted = wide if offsets is None else wide - offsets
    scaled = torch.where(scales == 0, 0.0, shifted / scales)
    if kind.storage is torch.float8_e4m3fn:
        return scaled.clamp(-kind.largest, kind.largest).to(kind.storage)
    if kind.bits == 8:
        return scaled.round().clamp(-kind.largest, kind.largest).to(kind.storage)
    if kind is INT4:
        return (scaled.round() + 8).clamp(0, 15).to(torch.uint8)
    order = kind.table.to(wide.device).argsort()
    ascending = kind.table.to(wide.device)[order]
    places = torch.bucketize(scaled, (ascending[1:] + ascending[:-1]) / 2)
    return order[places].to(torch.uint8)
