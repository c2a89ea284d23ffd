"""Attention, forward: online softmax over the keys that a mask's formula leaves.

    O = softmax(score(scale * Q K^T), where live) V

For each tile of queries, with m and l of each row, and every tile of its keys:

    m' = max(m, max S)    P = exp(S - m')    l' = exp(m - m') l + sum P    O' = exp(m - m') O + P V

and O / l at the end. Source: Dao, "FlashAttention-2", 2023, section 3.1; Milakov and Gimelshein, "Online
normalizer calculation for softmax", 2018. exp is exp2 with log2(e) in the factor of the scores.

Rows of a tile are (query, head of a group) pairs, heads fastest: K and V are read once for all heads that
share them. Programs of one group of heads are neighbours and find its keys in the L2 cache; those with the
most keys begin first. Numerics: products of operands are summed in float32, P is rounded to the dtype of V
for its product, O is rounded once. A row without a live key gives 0, NaN or the mean of V (`DEAD_ROWS`).

    q_ptr, k_ptr, v_ptr    (B, Hq, Sq, D), (B, Hkv, Skv, D), (B, Hkv, Skv, Dv), of any strides but the last, 1
    out_ptr                (B, Hq, Sq, Dv)
    sums_ptr               (2, B, Hq, Sq) float32, contiguous: m and l of each row, l = 0 without a live key.
                           m is in the units of FACTOR where that is not 0
    captured               what the device functions of a mask and a score read
    FACTOR                 of scores before exp2, log2(e) in it; 0 where scores may be as large as float32's
                           lowest number, which is not to be multiplied
    DESCRIBED              K and V are loaded through tensor descriptors, by the copy engine of GPUs of sm_90
                           or later: heads begin, and rows follow each other, at multiples of 16 bytes
"""

import triton
import triton.language as tl

from fxopt.kernels.example_functions import (
    aligned,
    columns_of,
    dropped,
    initial_top,
    initial_total,
    is_live,
    scored,
    within_tile,
)

# --- All below is copied into kernels' files as it stands.
LOG2E = tl.constexpr(1.4426950408889634)


@triton.jit
def load_rows(
    base, start, stride, extent, ROWS: tl.constexpr, WIDTH: tl.constexpr, BLOCK: tl.constexpr,
    GUARD: tl.constexpr,
):  # fmt: skip
    """(ROWS, BLOCK): rows of numbers from `start`; 0 behind the width, and with GUARD behind the last row."""
    d, row = tl.arange(0, BLOCK)[None, :], tl.arange(0, ROWS)[:, None]
    stride = aligned(stride)
    pointers = base + (tl.full([], 0, tl.int64) + start) * stride + (within_tile(row, stride) + d)
    if GUARD and WIDTH < BLOCK:
        found = tl.load(pointers, mask=(start + row < extent) & (d < WIDTH), other=0.0)
    elif GUARD:
        found = tl.load(pointers, mask=start + row < extent, other=0.0)
    elif WIDTH < BLOCK:
        found = tl.load(pointers, mask=d < WIDTH, other=0.0)
    else:
        found = tl.load(pointers)
    return found


@triton.jit
def rows_to_load(
    base, extent, stride, WIDTH: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr,
    DESCRIBED: tl.constexpr,
):  # fmt: skip
    """What `load_tile` loads rows of a head from: a descriptor of tiles (ROWS, BLOCK), or a pointer."""
    if DESCRIBED:
        rows = tl.make_tensor_descriptor(base, [extent, WIDTH], [aligned(stride), 1], [ROWS, BLOCK])
    else:
        rows = base
    return rows


@triton.jit
def load_tile(
    rows, start, stride, extent, ROWS: tl.constexpr, WIDTH: tl.constexpr, BLOCK: tl.constexpr,
    GUARD: tl.constexpr, DESCRIBED: tl.constexpr,
):  # fmt: skip
    """`load_rows`; what a descriptor finds outside of the rows and their width is 0, too."""
    if DESCRIBED:
        found = rows.load([start, 0])
    else:
        found = load_rows(rows, start, stride, extent, ROWS, WIDTH, BLOCK, GUARD)
    return found


