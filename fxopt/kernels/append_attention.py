"""Rotary embedding, append to a cache, and attention of the new queries over it, in two launches.

    Q, K_new = x cos + rotate(x) sin          K[length + i], V[length + i] = K_new[i], V_new[i]

and then what `fxopt.kernels.decode_attention` computes, whose functions are used here. rotate(x) is (-x2, x1)
of the halves x1, x2 of the first ROTARY columns, or of their even and odd ones (INTERLEAVED); other columns
stay.

New keys are attended to from where they came, by the programs of the first part, of which those of the first
rows write them. Rows that are about to be written are not read: no program reads what another writes. Which
of the other rows take part, in front of the new ones or behind them, is for the mask to say. Without a
length the new rows are the last ones of the cache.
In a RING the key at the position p is in the row p % rows; a mask must exclude what the rows that are about
to be written held: a window of at most rows - QUERIES + 1 keys.

Rows of 8 bits (QUANTIZED) have a scale each, of a second cache:

    scale = max |x| / LARGEST        row = round(x / scale)

New ones are rounded in registers, written, and attended to as they were written. Rotated numbers are rounded
wherever eager rounds them: of one that lies between two codes half a unit of bfloat16 decides.

Source: Su et al., "RoFormer", 2021, eq. 34; Dao et al., "Flash-Decoding for long-context inference", 2023.
"""

import triton
import triton.language as tl

from fxopt.kernels.decode_attention import (
    attend,
    cut,
    head_of,
    live_keys,
    load_rows,
    no_sums,
    part_of,
    place_of,
    queries_of,
    scaled,
    scores_of,
    store_nothing,
    store_part,
    values_of,
)
from fxopt.kernels.decode_functions import narrow, scored, widen

# --- All below is copied into kernels' files as it stands.


@triton.jit
def scales_of(ptr, b, head, stride_b, stride_h, QUANTIZED: tl.constexpr):
    """The scales of the rows of a head; nothing where they have none."""
    scales = 0
    if QUANTIZED:
        scales = head_of(ptr, b, head, stride_b, stride_h, 1)
    return scales


@triton.jit
def product(x, y):
    """In float32, rounded as eager rounds it: to 16 bits where both have the same of them."""
    exact = x.to(tl.float32) * y.to(tl.float32)
    if x.dtype == y.dtype:
        return exact.to(x.dtype).to(tl.float32)
    return exact


