"""Attention of a few queries over a long cache: split over the keys, then put together.

    out[r] = sum_k p[r, k] V[k] / sum_k p[r, k]          p[r, k] = exp(score(scale * Q[r] . K[k]) - m[r])

The rows r of one program are all queries of all heads that share a key head: what is read of K and V is read
once for all of them. The live keys are cut into SPLITS parts of equal length, each for a program of its own:

    m_i, l_i, a_i = max score, sum of p, sum of p V, of the part i
    m = max m_i      l = sum exp(m_i - m) l_i      out = sum exp(m_i - m) a_i / l

always added in the same order. Scores and sums are in float32, and p is rounded to the dtype of V in front of
the product, as FlashAttention has it. Differences of scores, not scores, are scaled for powers of two: the
lowest number of float32, as a mask, stays finite. Where the live keys begin and end is read on the device: a
launch stays valid while a cache grows. A key that no row sees is not loaded, so whatever lies behind the end
of a cache is without effect.

Widths are cut into two parts, a power of two and the rest: 72 is 64 and 8, so that no tile is much wider than
what it holds. Without a second part of its own, `q_rest` and `k_rest` are the last columns of Q and K.

`widen`, `is_live`, `scored` and `live_span` are those of the problem; `captured` stands for the tensors and
sizes of its formulas.

Source: Dao et al., "Flash-Decoding for long-context inference", 2023; Milakov and Gimelshein, "Online
normalizer calculation for softmax", 2018.
"""

import triton
import triton.language as tl

from fxopt.kernels.decode_functions import is_live, live_span, scored, widen

# --- All below is copied into kernels' files as it stands.


@triton.jit
def load_rows(ptr, stride, rows, seen, WIDTH: tl.constexpr, BLOCK: tl.constexpr, ALIGN: tl.constexpr):
    """(rows, BLOCK) numbers; columns behind WIDTH and rows that are not seen are 0, and not read.

    ALIGN divides the stride, so that numbers are read several at once.
    """
    column = tl.arange(0, BLOCK)
    offset = tl.multiple_of(rows.to(tl.int64) * stride, ALIGN)
    mask = seen[:, None]
    if WIDTH < BLOCK:
        mask = mask & (column < WIDTH)[None, :]
    return tl.load(ptr + offset[:, None] + column[None, :], mask=mask, other=0.0)


@triton.jit
def attend(
    s, live, v_0, v_1, v_scale, largest, m, total, acc_0, acc_1, SPLIT_VALUE: tl.constexpr,
    QUANTIZED: tl.constexpr,
):  # fmt: skip
    """One step of the online softmax: scores (rows, keys) and values (keys, width) join the sums.

    A scale of a value is part of its weight, relative to the largest one, so that a weight in float16 keeps
    its digits.
    """
    s = tl.where(live, s, float("-inf"))
    m_new = tl.maximum(m, tl.max(s, 1))
    # A row without a live key so far: any finite number keeps NaN out.
    safe = tl.where(m_new == float("-inf"), 0.0, m_new)
    alpha = tl.exp2((m - safe) * 1.4426950408889634)
    p = tl.exp2((s - safe[:, None]) * 1.4426950408889634)
    total = total * alpha + tl.sum(p, 1)
    acc_0 = acc_0 * alpha[:, None]
    acc_1 = acc_1 * alpha[:, None]
    if QUANTIZED:
        p = p * v_scale[None, :]
        acc_0 += tl.dot(p.to(v_0.dtype), v_0, input_precision="ieee") * largest
    else:
        acc_0 = tl.dot(p.to(v_0.dtype), v_0, acc_0, input_precision="ieee")
    if SPLIT_VALUE and QUANTIZED:
        acc_1 += tl.dot(p.to(v_1.dtype), v_1, input_precision="ieee") * largest
    elif SPLIT_VALUE:
        acc_1 = tl.dot(p.to(v_1.dtype), v_1, acc_1, input_precision="ieee")
    return m_new, total, acc_0, acc_1


@triton.jit
def row_scales(ptr, stride, rows, seen):
    """The scales of stored rows."""
    return tl.load(ptr + rows.to(tl.int64) * stride, mask=seen, other=0).to(tl.float32)


