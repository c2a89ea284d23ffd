"""Attention, backward: gradients of what scores share, each summed in one order.

of a sink:             dsink = -sum over (b, q) of exp(sink - m) / l * D
of a number by head:   the sum over its sequences and queries of what `_attention_dq_kernel` has left in
                       (B, Hq, Sq)
"""

import triton
import triton.language as tl

from fxopt.kernels.attention_backward import load_sums
from fxopt.kernels.attention_forward import LOG2E

# --- All below is copied into kernels' files as it stands.


@triton.jit
def _attention_sinks_kernel(
    sums_ptr, delta_ptr, sinks_ptr, of_sinks_ptr, batch, heads, rows,
    FACTOR: tl.constexpr, BLOCK_M: tl.constexpr,
):  # fmt: skip
    """The gradient of the sink of one head."""
    h = tl.program_id(0)
    sink = tl.load(sinks_ptr + h).to(tl.float32)
    if FACTOR != 0:
        sink *= LOG2E
    acc = tl.zeros((BLOCK_M,), tl.float32)
    for b in tl.range(0, batch):
        for start in tl.range(0, rows, BLOCK_M):
            q = start + tl.arange(0, BLOCK_M)
            top, share, delta, _ = load_sums(
                sums_ptr, delta_ptr, b + h * 0, h, q, q < rows, batch, heads, rows
            )
            away = sink - top
            if FACTOR == 0:
                away *= LOG2E
            acc -= tl.exp2(away) * share * delta
    tl.store(of_sinks_ptr + h, tl.sum(acc, 0).to(of_sinks_ptr.dtype.element_ty))


@triton.jit
def _attention_numbers_kernel(
    numbers_ptr, of_numbers_ptr, batch, heads, rows, stride_b, stride_h,
    BY_B: tl.constexpr, BY_H: tl.constexpr, BLOCK_M: tl.constexpr,
):  # fmt: skip
    """The gradient of one number: the sum over the sequences, heads and queries that read it."""
    place = tl.program_id(0)
    zero = place * 0
    first_h, last_h, first_b, last_b = 0, heads, 0, batch
    if BY_H:
        first_h, last_h, place = place % heads, place % heads + 1, place // heads
    if BY_B:
        first_b, last_b = place, place + 1
    acc = tl.zeros((BLOCK_M,), tl.float32)
    for b in tl.range(first_b, last_b):
        for h in tl.range(first_h, last_h):
            for start in tl.range(0, rows, BLOCK_M):
                q = start + tl.arange(0, BLOCK_M)
                at = ((zero + b).to(tl.int64) * heads + h) * rows + q
                acc += tl.load(numbers_ptr + at, mask=q < rows, other=0.0)
    number = of_numbers_ptr
    if BY_B:
        number += (zero + first_b).to(tl.int64) * stride_b
    if BY_H:
        number += (zero + first_h).to(tl.int64) * stride_h
    tl.store(number, tl.sum(acc, 0).to(of_numbers_ptr.dtype.element_ty))