@triton.jit
def rotate(
    rows, cos, sin, inside, FIRST: tl.constexpr, WIDTH: tl.constexpr, BLOCK:
    tl.constexpr, ROTARY: tl.constexpr, INTERLEAVED: tl.constexpr,
):  # fmt: skip
    """(rows, BLOCK): the columns FIRST to FIRST + WIDTH of rows, turned by the angles at `cos` and `sin`."""
    column = FIRST + tl.arange(0, BLOCK)
    mask = inside[:, None] & (column < FIRST + WIDTH)[None, :]
    turned = mask & (column < ROTARY)[None, :]
    if INTERLEAVED:
        partner = column ^ 1
        sign = tl.where(column % 2 == 0, -1.0, 1.0)
    else:
        partner = tl.where(column < ROTARY // 2, column + ROTARY // 2, column - ROTARY // 2)
        sign = tl.where(column < ROTARY // 2, -1.0, 1.0)
    x = tl.load(rows[:, None] + column[None, :], mask=mask, other=0)
    if ROTARY > FIRST:
        other = tl.load(rows[:, None] + partner[None, :], mask=turned, other=0)
        along = tl.load(cos[:, None] + column[None, :], mask=turned, other=1)
        across = tl.load(sin[:, None] + column[None, :], mask=turned, other=0)
        return product(x, along) + product(other, across) * sign[None, :]
    return x.to(tl.float32)


@triton.jit
def both_parts(
    rows, cos, sin, inside, like, WIDTH_0: tl.constexpr, BLOCK_0: tl.constexpr,
    WIDTH_1: tl.constexpr, BLOCK_1: tl.constexpr, ROTARY: tl.constexpr, INTERLEAVED: tl.constexpr,
):  # fmt: skip
    """All columns of rows, rotated, in the dtype of what `like` points to."""
    x_0 = rotate(rows, cos, sin, inside, 0, WIDTH_0, BLOCK_0, ROTARY, INTERLEAVED)
    x_0 = x_0.to(like.dtype.element_ty)
    x_1 = x_0
    if WIDTH_1:
        x_1 = rotate(rows, cos, sin, inside, WIDTH_0, WIDTH_1, BLOCK_1, ROTARY, INTERLEAVED)
        x_1 = x_1.to(like.dtype.element_ty)
    return x_0, x_1


@triton.jit
def write_rows(
    rows, stride, places, inside, x, FIRST: tl.constexpr, WIDTH: tl.constexpr, BLOCK: tl.constexpr
):
    """Rows of a cache from the column FIRST on."""
    column = FIRST + tl.arange(0, BLOCK)
    mask = inside[:, None] & (column < FIRST + WIDTH)[None, :]
    place = rows + places.to(tl.int64)[:, None] * stride + column[None, :]
    tl.store(place, x.to(rows.dtype.element_ty), mask=mask)


@triton.jit
def codes_of(x_0, x_1, LARGEST: tl.constexpr, SPLIT: tl.constexpr):
    """Both parts of rows, rounded to 8 bits, and their scales; NaN where a row has one.

    Without their signs the bits of floats are in the order of integers, of which NaN are the largest.
    """
    x_0, x_1 = x_0.to(tl.float32), x_1.to(tl.float32)
    bits = tl.max(x_0.to(tl.int32, bitcast=True) & 0x7FFFFFFF, 1)
    if SPLIT:
        bits = tl.maximum(bits, tl.max(x_1.to(tl.int32, bitcast=True) & 0x7FFFFFFF, 1))
    scale = tl.div_rn(bits.to(tl.float32, bitcast=True), tl.full([], LARGEST, tl.float32))
    scale = tl.where(scale < 1.1754943508222875e-38, 1.1754943508222875e-38, scale)
    codes_0 = narrow(x_0, scale[:, None])
    codes_1 = codes_0
    if SPLIT:
        codes_1 = narrow(x_1, scale[:, None])
    return codes_0, codes_1, scale


@triton.jit
def new_values(
    v_new, stride, new, known, WIDTH: tl.constexpr, BLOCK_0: tl.constexpr, BLOCK_1: tl.constexpr
):  # fmt: skip
    """(keys, width): both parts of the new values."""
    WIDTH_0: tl.constexpr = min(WIDTH, BLOCK_0)
    v_0 = load_rows(v_new, stride, new, known, WIDTH_0, BLOCK_0, 1)
    v_1 = v_0
    if WIDTH_0 < WIDTH:
        v_1 = load_rows(v_new + WIDTH_0, stride, new, known, WIDTH - WIDTH_0, BLOCK_1, 1)
    return v_0, v_1


@triton.jit
def positions_of(slot, length, columns, inside, QUERIES: tl.constexpr, RING: tl.constexpr):
    """The positions of the keys in the rows `slot`, and which of them are to be read."""
    if RING:
        position = slot + (length - 1 - slot) // columns * columns
        inside = inside & (position + columns >= length + QUERIES)
    else:
        position = slot
        inside = inside & ((slot < length) | (slot >= length + QUERIES))
    return position, inside


@triton.jit
def old_part(
    b, split, span_ptr, length, columns, captured, QUERIES: tl.constexpr, SPAN: tl.constexpr, RING:
    tl.constexpr, SPLITS: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """The part `split` of the rows of the cache that are live: the first, and the one behind the last."""
    if RING:
        first, last = cut(0, tl.minimum(columns, length), split, SPLITS, BLOCK_N)
    else:  # what follows on a "return" is compiled, too, and may be of another type
        first, last = part_of(b, split, span_ptr, columns, captured, QUERIES, SPAN, SPLITS, BLOCK_N)
    return first, last


@triton.jit
def places_of(length, columns, writes, QUERIES: tl.constexpr, RING: tl.constexpr, BLOCK_NEW: tl.constexpr):
    """The rows of the cache behind the length that are to be written, and as far as it has room."""
    new = tl.arange(0, BLOCK_NEW)
    place = length + new
    if RING:
        place = place % columns
    return place, (new < QUERIES) & (place < columns) & writes


@triton.jit
def write_new(
    k_0, k_1, v_0, v_1, k_rows, k_stride, v_rows, v_stride, place, inside, WIDTH_0: tl.constexpr,
    BLOCK_0: tl.constexpr, WIDTH_1: tl.constexpr, BLOCK_1: tl.constexpr, V_WIDTH: tl.constexpr,
    V_BLOCK_0: tl.constexpr, V_BLOCK_1: tl.constexpr,
):  # fmt: skip
    """New keys and values."""
    V_WIDTH_0: tl.constexpr = min(V_WIDTH, V_BLOCK_0)
    write_rows(k_rows, k_stride, place, inside, k_0, 0, WIDTH_0, BLOCK_0)
    write_rows(v_rows, v_stride, place, inside, v_0, 0, V_WIDTH_0, V_BLOCK_0)
    if WIDTH_1:
        write_rows(k_rows, k_stride, place, inside, k_1, WIDTH_0, WIDTH_1, BLOCK_1)
    if V_WIDTH_0 < V_WIDTH:
        write_rows(v_rows, v_stride, place, inside, v_1, V_WIDTH_0, V_WIDTH - V_WIDTH_0, V_BLOCK_1)


@triton.jit
def join(
    s, live, v_0, v_1, v_scale, largest, b, h, q, k, extent, captured, m, total, acc_0, acc_1, SPLIT_VALUE:
    tl.constexpr, QUANTIZED: tl.constexpr,
):  # fmt: skip
    """Scaled scores and values of some keys join the sums."""
    s = scored(s, b, h[:, None], q[:, None], k[None, :], extent, captured)
    return attend(s, live, v_0, v_1, v_scale, largest, m, total, acc_0, acc_1, SPLIT_VALUE, QUANTIZED)


@triton.jit
def ends_of(length_ptr, columns, QUERIES: tl.constexpr, RING: tl.constexpr, LENGTH: tl.constexpr):
    """The rows in front of the new ones, and the number that no position reaches."""
    length = columns - QUERIES
    if LENGTH:
        length = tl.load(length_ptr).to(tl.int32)
    extent = columns
    if RING:
        extent = length + QUERIES
    return length, extent


@triton.jit
def join_old(
    slot, last, b, h, q, inside, q_0, q_1, k_rows, k_stride, v_rows, v_stride, k_scales, k_scale_stride,
    v_scales, v_scale_stride, length, extent, columns, captured, m, total, acc_0, acc_1, SCALE:
    tl.constexpr, WIDTH_0: tl.constexpr, BLOCK_0: tl.constexpr, WIDTH_1: tl.constexpr, BLOCK_1: tl.constexpr,
    K_ALIGN: tl.constexpr, V_WIDTH: tl.constexpr, V_BLOCK_0: tl.constexpr, V_BLOCK_1: tl.constexpr, V_ALIGN:
    tl.constexpr, QUERIES: tl.constexpr, RING: tl.constexpr, QUANTIZED: tl.constexpr, UNIFORM: tl.constexpr,
):  # fmt: skip
    """Keys and values of the cache, joined to the sums."""
    k, known = positions_of(slot, length, columns, slot < last, QUERIES, RING)
    live, seen = live_keys(b, h, q, inside, k, known, extent, captured, UNIFORM)
    s, v_0, v_1 = scores_of(
        q_0, q_1, k_rows, k_stride, k_rows + WIDTH_0, k_stride, slot, seen, WIDTH_0, BLOCK_0, WIDTH_1,
        BLOCK_1, K_ALIGN,
    )  # fmt: skip
    v_0, v_1 = values_of(v_rows, v_stride, slot, seen, q_0, V_WIDTH, V_BLOCK_0, V_BLOCK_1, V_ALIGN)
    s, v_scale, largest = scaled(
        s * SCALE, k_scales, k_scale_stride, v_scales, v_scale_stride, slot, seen, QUANTIZED
    )  # fmt: skip
    return join(
        s, live, v_0, v_1, v_scale, largest, b, h, q, k, extent, captured, m, total, acc_0, acc_1,
        V_BLOCK_0 < V_WIDTH, QUANTIZED,
    )  # fmt: skip


@triton.jit
def round_new(
    k_0, k_1, v_0, v_1, k_scales, k_scale_stride, v_scales, v_scale_stride, place, inside, LARGEST:
    tl.constexpr, SPLIT_KEY: tl.constexpr, SPLIT_VALUE: tl.constexpr, QUANTIZED: tl.constexpr,
):  # fmt: skip
    """New rows as they are stored, and their scales, which are written; values' as parts of the largest."""
    k_scale, v_scale, largest = 1.0, 1.0, 1.0
    if QUANTIZED:
        k_0, k_1, k_scale = codes_of(k_0, k_1, LARGEST, SPLIT_KEY)
        v_0, v_1, v_scale = codes_of(v_0, v_1, LARGEST, SPLIT_VALUE)
        tl.store(k_scales + place.to(tl.int64) * k_scale_stride, k_scale, mask=inside)
        tl.store(v_scales + place.to(tl.int64) * v_scale_stride, v_scale, mask=inside)
        largest = tl.max(v_scale, 0)
        v_scale /= largest
    return k_0, k_1, k_scale, v_0, v_1, v_scale, largest


@triton.jit
def join_new(
    writes, b, h, q, inside, q_0, q_1, k_new_ptr, k_new_stride, v_new, v_new_stride, cos, cos_stride, sin,
    sin_stride, k_rows, k_stride, v_rows, v_stride, k_scales, k_scale_stride, v_scales, v_scale_stride,
    length, extent, columns, captured, m, total, acc_0, acc_1, SCALE: tl.constexpr, WIDTH_0: tl.constexpr,
    BLOCK_0: tl.constexpr, WIDTH_1: tl.constexpr, BLOCK_1: tl.constexpr, V_WIDTH: tl.constexpr, V_BLOCK_0:
    tl.constexpr, V_BLOCK_1: tl.constexpr, ROTARY: tl.constexpr, INTERLEAVED: tl.constexpr, QUERIES:
    tl.constexpr, RING: tl.constexpr, QUANTIZED: tl.constexpr, LARGEST: tl.constexpr, UNIFORM: tl.constexpr,
    BLOCK_NEW: tl.constexpr,
):  # fmt: skip
    """The new keys and values: rotated, rounded, written, and joined to the sums."""
    new = tl.arange(0, BLOCK_NEW)
    known, k = new < QUERIES, length + new
    k_0, k_1 = both_parts(
        k_new_ptr + new * k_new_stride, cos + new * cos_stride, sin + new * sin_stride, known, k_new_ptr,
        WIDTH_0, BLOCK_0, WIDTH_1, BLOCK_1, ROTARY, INTERLEAVED,
    )  # fmt: skip
    v_0, v_1 = new_values(v_new, v_new_stride, new, known, V_WIDTH, V_BLOCK_0, V_BLOCK_1)
    place, kept = places_of(length, columns, writes, QUERIES, RING, BLOCK_NEW)
    k_0, k_1, k_scale, v_0, v_1, v_scale, largest = round_new(
        k_0, k_1, v_0, v_1, k_scales, k_scale_stride, v_scales, v_scale_stride, place, kept, LARGEST,
        WIDTH_1 > 0, V_BLOCK_0 < V_WIDTH, QUANTIZED,
    )  # fmt: skip
    write_new(
        k_0, k_1, v_0, v_1, k_rows, k_stride, v_rows, v_stride, place, kept, WIDTH_0, BLOCK_0, WIDTH_1,
        BLOCK_1, V_WIDTH, V_BLOCK_0, V_BLOCK_1,
    )  # fmt: skip
    live, _ = live_keys(b, h, q, inside, k, known, extent, captured, UNIFORM)
    s = tl.dot(q_0, tl.trans(widen(k_0, q_0.dtype)), input_precision="ieee")
    if WIDTH_1:
        s = tl.dot(q_1, tl.trans(widen(k_1, q_0.dtype)), s, input_precision="ieee")
    s *= SCALE
    if QUANTIZED:
        s *= k_scale[None, :]
    v_0, v_1 = widen(v_0, q_0.dtype), widen(v_1, q_0.dtype)
    return join(
        s, live, v_0, v_1, v_scale, largest, b, h, q, k, extent, captured, m, total, acc_0, acc_1,
        V_BLOCK_0 < V_WIDTH, QUANTIZED,
    )  # fmt: skip


@triton.jit
def _append_attention_kernel(
    q_ptr, k_new_ptr, v_new_ptr, cos_ptr, sin_ptr, k_ptr, v_ptr, k_scale_ptr, v_scale_ptr, length_ptr,
    span_ptr, partial_ptr, sums_ptr, q_stride_b, q_stride_h, q_stride_s, k_new_stride_b, k_new_stride_h,
    k_new_stride_s, v_new_stride_b, v_new_stride_h, v_new_stride_s, cos_stride_b, cos_stride_s, sin_stride_b,
    sin_stride_s, k_stride_b, k_stride_h, k_stride_k, v_stride_b, v_stride_h, v_stride_k, k_scale_stride_b,
    k_scale_stride_h, k_scale_stride_k, v_scale_stride_b, v_scale_stride_h, v_scale_stride_k, columns,
    captured, SCALE: tl.constexpr, KV_HEADS: tl.constexpr, GROUP: tl.constexpr, QUERIES: tl.constexpr,
    K_ALIGN: tl.constexpr, V_ALIGN: tl.constexpr, WIDTH_0: tl.constexpr, BLOCK_0: tl.constexpr, WIDTH_1:
    tl.constexpr, BLOCK_1: tl.constexpr, V_WIDTH: tl.constexpr, V_BLOCK_0: tl.constexpr, V_BLOCK_1:
    tl.constexpr, ROTARY: tl.constexpr, INTERLEAVED: tl.constexpr, RING: tl.constexpr, QUANTIZED:
    tl.constexpr, LARGEST: tl.constexpr, LENGTH: tl.constexpr, SPAN: tl.constexpr, UNIFORM: tl.constexpr,
    SPLITS: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_NEW: tl.constexpr,
):  # fmt: skip
    """One part of the keys of one head, for BLOCK_M of the rows that share it; new keys are of the first."""
    b, head, part, split, row = place_of(KV_HEADS, GROUP * QUERIES, SPLITS, BLOCK_M)
    h, q, inside = head * GROUP + row // QUERIES, row % QUERIES, row < GROUP * QUERIES
    length, extent = ends_of(length_ptr, columns, QUERIES, RING, LENGTH)
    first, last = old_part(
        b, split, span_ptr, length, columns, captured, QUERIES, SPAN, RING, SPLITS, BLOCK_N)  # fmt: skip
    if (first >= last) & (split > 0):
        store_nothing(sums_ptr, part, row, GROUP * QUERIES)
        return
    rows = queries_of(q_ptr, b, h, q, q_stride_b, q_stride_h, q_stride_s)
    cos_ptr, sin_ptr = cos_ptr + b * cos_stride_b, sin_ptr + b * sin_stride_b
    cos, sin = cos_ptr + q * cos_stride_s, sin_ptr + q * sin_stride_s
    q_0, q_1 = both_parts(
        rows, cos, sin, inside, q_ptr, WIDTH_0, BLOCK_0, WIDTH_1, BLOCK_1, ROTARY, INTERLEAVED)  # fmt: skip
    k_rows = head_of(k_ptr, b, head, k_stride_b, k_stride_h, K_ALIGN)
    v_rows = head_of(v_ptr, b, head, v_stride_b, v_stride_h, V_ALIGN)
    k_scales = scales_of(k_scale_ptr, b, head, k_scale_stride_b, k_scale_stride_h, QUANTIZED)
    v_scales = scales_of(v_scale_ptr, b, head, v_scale_stride_b, v_scale_stride_h, QUANTIZED)
    m, total, acc_0, acc_1 = no_sums(BLOCK_M, V_BLOCK_0, V_BLOCK_1)
    for start in range(first, last, BLOCK_N):
        m, total, acc_0, acc_1 = join_old(
            start + tl.arange(0, BLOCK_N), last, b, h, q, inside, q_0, q_1, k_rows, k_stride_k, v_rows,
            v_stride_k, k_scales, k_scale_stride_k, v_scales, v_scale_stride_k, length, extent, columns,
            captured, m, total, acc_0, acc_1, SCALE, WIDTH_0, BLOCK_0, WIDTH_1, BLOCK_1, K_ALIGN, V_WIDTH,
            V_BLOCK_0, V_BLOCK_1, V_ALIGN, QUERIES, RING, QUANTIZED, UNIFORM)  # fmt: skip
    if split == 0:
        m, total, acc_0, acc_1 = join_new(
            tl.min(row, 0) == 0, b, h, q, inside, q_0, q_1,
            head_of(k_new_ptr, b, head, k_new_stride_b, k_new_stride_h, 1), k_new_stride_s,
            head_of(v_new_ptr, b, head, v_new_stride_b, v_new_stride_h, 1), v_new_stride_s,
            cos_ptr, cos_stride_s, sin_ptr, sin_stride_s, k_rows, k_stride_k, v_rows, v_stride_k, k_scales,
            k_scale_stride_k, v_scales, v_scale_stride_k, length, extent, columns, captured, m, total, acc_0,
            acc_1, SCALE, WIDTH_0, BLOCK_0, WIDTH_1, BLOCK_1, V_WIDTH, V_BLOCK_0, V_BLOCK_1, ROTARY,
            INTERLEAVED, QUERIES, RING, QUANTIZED, LARGEST, UNIFORM, BLOCK_NEW,
        )  # fmt: skip
    place = part * GROUP * QUERIES + row
    store_part(acc_0, acc_1, m, total, partial_ptr, sums_ptr, place, inside, V_WIDTH, V_BLOCK_0, V_BLOCK_1)