@triton.jit
def scaled(s, k_scales, k_stride, v_scales, v_stride, k, seen, QUANTIZED: tl.constexpr):
    """Scores by the scales of their keys, the scales of values as parts of the largest of them, and that."""
    v_scale, largest = 1.0, 1.0
    if QUANTIZED:
        s *= row_scales(k_scales, k_stride, k, seen)[None, :]
        v_scale = row_scales(v_scales, v_stride, k, seen)
        largest = tl.max(v_scale, 0)
        largest = tl.where(largest > 0, largest, 1.0)
        v_scale /= largest
    return s, v_scale, largest


@triton.jit
def store_part(
    acc_0, acc_1, m, total, partial_ptr, sums_ptr, place, inside, V_WIDTH: tl.constexpr,
    V_BLOCK_0: tl.constexpr, V_BLOCK_1: tl.constexpr,
):  # fmt: skip
    """The sums of one part, for `_decode_attention_total_kernel`, at the rows `place`."""
    column = tl.arange(0, V_BLOCK_0)
    base = partial_ptr + place[:, None] * V_WIDTH
    tl.store(base + column[None, :], acc_0, mask=inside[:, None] & (column < V_WIDTH)[None, :])
    if V_BLOCK_0 < V_WIDTH:
        column = V_BLOCK_0 + tl.arange(0, V_BLOCK_1)
        tl.store(base + column[None, :], acc_1, mask=inside[:, None] & (column < V_WIDTH)[None, :])
    # A part of which no score is a number has no largest one, but its sum is NaN and has to be read.
    m = tl.where(total == total, m, 0.0)
    tl.store(sums_ptr + place * 2, m, mask=inside)
    tl.store(sums_ptr + place * 2 + 1, total, mask=inside)


@triton.jit
def store_nothing(sums_ptr, part, row, ROWS: tl.constexpr):
    """A part without a live key: its sums are not read."""
    nothing = tl.full(row.shape, float("-inf"), tl.float32)
    tl.store(sums_ptr + (part * ROWS + row) * 2, nothing, mask=row < ROWS)


