"""Attention, backward: gradients of captured tensors that scores read at their indices.

    of a matrix, c[.., q, k]:   dc[q, k] = the sum of dS * `learned` over all (b, h) that share it
    of a table, c[.., t(q, k)]: dc[t]    = the same sum over all (q, k) that read the entry t, `entry_of` says

A program of a matrix has one tile of (q, k), in which it sums over sequences and heads. Of a table, programs
have some of its entries and some of the queries: they sum tiles in the same way, and then, entry by entry,
what belongs to it. Keys of which no query reads one of their entries are passed over. The sums of parts of
the queries are added by `_attention_table_total_kernel`. The scores are computed once more; no buffer has an
entry for each score, nothing is added atomically, and equal inputs give equal bits.

`BY_B`, `BY_H` say whether the captured tensor has an index b, or h, of its own. `LEARNED` is its place among
those that are captured, and `LEARNED_DEAD` the same, or -1 where rows without a live key give it no gradient.
"""

import triton
import triton.language as tl

from fxopt.kernels.attention_backward import dead_share, load_sums, tile_again
from fxopt.kernels.attention_forward import head_of, load_rows
from fxopt.kernels.example_functions import columns_of, entry_of, learned

# --- All below is copied into kernels' files as it stands.


@triton.jit
def head_at(place, b, h, heads, BY_B: tl.constexpr, BY_H: tl.constexpr):
    """The head `place` among those that share what is captured, which is of b, or h, if it has them."""
    if not BY_B and not BY_H:
        b, h = b + place // heads, h + place % heads
    elif BY_H and not BY_B:
        b = b + place
    elif BY_B and not BY_H:
        h = h + place
    return b, h


@triton.jit
def line_at(place, heads, BY_B: tl.constexpr, BY_H: tl.constexpr):
    """(b, h) of what is captured: there is one for each b, or h, that is an index of it; else 0."""
    b, h = place * 0, place * 0
    if BY_H:
        h, place = place % heads, place // heads
    if BY_B:
        b = place
    return b, h


@triton.jit
def line_of(ptr, b, h, stride_b, stride_h):
    """Where the gradient of what is captured for one head begins."""
    return ptr + b.to(tl.int64) * stride_b + h.to(tl.int64) * stride_h


@triton.jit
def shared_by(batch, heads, BY_B: tl.constexpr, BY_H: tl.constexpr):
    """How many heads of all sequences share one captured number."""
    count = batch * heads
    if BY_B:
        count = count // batch
    if BY_H:
        count = count // heads
    return count


@triton.jit
def is_visited(b, first, last, start, columns, captured, PIECES: tl.constexpr, BLOCK_N: tl.constexpr):
    """One of the queries may see one of the keys from `start` on."""
    found = start < 0
    for piece in tl.static_range(PIECES):
        low, _, _, high = columns_of(b, first, last, columns, piece, captured)
        found = found | ((low < start + BLOCK_N) & (high > start))
    return found


