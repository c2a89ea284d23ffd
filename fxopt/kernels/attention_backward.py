"""Attention, backward: the weights are computed again, tile by tile, and no sum is left to chance.

    P = exp(score(S) - m) / l     D = rowsum(dO * O)     dV = P^T dO     dP = dO V^T
    dS = P * (dP - D) * score'    dQ = scale * dS K      dK = scale * dS^T Q

Source: Dao, "FlashAttention-2", 2023, section 3.1 and algorithm 2. Three launches: D for each row
(`attention_delta`); dQ, of which a program sums one tile over the keys that it sees; dK and dV, of which a
program sums one tile over the (query, head) pairs that see it, those of all heads that share the keys.
Nothing is added atomically, so that equal inputs give equal bits. Dropout multiplies P in dV, and dP, by the
numbers of the forward.

A row without a live key that gives the mean of V (`DEAD_ROWS` 1) has equal weights for all keys; with `STOPS`
its scores get no gradient. One that gives NaN (2) has weights of NaN. Where the captured tensor `LEARNED`,
which is -1 without any, has a number for each head that is learned, its gradient is summed for each row, into
(B, Hq, Sq): `learned` says by how much the score grows with it.
"""

import triton
import triton.language as tl

from fxopt.kernels.attention_forward import (
    crop,
    head_of,
    load_pairs,
    load_rows,
    store_pairs,
    tile_of_pairs,
    weights_of,
    whole_tiles,
)
from fxopt.kernels.example_functions import (
    aligned,
    columns_of,
    dropped,
    is_live,
    learned,
    rows_of,
    score_slope,
    scored,
    stopped,
)

# --- All below is copied into kernels' files as it stands.


@triton.jit
def load_sums(sums_ptr, delta_ptr, b, h, q, inside, batch, heads, rows):
    """(m, 1 / l, D, whether no key is live) of rows; m is infinite where no weight is to be found again."""
    place = (b.to(tl.int64) * heads + h) * rows + q
    top = tl.load(sums_ptr + place, mask=inside, other=0.0)
    behind = (tl.full([], 0, tl.int64) + batch) * heads * rows  # a batch of 1 is a constant
    total = tl.load(sums_ptr + behind + place, mask=inside, other=0.0)
    delta = tl.load(delta_ptr + place, mask=inside, other=0.0)
    lost = total == 0.0
    return tl.where(lost, float("inf"), top), 1.0 / tl.where(lost, 1.0, total), delta, lost & inside


@triton.jit
def dead_share(dead, columns, DEAD_ROWS: tl.constexpr):
    """The weight of each key in a row without a live one."""
    if DEAD_ROWS == 2:
        share = tl.where(dead, float("nan"), 0.0)
    else:
        share = tl.where(dead, 1.0 / columns, 0.0)
    return share


@triton.jit
def weights_again(
    raw, top, share, b, h, q, k, columns, captured, FACTOR: tl.constexpr, MODE: tl.constexpr
):  # fmt: skip
    """(the score, P) of a tile. MODE 0: every key is live, 1: some are, 2: only rows without any count."""
    s = scored(raw, b, h, q, k, columns, captured)
    if MODE == 2:
        weights = tl.where(k < columns, share, 0.0)
    else:
        weights = weights_of(s, top, FACTOR) * share
    if MODE == 1:
        weights = tl.where(is_live(b, h, q, k, columns, captured) & (k < columns), weights, 0.0)
    return s, weights


@triton.jit
def score_gradient(of_scores, s, raw, b, h, q, k, columns, captured):
    """dS before the score program."""
    of_raw = score_slope(of_scores, raw, b, h, q, k, columns, captured)
    return stopped(of_raw, s, b, h, q, k, columns, captured)