@triton.jit
def tile_of_pairs(groups, rows, GROUP: tl.constexpr, BLOCK_M: tl.constexpr):
    """(b, group, start, pair, q, h, first, last): whose pairs a program has, and of which queries."""
    tiles = tl.cdiv(rows * GROUP, BLOCK_M)
    tile = tiles - 1 - tl.program_id(0) % tiles
    group, b = tl.program_id(0) // tiles % groups, tl.program_id(0) // tiles // groups
    pair = tile * BLOCK_M + tl.arange(0, BLOCK_M)
    q, h = tl.minimum(pair // GROUP, rows - 1), group * GROUP + pair % GROUP
    first, last = tile * BLOCK_M // GROUP, tl.minimum((tile * BLOCK_M + BLOCK_M - 1) // GROUP, rows - 1)
    return b, group, tile * BLOCK_M, pair, q, h, first, last


@triton.jit
def head_of(ptr, b, h, stride_b, stride_h):
    """Where the rows of one head begin."""
    return ptr + b.to(tl.int64) * aligned(stride_b) + h.to(tl.int64) * aligned(stride_h)


@triton.jit
def load_pairs(
    base, start, group, stride_h, stride_s, pairs, GROUP: tl.constexpr, PAIRS: tl.constexpr,
    WIDTH: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """(PAIRS, BLOCK): the rows of (query, head) pairs from `start`, 0 behind the last one."""
    d, at = tl.arange(0, BLOCK)[None, :], tl.arange(0, PAIRS)[:, None]
    stride_h, stride_s = aligned(stride_h), aligned(stride_s)
    base += (tl.full([], 0, tl.int64) + group) * GROUP * stride_h
    if PAIRS % GROUP == 0:  # tiles begin with the first head
        pointers = base + (tl.full([], 0, tl.int64) + start // GROUP) * stride_s
        pointers += (at // GROUP).to(tl.int64) * stride_s + (at % GROUP).to(tl.int64) * stride_h + d
    else:
        q, h = (start + at) // GROUP, (start + at) % GROUP
        pointers = base + q.to(tl.int64) * stride_s + h.to(tl.int64) * stride_h + d
    return tl.load(pointers, mask=(start + at < pairs) & (d < WIDTH), other=0.0)


@triton.jit
def whole_tiles(low, full_low, full_high, high, edge, BLOCK: tl.constexpr):
    """Bounds of loops over tiles that begin at multiples of BLOCK, not before `edge`.

    Tiles of ``[start, first)`` and ``[end, high)`` are seen in part, those of ``[first, end)`` as a whole.
    """
    start = tl.maximum(low // BLOCK * BLOCK, edge)
    behind = tl.where(high > low, tl.maximum(tl.cdiv(high, BLOCK) * BLOCK, start), start)
    first = tl.minimum(tl.maximum(tl.cdiv(full_low, BLOCK) * BLOCK, start), behind)
    end = tl.minimum(tl.maximum(full_high // BLOCK * BLOCK, first), behind)
    return start, first, end, behind


@triton.jit
def weights_of(s, top, FACTOR: tl.constexpr):
    """exp(s - top), `top` in units of FACTOR."""
    if FACTOR == 0:
        weights = tl.exp2((s - top) * LOG2E)
    else:
        weights = tl.exp2(s * FACTOR - top)
    return weights


@triton.jit
def rescaled(top, new_top, FACTOR: tl.constexpr):
    """exp(top - new_top); the second is finite."""
    if FACTOR == 0:
        factor = tl.exp2((top - new_top) * LOG2E)
    else:
        factor = tl.exp2(top - new_top)
    return factor


@triton.jit
def attend(
    acc, top, total, q_tile, k_rows, v_rows, k_stride_s, v_stride_s, start, end,
    b, h, q, heads, rows, columns, captured,
    SCALE: tl.constexpr, FACTOR: tl.constexpr, WIDTH: tl.constexpr, WIDTH_V: tl.constexpr,
    BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr, BLOCK_N: tl.constexpr, MASKED: tl.constexpr,
    DESCRIBED: tl.constexpr,
):  # fmt: skip
    """The keys ``[start, end)`` added to a tile of queries; with MASKED only those that are live."""
    for place in tl.range(start, end, BLOCK_N):
        keys = place + tl.arange(0, BLOCK_N)
        k = keys[None, :]
        k_tile = load_tile(
            k_rows, place, k_stride_s, columns, BLOCK_N, WIDTH, BLOCK_D, MASKED, DESCRIBED
        )  # fmt: skip
        s = tl.dot(q_tile, tl.trans(k_tile), input_precision="ieee")
        if SCALE != 1.0:
            s *= SCALE
        s = scored(s, b, h, q, k, columns, captured)
        if MASKED:
            s = tl.where(is_live(b, h, q, k, columns, captured) & (k < columns), s, float("-inf"))
        largest = tl.max(s, 1)
        if FACTOR != 0:
            largest *= FACTOR
        new_top = tl.maximum(top, largest)
        shift = tl.where(new_top == float("-inf"), 0.0, new_top)  # nothing live so far
        weights = weights_of(s, shift[:, None], FACTOR)
        kept = rescaled(top, shift, FACTOR)
        total = total * kept + tl.sum(weights, 1)
        weights = dropped(weights, b, h, q, k, heads, rows, columns, captured)
        v_tile = load_tile(
            v_rows, place, v_stride_s, columns, BLOCK_N, WIDTH_V, BLOCK_DV, MASKED, DESCRIBED
        )  # fmt: skip
        acc = tl.dot(weights.to(v_tile.dtype), v_tile, acc * kept[:, None], input_precision="ieee")
        top = new_top
    return acc, top, total


@triton.jit
def mean_of_values(
    acc, dead, v_base, v_stride_s, b, h, q, heads, rows, columns, captured,
    WIDTH_V: tl.constexpr, BLOCK_DV: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """`acc` with the mean of all values in dead rows, after dropout."""
    for place in tl.range(0, columns, BLOCK_N):
        keys = place + tl.arange(0, BLOCK_N)
        v_tile = load_rows(v_base, place, v_stride_s, columns, BLOCK_N, WIDTH_V, BLOCK_DV, True)
        share = tl.where(dead[:, None] & (keys[None, :] < columns), 1.0 / columns, 0.0)
        share = dropped(share, b, h, q, keys[None, :], heads, rows, columns, captured)
        acc = tl.dot(share.to(v_tile.dtype), v_tile, acc, input_precision="ieee")
    return acc


@triton.jit
def crop(
    low, high, pair, pairs, b, h, q, columns, captured, BLOCK_N: tl.constexpr, CROP: tl.constexpr
):  # fmt: skip
    """The part of the keys ``[low, high)`` between the first and the last that captured data leaves live."""
    if CROP:
        start, behind = high, low
        for place in tl.range(low // BLOCK_N * BLOCK_N, high, BLOCK_N):
            k = (place + tl.arange(0, BLOCK_N))[None, :]
            live = is_live(b, h, q, k, columns, captured) & (k < columns) & (pair[:, None] < pairs)
            seen = tl.max(tl.max(live.to(tl.int32), 1), 0) > 0
            start = tl.where(seen, tl.minimum(start, place), start)
            behind = tl.where(seen, tl.minimum(place + BLOCK_N, high), behind)
        low, high = tl.maximum(low, start), tl.maximum(behind, tl.maximum(low, start))
    return low, high


@triton.jit
def store_pairs(
    acc, ptr, stride_b, stride_h, stride_s, pair, pairs, b, h, q, WIDTH: tl.constexpr, BLOCK: tl.constexpr
):  # fmt: skip
    """Rows of (query, head) pairs, in the dtype of the memory."""
    d = tl.arange(0, BLOCK)[None, :]
    base = head_of(ptr, b, h, stride_b, stride_h) + q.to(tl.int64) * aligned(stride_s)
    inside = (pair < pairs)[:, None] & (d < WIDTH)
    tl.store(base[:, None] + d, acc.to(ptr.dtype.element_ty), mask=inside)


@triton.jit
def store_sums(top, total, sums_ptr, inside, batch, b, h, q, heads, rows):
    """What the backward needs to find P again."""
    place = (b.to(tl.int64) * heads + h) * rows + q
    tl.store(sums_ptr + place, tl.where(total == 0.0, 0.0, top), mask=inside)
    behind = (tl.full([], 0, tl.int64) + batch) * heads * rows  # a batch of 1 is a constant
    tl.store(sums_ptr + behind + place, total, mask=inside)


@triton.jit
def _attention_forward_kernel(
    q_ptr, k_ptr, v_ptr, out_ptr, sums_ptr, q_stride_b, q_stride_h, q_stride_s,
    k_stride_b, k_stride_h, k_stride_s, v_stride_b, v_stride_h, v_stride_s,
    out_stride_b, out_stride_h, out_stride_s, batch, groups, rows, columns, captured,
    SCALE: tl.constexpr, FACTOR: tl.constexpr, GROUP: tl.constexpr, WIDTH: tl.constexpr,
    WIDTH_V: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr, BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr, PIECES: tl.constexpr, PARTS: tl.constexpr, CROP: tl.constexpr,
    DEAD_ROWS: tl.constexpr, DESCRIBED: tl.constexpr,
):  # fmt: skip
    """One tile of (query, head) pairs of one group of heads."""
    pairs, heads = rows * GROUP, groups * GROUP
    b, group, begin, pair, queries, heads_of, first, last = tile_of_pairs(groups, rows, GROUP, BLOCK_M)
    h, q = heads_of[:, None], queries[:, None]
    q_base, k_base = head_of(q_ptr, b, b, q_stride_b, 0), head_of(k_ptr, b, group, k_stride_b, k_stride_h)
    v_base = head_of(v_ptr, b, group, v_stride_b, v_stride_h)
    k_rows = rows_to_load(k_base, columns, k_stride_s, WIDTH, BLOCK_N, BLOCK_D, DESCRIBED)
    v_rows = rows_to_load(v_base, columns, v_stride_s, WIDTH_V, BLOCK_N, BLOCK_DV, DESCRIBED)
    q_tile = load_pairs(q_base, begin, group, q_stride_h, q_stride_s, pairs, GROUP, BLOCK_M, WIDTH, BLOCK_D)
    acc, edge = tl.zeros((BLOCK_M, BLOCK_DV), tl.float32), 0
    top, total = initial_top(heads_of, captured), initial_total(heads_of, captured)
    for piece in tl.static_range(PIECES):
        low, full_low, full_high, high = columns_of(b, first, last, columns, piece, captured)
        low, high = crop(low, high, pair, pairs, b, h, q, columns, captured, BLOCK_N, CROP)
        bounds = whole_tiles(low, full_low, full_high, high, edge, BLOCK_N)
        for part in tl.static_range(3):
            if (PARTS >> part) % 2 == 1:
                acc, top, total = attend(
                    acc, top, total, q_tile, k_rows, v_rows, k_stride_s, v_stride_s, bounds[part],
                    bounds[part + 1], b, h, q, heads, rows, columns, captured,
                    SCALE, FACTOR, WIDTH, WIDTH_V, BLOCK_D, BLOCK_DV, BLOCK_N, part != 1, DESCRIBED,
                )  # fmt: skip
        edge = bounds[3]
    dead = total == 0.0
    acc = acc / tl.where(dead, 1.0, total)[:, None]
    if DEAD_ROWS == 1:
        if tl.max((dead & (pair < pairs)).to(tl.int32), 0) > 0:
            acc = mean_of_values(
                acc, dead, v_base, v_stride_s, b, h, q, heads, rows, columns, captured,
                WIDTH_V, BLOCK_DV, BLOCK_N,
            )  # fmt: skip
    elif DEAD_ROWS == 2:
        acc = tl.where(dead[:, None], float("nan"), acc)
    store_pairs(
        acc, out_ptr, out_stride_b, out_stride_h, out_stride_s, pair, pairs, b, heads_of, queries,
        WIDTH_V, BLOCK_DV,
    )  # fmt: skip
    store_sums(top, total, sums_ptr, pair < pairs, batch, b, heads_of, queries, heads, rows)
