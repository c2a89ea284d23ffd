"""What the masks of an attention mean, and attention under a mask program, block by block."""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence

import torch
from torch.nn.functional import scaled_dot_product_attention as sdpa

from fxopt.ir.bounds import bounds, has_live_key, is_full, live_columns
from fxopt.ir.program import MaskProgram

# What a row of scores gives whose keys are all masked: 0, as SDPA has it; NaN, as softmax of -inf has it; the
# mean of V, as softmax of equal finite scores has it. NONE promises an additive mask without an infinite
# entry, with which all ways to compute agree.
ZERO, NAN, MEAN, NONE = "zero", "nan", "mean", "none"
# An entry of a mask below this share of its dtype's lowest number absorbs a score.
LOWEST_SHARE = 0.5
# Small blocks skip more keys; many blocks make more calls of the kernel and a longer graph. Measured on one
# core, float32, D = 64: 4 blocks of 32 queries beat one of 128 by 1.2 under a causal mask, 16 blocks of 128
# beat 8 of 256 by 1.4 in a window of 64 keys.
SMALLEST_BLOCK = 32
MOST_BLOCKS = 16


def row_blocks(rows: int) -> list[tuple[int, int]]:
    """The ranges [first, last) of queries that are computed together."""
    block = SMALLEST_BLOCK * max(1, math.ceil(rows / (SMALLEST_BLOCK * MOST_BLOCKS)))
    return [(first, min(first + block, rows)) for first in range(0, rows, block)]


@functools.lru_cache(maxsize=64)
def parsed(mask: str) -> MaskProgram:
    """The program of the op's attribute."""
    return MaskProgram.parse(mask)


def in_blocks(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    mask: str,
    captures: Sequence[torch.Tensor],
    *,
    scale: float | None,
    enable_gqa: bool,
    dead_rows: str,
) -> torch.Tensor:
    """Attention under a mask program: each block of queries reads only keys that one of them may see.

    Args:
        query: (B, Hq, Sq, D). key: (B, Hkv, Skv, D). value: (B, Hkv, Skv, Dv); sizes that are known.
        mask: the text of a `MaskProgram` without sizes. captures: its tensors ``c0, c1, ...``.

    Returns:
        (B, Hq, Sq, Dv).
    """
    program = parsed(mask)
    named = dict(zip(program.captures, captures, strict=True))
    rows, columns = query.shape[-2], key.shape[-2]
    all_live = dead_rows == NONE or has_live_key(program, rows, columns)
    parts: list[torch.Tensor] = []
    for first, last in row_blocks(rows):
        low, high = live_columns(bounds(program), first, last, columns)
        block = query[:, :, first:last]
        dead = _of_dead_rows(query, value, dead_rows)
        if low == high:
            shape = (*query.shape[:2], last - first, value.shape[-1])
            parts.append((query.new_zeros(1, 1, 1, 1) + dead).expand(shape))
            continue
        if is_full(program, (first, last), (low, high)):
            live = None
        else:
            outer = (query.shape[0], query.shape[1])
            live = program.compute(outer, (first, last), (low, high), named, {}, query.device)
        part = sdpa(
            block, key[:, :, low:high], value[:, :, low:high], live, scale=scale, enable_gqa=enable_gqa
        )
        if live is not None and not all_live and dead_rows != ZERO:
            part = torch.where(live.any(-1, keepdim=True), part, dead)
        parts.append(part)
    return torch.cat(parts, dim=2)


def _of_dead_rows(query: torch.Tensor, value: torch.Tensor, dead_rows: str) -> torch.Tensor | float:
    if dead_rows != MEAN:
        return math.nan if dead_rows == NAN else 0.0
    mean = value.mean(-2, keepdim=True)
    return mean.repeat_interleave(query.shape[1] // value.shape[1], dim=1)
