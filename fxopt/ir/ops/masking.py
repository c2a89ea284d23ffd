"""What the masks of an attention mean, and the blocks in which its queries are computed."""

from __future__ import annotations

import math

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