@triton.jit
def tile_again(
    q_tile, grad_tile, top, share, k_base, v_base, k_stride_s, v_stride_s, place, b, h, q, heads, rows,
    columns, captured, SCALE: tl.constexpr, FACTOR: tl.constexpr, WIDTH: tl.constexpr, WIDTH_V: tl.constexpr,
    BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr, BLOCK_N: tl.constexpr, MODE: tl.constexpr,
):  # fmt: skip
    """(K, k, the scaled product, the score, P, dP) of a tile of queries and the keys from `place` on."""
    k = (place + tl.arange(0, BLOCK_N))[None, :]
    k_tile = load_rows(k_base, place, k_stride_s, columns, BLOCK_N, WIDTH, BLOCK_D, MODE != 0)
    v_tile = load_rows(v_base, place, v_stride_s, columns, BLOCK_N, WIDTH_V, BLOCK_DV, MODE != 0)
    raw = tl.dot(q_tile, tl.trans(k_tile), input_precision="ieee")
    if SCALE != 1.0:
        raw *= SCALE
    s, weights = weights_again(raw, top, share, b, h, q, k, columns, captured, FACTOR, MODE)
    of_weights = tl.dot(grad_tile, tl.trans(v_tile), input_precision="ieee")
    of_weights = dropped(of_weights, b, h, q, k, heads, rows, columns, captured)
    return k_tile, k, raw, s, weights, of_weights


@triton.jit
def add_to_queries(
    acc, numbers, q_tile, grad_tile, top, share, delta, k_base, v_base, k_stride_s, v_stride_s, start, end,
    b, h, q, heads, rows, columns, captured,
    SCALE: tl.constexpr, FACTOR: tl.constexpr, WIDTH: tl.constexpr, WIDTH_V: tl.constexpr,
    BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr, BLOCK_N: tl.constexpr, MODE: tl.constexpr,
    LEARNED: tl.constexpr,
):  # fmt: skip
    """What the keys ``[start, end)`` add to dQ, and to the gradient of a learned number, of a tile."""
    for place in tl.range(start, end, BLOCK_N):
        k_tile, k, raw, s, weights, of_weights = tile_again(
            q_tile, grad_tile, top, share, k_base, v_base, k_stride_s, v_stride_s, place, b, h, q, heads,
            rows, columns, captured, SCALE, FACTOR, WIDTH, WIDTH_V, BLOCK_D, BLOCK_DV, BLOCK_N, MODE,
        )  # fmt: skip
        of_scores = weights * (of_weights - delta)
        if LEARNED >= 0:
            numbers += tl.sum(of_scores * learned(raw, b, h, q, k, columns, LEARNED, captured), 1)
        of_raw = score_gradient(of_scores, s, raw, b, h, q, k, columns, captured)
        acc = tl.dot(of_raw.to(k_tile.dtype), k_tile, acc, input_precision="ieee")
    return acc, numbers


