"""A model of how long a launch with matrix products takes on a GPU, and of which tiles fit there.

A program multiplies a tile of rows by one of columns, a block of the depth at a time. It cannot be faster
than the matrix units, than L2 hands out the operands, or than memory is read with the bytes that are under
way; what does not fill the last wave of programs is idle. The model orders tiles; it promises no times.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator
from dataclasses import dataclass

import torch

from fxopt.codegen.kernel_file import Products
from fxopt.ir.target import Target

LATENCY = 7e-7  # seconds from a load to its value, out of memory
_L2_LATENCY = 5e-7  # seconds, of what is partly in L2
_L2_RATE = 3.0  # as a multiple of the bandwidth of memory
_LAUNCH = 2e-6  # seconds for which a GPU is not yet, or no longer, busy
_ENDS = 1.5e-6  # seconds of a program before its first multiplication and behind its last
BLOCKS_PER_SM = 32
_ADDRESSES = 48  # registers of a thread for addresses, masks and operands on their way to the matrix units
_SUMS = 128  # registers of a thread for sums where nothing follows the product
_SUMS_AND_MORE = 64  # the same where products meet or other tensors are read
# The same without the matrix units, where a thread holds its operands for a whole block, too, and where the
# sums are exchanged between threads.
_FEWEST_SUMS = 32
_WIDENED = 64  # weights that a thread widens for a block
_LOOKED_UP = 4  # bytes of shared memory for an entry of a table, which Triton loads ahead like operands
_UNROLLED = 512  # multiplications of a thread for a block, without the matrix units: all are written out
_DEEPEST_AT_ONCE = 64  # columns of the depth, without them, where one block is all of it
ROWS, COLUMNS, DEPTHS = (16, 32, 64, 128, 256), (16, 32, 64, 128, 256), (16, 32, 64, 128)
WARPS, STAGES = (4, 8), (2, 3, 4)  # more warps than 8 have too few registers each for what follows
WARPS_OF_A_ROW = (1, 2, 4, 8)
LEAST = 16  # of each dimension of a block for the matrix units
_ANY = Target.named("sm_90")  # whose figures order tiles where no target is known


@dataclass(frozen=True)
class Block:
    """What a program has at once.

    Attributes:
        operands: tensors that it reads and writes.
    """

    rows: int
    columns: int
    depth: int
    warps: int
    stages: int
    operands: int


def blocks_per_sm(sizes: Products, block: Block, target: Target) -> int:
    """How many programs an SM holds at once; 0 where one is too many."""
    threads = block.warps * target.warp_size
    sums = block.rows * block.columns * sizes.together / threads
    width = _dtype(sizes).itemsize
    if block.rows == 1:
        each = block.columns * block.depth * sizes.together / threads
        registers, shared = _ADDRESSES + math.ceil(each * (1 + width / 4)), 0
    else:
        most = _most_sums(sizes, block, target)
        if sums > most or (not sizes.on_matrix_units and _is_too_deep(sizes, block, sums)):
            return 0
        registers = _ADDRESSES + math.ceil(sums)
        shared = block.stages * _bytes_of_step(sizes, block)
        if sizes.stored:  # weights are in shared memory again on their way to the matrix units
            widened = block.columns * sizes.together * block.depth * sizes.summands
            shared += widened * (width + (_LOOKED_UP if sizes.looked_up else 0))
            # Where operands are in registers more warps are more rows: each widens the weights for its own.
            if widened / (threads if target.multiplies_from_shared else 4 * target.warp_size) > _WIDENED:
                return 0
    if registers > target.max_registers or shared > target.shared_per_block or threads > 1024:
        return 0
    return min(
        target.threads_per_sm // threads,
        target.registers_per_sm // (registers * threads),
        target.shared_per_sm // shared if shared else BLOCKS_PER_SM,
        BLOCKS_PER_SM,
    )


def _is_too_deep(sizes: Products, block: Block, sums: float) -> bool:
    """Without the matrix units: more is written out than there are registers for, soonest without a loop."""
    is_loop = block.depth < sizes.depth / sizes.pieces
    return sums * block.depth > _UNROLLED or (not is_loop and block.depth > _DEEPEST_AT_ONCE)


def _most_sums(sizes: Products, block: Block, target: Target) -> int:
    """Sums in the registers of a thread, beside what is computed with them behind the product."""
    if not sizes.on_matrix_units or sizes.pairs:
        # Hopper alone keeps sums where they are exchanged with few registers more.
        return _FEWEST_SUMS // 2 if sizes.pairs and target.arch // 10 != 9 else _FEWEST_SUMS
    others = max(0, block.operands - 2 - sizes.together)  # products may share their right operand, too
    meet = sizes.together > 1 and not target.multiplies_from_shared
    return _SUMS_AND_MORE if others or meet else _SUMS


def seconds(sizes: Products, block: Block, moved: float, target: Target) -> float:
    """Of a launch that moves `moved` bytes to and from memory."""
    at_once = blocks_per_sm(sizes, block, target)
    if not at_once:
        return math.inf
    dtype, columns = _dtype(sizes), block.columns * sizes.together
    programs = number_of_programs(sizes, block)
    resident = min(at_once, math.ceil(programs / target.sms))
    step = _bytes_of_step(sizes, block)
    rate = target.rate(dtype, tensor_cores=sizes.on_matrix_units) / target.sms
    arithmetic = 2 * block.rows * columns * block.depth * sizes.summands / rate
    handed_out = step / (_L2_RATE * target.bandwidth / target.sms)
    buffers = max(1, block.stages - 1) if block.rows > 1 else 1
    each = max(resident * max(arithmetic, handed_out), _L2_LATENCY / buffers)
    steps = math.ceil(sizes.depth / sizes.pieces / block.depth)
    waves = math.ceil(programs / (target.sms * at_once))
    flying = min(programs, target.sms * at_once) * step * buffers
    memory = moved / (target.bandwidth * min(1.0, flying / (target.bandwidth * LATENCY)))
    return _LAUNCH + max(waves * (steps * each + _ENDS), memory)


def _bytes_of_step(sizes: Products, block: Block) -> int:
    """Of both operands, as they are stored."""
    width = _dtype(sizes).itemsize
    weights = block.columns * sizes.together * (sizes.stored or width)
    return (block.rows * sizes.summands * width + weights) * block.depth


def number_of_programs(sizes: Products, block: Block) -> int:
    tiles = sum(-(-one // block.columns) for one in sizes.columns)
    return sizes.batch * -(-sizes.rows // block.rows) * tiles * sizes.pieces


def preference(block: Block) -> tuple[float, ...]:
    """Among tiles that the model does not tell apart: larger ones, which read less, square ones, steps of 64,
    three stages."""
    uneven = abs(math.log2(block.rows / block.columns))
    return -block.rows * block.columns, uneven, abs(math.log2(block.depth) - 6), abs(block.stages - 3)


def best_tile(sizes: Products, operands: int, most_columns: int, target: Target | None) -> Block:
    """The tile that the model takes for fastest.

    `most_columns`: of a tile, because of what follows the product.
    """
    target = target or _ANY
    moved = _least_bytes(sizes)

    def rank(block: Block) -> tuple[float, tuple[float, ...]]:
        return round(math.log(seconds(sizes, block, moved, target)), 2), preference(block)

    found = [one for one in _blocks(sizes, operands) if one.columns <= most_columns]
    return min((one for one in found if blocks_per_sm(sizes, one, target)), key=rank)


def _blocks(sizes: Products, operands: int) -> Iterator[Block]:
    extents = sizes.rows, max(sizes.columns), sizes.depth
    for tile in itertools.product(ROWS, COLUMNS, DEPTHS):
        if all(one < 2 * max(LEAST, extent) for one, extent in zip(tile, extents, strict=True)):
            for warps, stages in itertools.product(WARPS, STAGES):
                yield Block(*tile, warps, stages, operands)


def _least_bytes(sizes: Products) -> float:
    """Every operand once."""
    columns = sum(sizes.columns) * sizes.together
    width = _dtype(sizes).itemsize
    read = sizes.rows * sizes.summands * width + columns * (sizes.stored or width)
    return float(sizes.batch * (read * sizes.depth + sizes.rows * sum(sizes.columns) * width))


def _dtype(sizes: Products) -> torch.dtype:
    found: torch.dtype = getattr(torch, sizes.dtype)
    return found