@triton.jit
def add_to_tile(
    acc, grad_ptr, q_ptr, k_ptr, v_ptr, sums_ptr, delta_ptr, grad_stride_b, grad_stride_h, grad_stride_s,
    q_stride_b, q_stride_h, q_stride_s, k_stride_b, k_stride_h, k_stride_s, v_stride_b, v_stride_h,
    v_stride_s, b_0, h_0, begin, end, start_q, start_k, batch, groups, rows, columns, captured,
    SCALE: tl.constexpr, FACTOR: tl.constexpr, GROUP: tl.constexpr, WIDTH: tl.constexpr,
    WIDTH_V: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr, BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr, PIECES: tl.constexpr, DEAD_ROWS: tl.constexpr, BY_B: tl.constexpr,
    BY_H: tl.constexpr, LEARNED: tl.constexpr, LEARNED_DEAD: tl.constexpr,
):  # fmt: skip
    """dS * `learned` of a tile of queries and keys, of the heads `begin` to `end` of those that share it."""
    heads = groups * GROUP
    row = start_q + tl.arange(0, BLOCK_M)
    queries, last = tl.minimum(row, rows - 1), tl.minimum(start_q + BLOCK_M, rows) - 1
    q = queries[:, None]
    for place in tl.range(begin, end):
        b, h = head_at(place, b_0, h_0, heads, BY_B, BY_H)
        top, share, delta, dead = load_sums(
            sums_ptr, delta_ptr, b, h, queries, row < rows, batch, heads, rows
        )
        visited = is_visited(b, start_q, last, start_k, columns, captured, PIECES, BLOCK_N)
        if DEAD_ROWS != 0 and LEARNED_DEAD >= 0:
            visited = visited | (tl.max(dead.to(tl.int32), 0) > 0)
        if visited:
            q_base = head_of(q_ptr, b, h, q_stride_b, q_stride_h)
            grad_base = head_of(grad_ptr, b, h, grad_stride_b, grad_stride_h)
            k_base = head_of(k_ptr, b, h // GROUP, k_stride_b, k_stride_h)
            v_base = head_of(v_ptr, b, h // GROUP, v_stride_b, v_stride_h)
            q_tile = load_rows(q_base, start_q, q_stride_s, rows, BLOCK_M, WIDTH, BLOCK_D, True)
            grad_tile = load_rows(grad_base, start_q, grad_stride_s, rows, BLOCK_M, WIDTH_V, BLOCK_DV, True)
            _, k, raw, _, weights, of_weights = tile_again(
                q_tile, grad_tile, top[:, None], share[:, None], k_base, v_base, k_stride_s, v_stride_s,
                start_k, b, h, q, heads, rows, columns, captured, SCALE, FACTOR, WIDTH, WIDTH_V, BLOCK_D,
                BLOCK_DV, BLOCK_N, 1,
            )  # fmt: skip
            if DEAD_ROWS != 0 and LEARNED_DEAD >= 0:
                alike = dead_share(dead, columns, DEAD_ROWS)[:, None]
                weights += tl.where((k < columns) & dead[:, None], alike, 0.0)
            of_scores = weights * (of_weights - delta[:, None])
            acc += of_scores * learned(raw, b, h, q, k, columns, LEARNED, captured)
    return acc


@triton.jit
def _attention_matrix_kernel(
    grad_ptr, q_ptr, k_ptr, v_ptr, sums_ptr, delta_ptr, of_ptr, grad_stride_b, grad_stride_h, grad_stride_s,
    q_stride_b, q_stride_h, q_stride_s, k_stride_b, k_stride_h, k_stride_s, v_stride_b, v_stride_h,
    v_stride_s, of_stride_b, of_stride_h, of_stride_q, of_stride_k, batch, groups, rows, columns, captured,
    SCALE: tl.constexpr, FACTOR: tl.constexpr, GROUP: tl.constexpr, WIDTH: tl.constexpr,
    WIDTH_V: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr, BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr, PIECES: tl.constexpr, DEAD_ROWS: tl.constexpr, BY_B: tl.constexpr,
    BY_H: tl.constexpr, LEARNED: tl.constexpr, LEARNED_DEAD: tl.constexpr,
):  # fmt: skip
    """The gradient of one tile of a matrix of biases."""
    heads, tiles_k = groups * GROUP, tl.cdiv(columns, BLOCK_N)
    tiles = tl.cdiv(rows, BLOCK_M) * tiles_k
    tile = tl.program_id(0) % tiles
    b, h = line_at(tl.program_id(0) // tiles, heads, BY_B, BY_H)
    start_q, start_k = tile // tiles_k * BLOCK_M, tile % tiles_k * BLOCK_N
    acc = add_to_tile(
        tl.zeros((BLOCK_M, BLOCK_N), tl.float32), grad_ptr, q_ptr, k_ptr, v_ptr, sums_ptr, delta_ptr,
        grad_stride_b, grad_stride_h, grad_stride_s, q_stride_b, q_stride_h, q_stride_s, k_stride_b,
        k_stride_h, k_stride_s, v_stride_b, v_stride_h, v_stride_s, b, h, 0,
        shared_by(batch, heads, BY_B, BY_H), start_q, start_k, batch, groups, rows, columns, captured, SCALE,
        FACTOR, GROUP, WIDTH, WIDTH_V, BLOCK_D, BLOCK_DV, BLOCK_M, BLOCK_N, PIECES, DEAD_ROWS, BY_B, BY_H,
        LEARNED, LEARNED_DEAD,
    )  # fmt: skip
    row, column = start_q + tl.arange(0, BLOCK_M), start_k + tl.arange(0, BLOCK_N)
    places = row.to(tl.int64)[:, None] * of_stride_q + column.to(tl.int64)[None, :] * of_stride_k
    inside = (row < rows)[:, None] & (column < columns)[None, :]
    base = line_of(of_ptr, b, h, of_stride_b, of_stride_h)
    tl.store(base + places, acc.to(of_ptr.dtype.element_ty), mask=inside)


@triton.jit
def _attention_table_kernel(
    grad_ptr, q_ptr, k_ptr, v_ptr, sums_ptr, delta_ptr, parts_ptr, grad_stride_b, grad_stride_h,
    grad_stride_s, q_stride_b, q_stride_h, q_stride_s, k_stride_b, k_stride_h, k_stride_s, v_stride_b,
    v_stride_h, v_stride_s, entries, batch, groups, rows, columns, captured, SCALE: tl.constexpr,
    FACTOR: tl.constexpr, GROUP: tl.constexpr, WIDTH: tl.constexpr, WIDTH_V: tl.constexpr,
    BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    PIECES: tl.constexpr, DEAD_ROWS: tl.constexpr, BY_B: tl.constexpr, BY_H: tl.constexpr,
    LEARNED: tl.constexpr, LEARNED_DEAD: tl.constexpr, SPLITS: tl.constexpr, TOGETHER: tl.constexpr,
    BLOCK_T: tl.constexpr,
):  # fmt: skip
    """What a part of the queries adds to BLOCK_T entries. TOGETHER: all heads of a table read it alike."""
    heads, zero, blocks = groups * GROUP, tl.program_id(0) * 0, tl.cdiv(entries, BLOCK_T)
    block, split = tl.program_id(0) % blocks, tl.program_id(0) // blocks % SPLITS
    line = tl.program_id(0) // blocks // SPLITS  # of the table: each of b, or h, has one
    b_0, h_0 = line_at(line, heads, BY_B, BY_H)
    entry, shared = block * BLOCK_T + tl.arange(0, BLOCK_T), shared_by(batch, heads, BY_B, BY_H)
    work = tl.cdiv(rows, BLOCK_M) * shared
    share = tl.cdiv(work, SPLITS)
    begin, end = tl.minimum(split * share, work), tl.minimum(split * share + share, work)
    step, steps, tiles_k = zero + 1, shared, tl.cdiv(columns, BLOCK_N)
    if TOGETHER:
        step, steps = shared, zero + 1
    total = tl.zeros((BLOCK_T,), tl.float32)
    # One loop over tiles and heads: of three, within each other, the compiler keeps too much in registers.
    for item in tl.range(begin // shared * tiles_k * steps, tl.cdiv(end, shared) * tiles_k * steps):
        tile, start = item // (tiles_k * steps), item // steps % tiles_k * BLOCK_N
        head = tl.maximum(begin - tile * shared, item % steps * step)
        behind = tl.minimum(end - tile * shared, item % steps * step + step)
        q = tl.minimum(tile * BLOCK_M + tl.arange(0, BLOCK_M), rows - 1)[:, None]
        k = (start + tl.arange(0, BLOCK_N))[None, :]
        b, h = head_at(head, b_0, h_0, heads, BY_B, BY_H)
        at = entry_of(b, h, q, k, columns, LEARNED, captured).to(tl.int32) + (q + k) * 0
        low = tl.maximum(tl.min(tl.min(at, 1), 0), block * BLOCK_T)
        high = tl.minimum(tl.max(tl.max(at, 1), 0) + 1, block * BLOCK_T + BLOCK_T)
        if (low < high) & (head < behind):
            acc = add_to_tile(
                tl.zeros((BLOCK_M, BLOCK_N), tl.float32), grad_ptr, q_ptr, k_ptr, v_ptr, sums_ptr, delta_ptr,
                grad_stride_b, grad_stride_h, grad_stride_s, q_stride_b, q_stride_h, q_stride_s, k_stride_b,
                k_stride_h, k_stride_s, v_stride_b, v_stride_h, v_stride_s, b_0, h_0, head, behind,
                tile * BLOCK_M, start, batch, groups, rows, columns, captured, SCALE, FACTOR, GROUP, WIDTH,
                WIDTH_V, BLOCK_D, BLOCK_DV, BLOCK_M, BLOCK_N, PIECES, DEAD_ROWS, BY_B, BY_H, LEARNED,
                LEARNED_DEAD,
            )  # fmt: skip
            for one in tl.range(low, high):
                found = tl.sum(tl.sum(tl.where(at == one, acc, 0.0), 1), 0)
                total += tl.where(entry == one, found, 0.0)
    lines = tl.num_programs(0) // blocks // SPLITS
    parts = parts_ptr + ((zero + split).to(tl.int64) * lines + line) * entries
    tl.store(parts + entry, total, mask=entry < entries)


@triton.jit
def _attention_table_total_kernel(
    parts_ptr, of_ptr, of_stride_b, of_stride_h, of_stride_entry, entries, groups, GROUP: tl.constexpr,
    BY_B: tl.constexpr, BY_H: tl.constexpr, SPLITS: tl.constexpr, BLOCK_T: tl.constexpr,
):  # fmt: skip
    """The gradient of BLOCK_T entries of a table, from its parts."""
    blocks, heads = tl.cdiv(entries, BLOCK_T), groups * GROUP
    line, lines = tl.program_id(0) // blocks, tl.num_programs(0) // blocks
    b, h = line_at(line, heads, BY_B, BY_H)
    entry = tl.program_id(0) % blocks * BLOCK_T + tl.arange(0, BLOCK_T)
    total = tl.zeros((BLOCK_T,), tl.float32)
    for split in tl.range(0, SPLITS):
        part = parts_ptr + ((line * 0 + split).to(tl.int64) * lines + line) * entries
        total += tl.load(part + entry, mask=entry < entries, other=0.0)
    places = line_of(of_ptr, b, h, of_stride_b, of_stride_h) + entry.to(tl.int64) * of_stride_entry
    tl.store(places, total.to(of_ptr.dtype.element_ty), mask=entry < entries)
