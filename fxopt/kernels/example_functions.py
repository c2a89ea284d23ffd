"""The device functions of templates for a causal mask, with nothing captured: what generated ones look like.

`captured` stands for a list of arguments that is empty here.
"""

import triton
import triton.language as tl


@triton.jit
def is_live(b, h, q, k, columns, captured):
    """Where a key takes part."""
    return k <= q


@triton.jit
def scored(s, b, h, q, k, columns, captured):
    """What becomes of a scaled score."""
    return s


@triton.jit
def score_slope(grad, s, b, h, q, k, columns, captured):
    """A gradient times the derivative of `scored` with respect to s."""
    return grad


@triton.jit
def learned(s, b, h, q, k, columns, LEARNED: tl.constexpr, captured):
    """The derivative of `scored` with respect to the entry that it reads of the captured tensor `LEARNED`."""
    return s


@triton.jit
def entry_of(b, h, q, k, columns, LEARNED: tl.constexpr, captured):
    """Which entry of a table is read for a score."""
    return k


@triton.jit
def stopped(grad, s, b, h, q, k, columns, captured):
    """The gradient of a score, without that of scores which a number has replaced."""
    return grad


@triton.jit
def columns_of(b, first, last, extent, PIECE: tl.constexpr, captured):
    """The keys that queries `first` to `last` see: [low, high), all of them [full_low, full_high)."""
    return 0, 0, tl.minimum(extent, first + 1), tl.minimum(extent, last + 1)


@triton.jit
def rows_of(b, first, last, extent, PIECE: tl.constexpr, captured):
    """The queries that see keys `first` to `last`."""
    return tl.minimum(first, extent), tl.minimum(last, extent), extent, extent


@triton.jit
def aligned(stride):
    """A stride of operands. What is known to divide it lets the compiler read several numbers at once."""
    return stride


@triton.jit
def within_tile(row, stride):
    """How many numbers a row of a tile is behind the first one."""
    return (row * stride).to(tl.int32)


@triton.jit
def initial_top(h, captured):
    """The largest score of a row before its first key: of its sink, where there is one."""
    return h.to(tl.float32) * 0 + float("-inf")


@triton.jit
def initial_total(h, captured):
    """The sum of weights before the first key: 1 of a sink."""
    return h.to(tl.float32) * 0


@triton.jit
def dropped(weights, b, h, q, k, heads, rows, columns, captured):
    """Attention weights, or their gradients, after dropout."""
    return weights