@triton.jit
def place_of(KV_HEADS: tl.constexpr, ROWS: tl.constexpr, SPLITS: tl.constexpr, BLOCK_M: tl.constexpr):
    """What a program is for: sequence, head of K and V, part, counted through and of its head, and rows."""
    row_blocks: tl.constexpr = (ROWS + BLOCK_M - 1) // BLOCK_M
    program = tl.program_id(0)
    split, program = program % SPLITS, program // SPLITS
    row_block, head = program % row_blocks, program // row_blocks
    part = head.to(tl.int64) * SPLITS + split
    row = row_block * BLOCK_M + tl.arange(0, BLOCK_M)
    return (head // KV_HEADS).to(tl.int64), head % KV_HEADS, part, split, row


@triton.jit
def part_of(
    b, split, span_ptr, columns, captured, QUERIES: tl.constexpr, SPAN: tl.constexpr, SPLITS: tl.constexpr,
    BLOCK_N: tl.constexpr,
):  # fmt: skip
    """The part `split` of the live keys: the first, and the one behind the last."""
    low, high = live_span(b, QUERIES - 1, columns, captured)
    if SPAN:
        low, high = tl.maximum(low, tl.load(span_ptr)), tl.minimum(high, tl.load(span_ptr + 1))
    return cut(low, high, split, SPLITS, BLOCK_N)


@triton.jit
def cut(low, high, split, SPLITS: tl.constexpr, BLOCK_N: tl.constexpr):
    """The part `split` of [low, high). Parts are whole blocks, but for the end."""
    length = tl.cdiv(tl.cdiv(tl.maximum(high - low, 0), SPLITS), BLOCK_N) * BLOCK_N
    first = low + split * length
    return first, tl.minimum(first + length, high)


@triton.jit
def head_of(ptr, b, h, stride_b, stride_h, ALIGN: tl.constexpr):
    """The rows of a head. ALIGN divides the strides."""
    return ptr + tl.multiple_of(b * stride_b, ALIGN) + tl.multiple_of(h.to(tl.int64) * stride_h, ALIGN)


@triton.jit
def queries_of(ptr, b, h, q, stride_b, stride_h, stride_s):
    """(rows,): where the query q of head h is."""
    return ptr + b * stride_b + h.to(tl.int64) * stride_h + q * stride_s


@triton.jit
def load_queries(rows, inside, WIDTH: tl.constexpr, BLOCK: tl.constexpr):
    """(rows, BLOCK) numbers."""
    column = tl.arange(0, BLOCK)
    mask = inside[:, None] & (column < WIDTH)[None, :]
    return tl.load(rows[:, None] + column[None, :], mask=mask, other=0)


@triton.jit
def no_sums(BLOCK_M: tl.constexpr, V_BLOCK_0: tl.constexpr, V_BLOCK_1: tl.constexpr):
    """The sums before the first key."""
    m, total = tl.full([BLOCK_M], float("-inf"), tl.float32), tl.zeros([BLOCK_M], tl.float32)
    acc_0, acc_1 = tl.zeros([BLOCK_M, V_BLOCK_0], tl.float32), tl.zeros([BLOCK_M, V_BLOCK_1], tl.float32)
    return m, total, acc_0, acc_1


@triton.jit
def live_keys(b, h, q, row_inside, k, inside, columns, captured, UNIFORM: tl.constexpr):
    """Which of the keys `k` each row sees, and which of them one row sees."""
    if UNIFORM:
        seen = inside & is_live(b, 0, 0, k, columns, captured)
        live = seen[None, :]
    else:
        live = is_live(b, h[:, None], q[:, None], k[None, :], columns, captured)
        live = live & inside[None, :] & row_inside[:, None]
        seen = tl.max(live.to(tl.int32), 0) > 0
    return live, seen


@triton.jit
def scores_of(
    q_0, q_1, k_rows, k_stride, rest_rows, rest_stride, k, seen, WIDTH_0: tl.constexpr, BLOCK_0: tl.constexpr,
    WIDTH_1: tl.constexpr, BLOCK_1: tl.constexpr, ALIGN: tl.constexpr,
):  # fmt: skip
    """(rows, keys): the products of queries and keys, and both parts of the keys."""
    k_0 = widen(load_rows(k_rows, k_stride, k, seen, WIDTH_0, BLOCK_0, ALIGN), q_0.dtype)
    s = tl.dot(q_0, tl.trans(k_0), input_precision="ieee")
    k_1 = k_0
    if WIDTH_1:
        k_1 = widen(load_rows(rest_rows, rest_stride, k, seen, WIDTH_1, BLOCK_1, ALIGN), q_0.dtype)
        s = tl.dot(q_1, tl.trans(k_1), s, input_precision="ieee")
    return s, k_0, k_1


@triton.jit
def values_of(
    v_rows, v_stride, k, seen, q_0, V_WIDTH: tl.constexpr, V_BLOCK_0: tl.constexpr,
    V_BLOCK_1: tl.constexpr, ALIGN: tl.constexpr,
):  # fmt: skip
    """(keys, width): both parts of the values."""
    WIDTH_0: tl.constexpr = min(V_WIDTH, V_BLOCK_0)
    v_0 = widen(load_rows(v_rows, v_stride, k, seen, WIDTH_0, V_BLOCK_0, ALIGN), q_0.dtype)
    v_1 = v_0
    if WIDTH_0 < V_WIDTH:
        tail = load_rows(v_rows + WIDTH_0, v_stride, k, seen, V_WIDTH - WIDTH_0, V_BLOCK_1, ALIGN)
        v_1 = widen(tail, q_0.dtype)
    return v_0, v_1


@triton.jit
def _decode_attention_kernel(
    q_ptr, k_ptr, v_ptr, k_scale_ptr, v_scale_ptr, q_rest_ptr, k_rest_ptr, span_ptr, partial_ptr, sums_ptr,
    q_stride_b, q_stride_h, q_stride_s, k_stride_b, k_stride_h, k_stride_k, v_stride_b, v_stride_h,
    v_stride_k, k_scale_stride_b, k_scale_stride_h, k_scale_stride_k, v_scale_stride_b, v_scale_stride_h,
    v_scale_stride_k, q_rest_stride_b, q_rest_stride_h, q_rest_stride_s, k_rest_stride_b, k_rest_stride_h,
    k_rest_stride_k, columns, captured, SCALE: tl.constexpr, KV_HEADS: tl.constexpr, GROUP: tl.constexpr,
    QUERIES: tl.constexpr, K_ALIGN: tl.constexpr, V_ALIGN: tl.constexpr, WIDTH_0: tl.constexpr,
    BLOCK_0: tl.constexpr, WIDTH_1: tl.constexpr, BLOCK_1: tl.constexpr, V_WIDTH: tl.constexpr,
    V_BLOCK_0: tl.constexpr, V_BLOCK_1: tl.constexpr, SPAN: tl.constexpr, QUANTIZED: tl.constexpr,
    SHARED: tl.constexpr, UNIFORM: tl.constexpr, SPLITS: tl.constexpr, BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):  # fmt: skip
    """One part of the keys of one head, for BLOCK_M of the rows that share it."""
    b, head, part, split, row = place_of(KV_HEADS, GROUP * QUERIES, SPLITS, BLOCK_M)
    h, q, inside = head * GROUP + row // QUERIES, row % QUERIES, row < GROUP * QUERIES
    first, last = part_of(b, split, span_ptr, columns, captured, QUERIES, SPAN, SPLITS, BLOCK_N)
    if first >= last:
        store_nothing(sums_ptr, part, row, GROUP * QUERIES)
        return
    q_rows = queries_of(q_ptr, b, h, q, q_stride_b, q_stride_h, q_stride_s)
    q_0, q_1 = load_queries(q_rows, inside, WIDTH_0, BLOCK_0), 0.0
    k_rows, rest_rows = head_of(k_ptr, b, head, k_stride_b, k_stride_h, K_ALIGN), 0
    k_scales, v_scales = 0, 0
    if WIDTH_1:
        q_rows = queries_of(q_rest_ptr, b, h, q, q_rest_stride_b, q_rest_stride_h, q_rest_stride_s)
        q_1 = load_queries(q_rows, inside, WIDTH_1, BLOCK_1)
        rest_rows = head_of(k_rest_ptr, b, head, k_rest_stride_b, k_rest_stride_h, K_ALIGN)
    if QUANTIZED:
        k_scales = head_of(k_scale_ptr, b, head, k_scale_stride_b, k_scale_stride_h, 1)
        v_scales = head_of(v_scale_ptr, b, head, v_scale_stride_b, v_scale_stride_h, 1)
    v_rows = head_of(v_ptr, b, head, v_stride_b, v_stride_h, V_ALIGN)
    m, total, acc_0, acc_1 = no_sums(BLOCK_M, V_BLOCK_0, V_BLOCK_1)
    for start in range(first, last, BLOCK_N):
        k = start + tl.arange(0, BLOCK_N)
        live, seen = live_keys(b, h, q, inside, k, k < last, columns, captured, UNIFORM)
        s, v_0, v_1 = scores_of(
            q_0, q_1, k_rows, k_stride_k, rest_rows, k_rest_stride_k, k, seen, WIDTH_0, BLOCK_0, WIDTH_1,
            BLOCK_1, K_ALIGN,
        )  # fmt: skip
        if not SHARED:
            v_0, v_1 = values_of(v_rows, v_stride_k, k, seen, q_0, V_WIDTH, V_BLOCK_0, V_BLOCK_1, V_ALIGN)
        s, v_scale, largest = scaled(
            s * SCALE, k_scales, k_scale_stride_k, v_scales, v_scale_stride_k, k, seen, QUANTIZED
        )  # fmt: skip
        s = scored(s, b, h[:, None], q[:, None], k[None, :], columns, captured)
        m, total, acc_0, acc_1 = attend(
            s, live, v_0, v_1, v_scale, largest, m, total, acc_0, acc_1, V_BLOCK_0 < V_WIDTH, QUANTIZED
        )
    place = part * GROUP * QUERIES + row
    store_part(acc_0, acc_1, m, total, partial_ptr, sums_ptr, place, inside, V_WIDTH, V_BLOCK_0, V_BLOCK_1)


@triton.jit
def mean_of_values(
    v_rows, v_stride, v_scales, v_scale_stride, count, columns, V_WIDTH: tl.constexpr, BLOCK_V: tl.constexpr,
    QUANTIZED: tl.constexpr,
):  # fmt: skip
    """(BLOCK_V,): the mean over the first `count` of `columns` rows; nothing is read where `count` is 0."""
    total = tl.zeros([BLOCK_V], tl.float32)
    for start in range(0, count, 16):
        k = start + tl.arange(0, 16)
        v = widen(load_rows(v_rows, v_stride, k, k < count, V_WIDTH, BLOCK_V, 1), tl.float32)
        if QUANTIZED:
            v *= row_scales(v_scales, v_scale_stride, k, k < count)[:, None]
        total += tl.sum(v, 0)
    return total / columns


@triton.jit
def _decode_attention_total_kernel(
    partial_ptr, sums_ptr, sinks_ptr, v_ptr, v_scale_ptr, out_ptr, v_stride_b, v_stride_h, v_stride_k,
    v_scale_stride_b, v_scale_stride_h, v_scale_stride_k, columns, KV_HEADS: tl.constexpr,
    GROUP: tl.constexpr, QUERIES: tl.constexpr, V_WIDTH: tl.constexpr, BLOCK_V: tl.constexpr,
    SPLITS: tl.constexpr, BLOCK_SPLITS: tl.constexpr, SINKS: tl.constexpr, DEAD_MEAN: tl.constexpr,
    DEAD_NAN: tl.constexpr, QUANTIZED: tl.constexpr,
):  # fmt: skip
    """One row of the result, from the sums of its parts."""
    ROWS: tl.constexpr = GROUP * QUERIES
    head, row = tl.program_id(0) // ROWS, tl.program_id(0) % ROWS
    b, kv_head = (head // KV_HEADS).to(tl.int64), head % KV_HEADS
    h, q = kv_head * GROUP + row // QUERIES, row % QUERIES
    column, m = tl.arange(0, BLOCK_V), float("-inf")
    if SINKS:
        m = tl.load(sinks_ptr + h).to(tl.float32)
    every = tl.arange(0, triton.next_power_of_2(SPLITS))
    sums = sums_ptr + ((head.to(tl.int64) * SPLITS + every) * ROWS + row) * 2
    largest = tl.maximum(m, tl.max(tl.load(sums, mask=every < SPLITS, other=float("-inf")), 0))
    safe = tl.where(largest == float("-inf"), 0.0, largest)
    total = tl.exp2((m - safe) * 1.4426950408889634)
    acc = tl.zeros([BLOCK_V], tl.float32)
    for start in range(0, SPLITS, BLOCK_SPLITS):
        split = start + tl.arange(0, BLOCK_SPLITS)
        place = (head.to(tl.int64) * SPLITS + split) * ROWS + row
        m_part = tl.load(sums_ptr + place * 2, mask=split < SPLITS, other=float("-inf"))
        used = m_part != float("-inf")
        weight = tl.exp2((m_part - safe) * 1.4426950408889634)
        total += tl.sum(weight * tl.load(sums_ptr + place * 2 + 1, mask=used, other=0), 0)
        rows = load_rows(partial_ptr, V_WIDTH, place, used, V_WIDTH, BLOCK_V, 1)
        acc += tl.sum(weight[:, None] * rows, 0)
    out = acc / tl.where(total == 0, 1.0, total)
    if DEAD_NAN:
        out = tl.where(total == 0, float("nan"), out)
    if DEAD_MEAN:
        v_rows, v_scales = head_of(v_ptr, b, kv_head, v_stride_b, v_stride_h, 1), v_scale_ptr
        if QUANTIZED:
            v_scales = head_of(v_scale_ptr, b, kv_head, v_scale_stride_b, v_scale_stride_h, 1)
        count = tl.where(total == 0, columns, 0)
        out += mean_of_values(
            v_rows, v_stride_k, v_scales, v_scale_stride_k, count, columns, V_WIDTH, BLOCK_V, QUANTIZED
        )
    place = ((b * QUERIES + q) * KV_HEADS * GROUP + h) * V_WIDTH + column
    tl.store(out_ptr + place, out.to(out_ptr.dtype.element_ty), mask=column < V_WIDTH)
