"""Attention, backward: the number D that a softmax subtracts from the gradients of a row.

    D = rowsum(dO * O), or rowsum(P * dP) / rowsum(P)

They are equal but for rounding. The first reads two rows. The second computes the scores once more, and is
rounded as dP itself is: in a row of few keys the difference dP - D is small, and with the first it loses up
to half of its digits more; so it does where one key has nearly all of the weight, as large biases make it. It
is for float32, and where what scores read is learned.
"""

import triton
import triton.language as tl

from fxopt.kernels.attention_backward import dead_share, load_sums, tile_again
from fxopt.kernels.attention_forward import crop, head_of, load_pairs, load_rows, tile_of_pairs, whole_tiles
from fxopt.kernels.example_functions import columns_of

# --- All below is copied into kernels' files as it stands.


@triton.jit
def _attention_delta_kernel(
    grad_ptr, out_ptr, delta_ptr, grad_stride_b, grad_stride_h, grad_stride_s, out_stride_b, out_stride_h,
    out_stride_s, heads, rows, WIDTH_V: tl.constexpr, BLOCK_DV: tl.constexpr, BLOCK_M: tl.constexpr,
):  # fmt: skip
    """rowsum(dO * O) of BLOCK_M rows of one head, in float32."""
    tiles = tl.cdiv(rows, BLOCK_M)
    head = tl.program_id(0) // tiles
    h, b = (head % heads).to(tl.int64), (head // heads).to(tl.int64)
    start = tl.program_id(0) % tiles * BLOCK_M
    q = start + tl.arange(0, BLOCK_M)
    grad_base = head_of(grad_ptr, b, h, grad_stride_b, grad_stride_h)
    out_base = head_of(out_ptr, b, h, out_stride_b, out_stride_h)
    grad = load_rows(grad_base, start, grad_stride_s, rows, BLOCK_M, WIDTH_V, BLOCK_DV, True)
    out = load_rows(out_base, start, out_stride_s, rows, BLOCK_M, WIDTH_V, BLOCK_DV, True)
    delta = tl.sum(grad.to(tl.float32) * out.to(tl.float32), 1)
    tl.store(delta_ptr + head.to(tl.int64) * rows + q, delta, mask=q < rows)


@triton.jit
def add_to_delta(
    acc, total, q_tile, grad_tile, top, share, k_base, v_base, k_stride_s, v_stride_s, start, end,
    b, h, q, heads, rows, columns, captured,
    SCALE: tl.constexpr, FACTOR: tl.constexpr, WIDTH: tl.constexpr, WIDTH_V: tl.constexpr,
    BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr, BLOCK_N: tl.constexpr, MODE: tl.constexpr,
):  # fmt: skip
    """What the keys ``[start, end)`` add to rowsum(P * dP) and to rowsum(P)."""
    for place in tl.range(start, end, BLOCK_N):
        _, _, _, _, weights, of_weights = tile_again(
            q_tile, grad_tile, top, share, k_base, v_base, k_stride_s, v_stride_s, place, b, h, q, heads,
            rows, columns, captured, SCALE, FACTOR, WIDTH, WIDTH_V, BLOCK_D, BLOCK_DV, BLOCK_N, MODE,
        )  # fmt: skip
        acc += tl.sum(weights * of_weights, 1)
        total += tl.sum(weights, 1)
    return acc, total


@triton.jit
def _attention_delta_again_kernel(
    grad_ptr, q_ptr, k_ptr, v_ptr, sums_ptr, delta_ptr,
    grad_stride_b, grad_stride_h, grad_stride_s, q_stride_b, q_stride_h, q_stride_s,
    k_stride_b, k_stride_h, k_stride_s, v_stride_b, v_stride_h, v_stride_s,
    batch, groups, rows, columns, captured,
    SCALE: tl.constexpr, FACTOR: tl.constexpr, GROUP: tl.constexpr, WIDTH: tl.constexpr,
    WIDTH_V: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr, BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr, PIECES: tl.constexpr, PARTS: tl.constexpr, CROP: tl.constexpr,
    DEAD_ROWS: tl.constexpr, STOPS: tl.constexpr,
):  # fmt: skip
    """D of one tile of (query, head) pairs of one group of heads, from the weights."""
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
    top, share, _, dead = load_sums(sums_ptr, sums_ptr, b, heads_of, queries, inside, batch, heads, rows)
    acc, total, edge = tl.zeros((BLOCK_M,), tl.float32), tl.zeros((BLOCK_M,), tl.float32), 0
    for piece in tl.static_range(PIECES):
        low, full_low, full_high, high = columns_of(b, first, last, columns, piece, captured)
        low, high = crop(low, high, pair, pairs, b, h, q, columns, captured, BLOCK_N, CROP)
        bounds = whole_tiles(low, full_low, full_high, high, edge, BLOCK_N)
        for part in tl.static_range(3):
            if (PARTS >> part) % 2 == 1:
                acc, total = add_to_delta(
                    acc, total, q_tile, grad_tile, top[:, None], share[:, None], k_base, v_base, k_stride_s,
                    v_stride_s, bounds[part], bounds[part + 1], b, h, q, heads, rows, columns, captured,
                    SCALE, FACTOR, WIDTH, WIDTH_V, BLOCK_D, BLOCK_DV, BLOCK_N, 0 if part == 1 else 1,
                )  # fmt: skip
        edge = bounds[3]
    if DEAD_ROWS != 0 and not STOPS:
        end = tl.where(tl.max(dead.to(tl.int32), 0) > 0, columns, 0)
        acc, total = add_to_delta(
            acc, total, q_tile, grad_tile, top[:, None], dead_share(dead, columns, DEAD_ROWS)[:, None],
            k_base, v_base, k_stride_s, v_stride_s, 0, end, b, h, q, heads, rows, columns, captured,
            SCALE, FACTOR, WIDTH, WIDTH_V, BLOCK_D, BLOCK_DV, BLOCK_N, 2,
        )  # fmt: skip
    acc = acc / tl.where(total == 0.0, 1.0, total)
    tl.store(delta_ptr + (b.to(tl.int64) * heads + heads_of) * rows + queries, acc, mask=inside)