@triton.jit
def add_to_keys(
    of_key, of_value, k_tile, v_tile, q_base, grad_base, sums_ptr, delta_ptr, q_stride_h, q_stride_s,
    grad_stride_h, grad_stride_s, start, end, batch, b, group, k, heads, rows, columns, captured,
    SCALE: tl.constexpr, FACTOR: tl.constexpr, GROUP: tl.constexpr, WIDTH: tl.constexpr,
    WIDTH_V: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr, BLOCK_M: tl.constexpr,
    MODE: tl.constexpr, DEAD_ROWS: tl.constexpr, STOPS: tl.constexpr,
):  # fmt: skip
    """What the pairs ``[start, end)`` add to dK and dV of a tile of keys. Scores are (keys, pairs)."""
    for place in tl.range(start, end, BLOCK_M):
        pair = place + tl.arange(0, BLOCK_M)
        queries, heads_of = tl.minimum(pair // GROUP, rows - 1), group * GROUP + pair % GROUP
        h, q, pairs = heads_of[None, :], queries[None, :], rows * GROUP
        q_tile = load_pairs(
            q_base, place, group, q_stride_h, q_stride_s, pairs, GROUP, BLOCK_M, WIDTH, BLOCK_D
        )
        grad_tile = load_pairs(
            grad_base, place, group, grad_stride_h, grad_stride_s, pairs, GROUP, BLOCK_M, WIDTH_V, BLOCK_DV
        )
        top, share, delta, dead = load_sums(
            sums_ptr, delta_ptr, b, heads_of, queries, pair < pairs, batch, heads, rows
        )
        if MODE == 2:
            share = dead_share(dead, columns, DEAD_ROWS)
        raw = tl.dot(k_tile, tl.trans(q_tile), input_precision="ieee")
        if SCALE != 1.0:
            raw *= SCALE
        s, weights = weights_again(
            raw, top[None, :], share[None, :], b, h, q, k, columns, captured, FACTOR, MODE
        )
        kept = dropped(weights, b, h, q, k, heads, rows, columns, captured)
        of_value = tl.dot(kept.to(grad_tile.dtype), grad_tile, of_value, input_precision="ieee")
        if MODE != 2 or not STOPS:
            of_weights = tl.dot(v_tile, tl.trans(grad_tile), input_precision="ieee")
            of_weights = dropped(of_weights, b, h, q, k, heads, rows, columns, captured)
            of_scores = weights * (of_weights - delta[None, :])
            of_raw = score_gradient(of_scores, s, raw, b, h, q, k, columns, captured)
            of_key = tl.dot(of_raw.to(q_tile.dtype), q_tile, of_key, input_precision="ieee")
    return of_key, of_value


@triton.jit
def store_keys(acc, base, stride_s, keys, columns, WIDTH: tl.constexpr, BLOCK: tl.constexpr):
    """Rows of keys, in the dtype of the memory."""
    d = tl.arange(0, BLOCK)[None, :]
    inside = (keys < columns)[:, None] & (d < WIDTH)
    tl.store(
        base + keys.to(tl.int64)[:, None] * aligned(stride_s) + d, acc.to(base.dtype.element_ty), mask=inside
    )


@triton.jit
def dead_pairs(
    sums_ptr, delta_ptr, batch, b, group, heads, rows, GROUP: tl.constexpr, BLOCK_M: tl.constexpr
):  # fmt: skip
    """The pairs between the first and the last row without a live key, in whole tiles."""
    start, behind = rows * GROUP, 0
    for place in tl.range(0, rows * GROUP, BLOCK_M):
        pair = place + tl.arange(0, BLOCK_M)
        queries, heads_of = tl.minimum(pair // GROUP, rows - 1), group * GROUP + pair % GROUP
        inside = pair < rows * GROUP
        _, _, _, dead = load_sums(sums_ptr, delta_ptr, b, heads_of, queries, inside, batch, heads, rows)
        seen = tl.max(dead.to(tl.int32), 0) > 0
        start = tl.where(seen, tl.minimum(start, place), start)
        behind = tl.where(seen, place + BLOCK_M, behind)
    return start, behind


@triton.jit
def crop_pairs(
    low, high, b, group, keys, rows, columns, captured, GROUP: tl.constexpr, BLOCK_M: tl.constexpr,
    CROP: tl.constexpr,
):  # fmt: skip
    """The part of the pairs ``[low, high)`` between the first and the last that see one of `keys`."""
    if CROP:
        start, behind, k = high, low, keys[:, None]
        for place in tl.range(low // BLOCK_M * BLOCK_M, high, BLOCK_M):
            pair = place + tl.arange(0, BLOCK_M)
            q, h = tl.minimum(pair // GROUP, rows - 1)[None, :], (group * GROUP + pair % GROUP)[None, :]
            live = is_live(b, h, q, k, columns, captured) & (k < columns) & (pair < rows * GROUP)[None, :]
            seen = tl.max(tl.max(live.to(tl.int32), 1), 0) > 0
            start = tl.where(seen, tl.minimum(start, place), start)
            behind = tl.where(seen, tl.minimum(place + BLOCK_M, high), behind)
        low, high = tl.maximum(low, start), tl.maximum(behind, tl.maximum(low, start))
    return low, high


@triton.jit
def _attention_dq_kernel(
    grad_ptr, sums_ptr, delta_ptr, q_ptr, k_ptr, v_ptr, dq_ptr, numbers_ptr,
    grad_stride_b, grad_stride_h, grad_stride_s, q_stride_b, q_stride_h, q_stride_s,
    k_stride_b, k_stride_h, k_stride_s, v_stride_b, v_stride_h, v_stride_s,
    dq_stride_b, dq_stride_h, dq_stride_s, batch, groups, rows, columns, captured,
    SCALE: tl.constexpr, FACTOR: tl.constexpr, GROUP: tl.constexpr,
    WIDTH: tl.constexpr, WIDTH_V: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr,
    OF_SCORES: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, PIECES: tl.constexpr,
    PARTS: tl.constexpr, CROP: tl.constexpr, DEAD_ROWS: tl.constexpr, STOPS: tl.constexpr,
    LEARNED: tl.constexpr, LEARNED_DEAD: tl.constexpr,
):  # fmt: skip
    """dQ of one tile of (query, head) pairs of one group of heads."""
    pairs, heads = rows * GROUP, groups * GROUP
    b, group, begin, pair, queries, heads_of, first, last = tile_of_pairs(groups, rows, GROUP, BLOCK_M)
    h, q, inside = heads_of[:, None], queries[:, None], pair < pairs
    q_base, grad_base = head_of(q_ptr, b, b, q_stride_b, 0), head_of(grad_ptr, b, b, grad_stride_b, 0)
    k_base = head_of(k_ptr, b, group, k_stride_b, k_stride_h)
    v_base = head_of(v_ptr, b, group, v_stride_b, v_stride_h)
    q_tile = load_pairs(q_base, begin, group, q_stride_h, q_stride_s, pairs, GROUP, BLOCK_M, WIDTH, BLOCK_D)
    grad_tile = load_pairs(
        grad_base, begin, group, grad_stride_h, grad_stride_s, pairs, GROUP, BLOCK_M, WIDTH_V, BLOCK_DV
    )
    top, share, delta, dead = load_sums(sums_ptr, delta_ptr, b, heads_of, queries, inside, batch, heads, rows)
    acc, numbers, edge = tl.zeros((BLOCK_M, BLOCK_D), tl.float32), tl.zeros((BLOCK_M,), tl.float32), 0
    for piece in tl.static_range(PIECES):
        low, full_low, full_high, high = columns_of(b, first, last, columns, piece, captured)
        low, high = crop(low, high, pair, pairs, b, h, q, columns, captured, BLOCK_N, CROP)
        bounds = whole_tiles(low, full_low, full_high, high, edge, BLOCK_N)
        for part in tl.static_range(3):
            if (PARTS >> part) % 2 == 1:
                acc, numbers = add_to_queries(
                    acc, numbers, q_tile, grad_tile, top[:, None], share[:, None], delta[:, None],
                    k_base, v_base, k_stride_s, v_stride_s, bounds[part], bounds[part + 1],
                    b, h, q, heads, rows, columns, captured, SCALE, FACTOR, WIDTH, WIDTH_V,
                    BLOCK_D, BLOCK_DV, BLOCK_N, 0 if part == 1 else 1, LEARNED,
                )  # fmt: skip
        edge = bounds[3]
    if DEAD_ROWS != 0 and not STOPS:
        end = tl.where(tl.max(dead.to(tl.int32), 0) > 0, columns, 0)
        acc, numbers = add_to_queries(
            acc, numbers, q_tile, grad_tile, top[:, None], dead_share(dead, columns, DEAD_ROWS)[:, None],
            delta[:, None], k_base, v_base, k_stride_s, v_stride_s, 0, end, b, h, q, heads, rows, columns,
            captured, SCALE, FACTOR, WIDTH, WIDTH_V, BLOCK_D, BLOCK_DV, BLOCK_N, 2, LEARNED_DEAD,
        )  # fmt: skip
    store_pairs(
        acc * OF_SCORES, dq_ptr, dq_stride_b, dq_stride_h, dq_stride_s, pair, pairs, b, heads_of, queries,
        WIDTH, BLOCK_D,
    )  # fmt: skip
    if LEARNED >= 0:
        tl.store(numbers_ptr + (b.to(tl.int64) * heads + heads_of) * rows + queries, numbers, mask=inside)


@triton.jit
def _attention_dkdv_kernel(
    grad_ptr, sums_ptr, delta_ptr, q_ptr, k_ptr, v_ptr, dk_ptr, dv_ptr,
    grad_stride_b, grad_stride_h, grad_stride_s, q_stride_b, q_stride_h, q_stride_s,
    k_stride_b, k_stride_h, k_stride_s, v_stride_b, v_stride_h, v_stride_s,
    dk_stride_b, dk_stride_h, dk_stride_s, dv_stride_b, dv_stride_h, dv_stride_s,
    batch, groups, rows, columns, captured,
    SCALE: tl.constexpr, FACTOR: tl.constexpr, GROUP: tl.constexpr,
    WIDTH: tl.constexpr, WIDTH_V: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr,
    OF_SCORES: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, PIECES: tl.constexpr,
    PARTS: tl.constexpr, CROP: tl.constexpr, DEAD_ROWS: tl.constexpr, STOPS: tl.constexpr,
):  # fmt: skip
    """dK and dV of one tile of keys of one group of heads."""
    heads, tiles = groups * GROUP, tl.cdiv(columns, BLOCK_N)
    group, b = tl.program_id(0) // tiles % groups, tl.program_id(0) // tiles // groups
    first = tl.program_id(0) % tiles * BLOCK_N
    keys, last = first + tl.arange(0, BLOCK_N), tl.minimum(first + BLOCK_N, columns) - 1
    q_base, grad_base = head_of(q_ptr, b, b, q_stride_b, 0), head_of(grad_ptr, b, b, grad_stride_b, 0)
    k_base = head_of(k_ptr, b, group, k_stride_b, k_stride_h)
    v_base = head_of(v_ptr, b, group, v_stride_b, v_stride_h)
    k_tile = load_rows(k_base, first, k_stride_s, columns, BLOCK_N, WIDTH, BLOCK_D, True)
    v_tile = load_rows(v_base, first, v_stride_s, columns, BLOCK_N, WIDTH_V, BLOCK_DV, True)
    of_key, of_value = tl.zeros((BLOCK_N, BLOCK_D), tl.float32), tl.zeros((BLOCK_N, BLOCK_DV), tl.float32)
    edge = 0
    for piece in tl.static_range(PIECES):
        low, full_low, full_high, high = rows_of(b, first, last, rows, piece, captured)
        low, high = crop_pairs(
            low * GROUP, high * GROUP, b, group, keys, rows, columns, captured, GROUP, BLOCK_M, CROP
        )
        bounds = whole_tiles(low, full_low * GROUP, full_high * GROUP, high, edge, BLOCK_M)
        for part in tl.static_range(3):
            if (PARTS >> part) % 2 == 1:
                of_key, of_value = add_to_keys(
                    of_key, of_value, k_tile, v_tile, q_base, grad_base, sums_ptr, delta_ptr, q_stride_h,
                    q_stride_s, grad_stride_h, grad_stride_s, bounds[part], bounds[part + 1], batch, b, group,
                    keys[:, None], heads, rows, columns, captured, SCALE, FACTOR, GROUP, WIDTH, WIDTH_V,
                    BLOCK_D, BLOCK_DV, BLOCK_M, 0 if part == 1 else 1, DEAD_ROWS, STOPS,
                )  # fmt: skip
        edge = bounds[3]
    if DEAD_ROWS != 0:
        low, high = dead_pairs(sums_ptr, delta_ptr, batch, b, group, heads, rows, GROUP, BLOCK_M)
        of_key, of_value = add_to_keys(
            of_key, of_value, k_tile, v_tile, q_base, grad_base, sums_ptr, delta_ptr, q_stride_h,
            q_stride_s, grad_stride_h, grad_stride_s, low, high, batch, b, group, keys[:, None], heads,
            rows, columns, captured, SCALE, FACTOR, GROUP, WIDTH, WIDTH_V, BLOCK_D, BLOCK_DV, BLOCK_M,
            2, DEAD_ROWS, STOPS,
        )  # fmt: skip
    dk = head_of(dk_ptr, b, group, dk_stride_b, dk_stride_h)
    dv = head_of(dv_ptr, b, group, dv_stride_b, dv_stride_h)
    store_keys(of_key * OF_SCORES, dk, dk_stride_s, keys, columns, WIDTH, BLOCK_D)
    store_keys(of_value, dv, dv_stride_s, keys, columns, WIDTH_V, BLOCK_DV)
