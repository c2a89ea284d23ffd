"""Which configurations of a kernel are worth measuring, by a model of what limits it on a GPU.

Launches that multiply matrices have a model of their own, `fxopt.codegen.product_model`.

A kernel of a region moves bytes; how fast depends on how many are under way. So the model counts, for sizes
of a tile, warps and stages: the blocks that an SM holds by threads, registers and shared memory, the bytes
that are in flight then, and the share of the last wave of blocks that has work.
"""

from __future__ import annotations

import itertools
import math
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

from fxopt.codegen.kernel_file import KernelFile, Launch
from fxopt.codegen.product_model import WARPS as PRODUCT_WARPS
from fxopt.codegen.product_model import WARPS_OF_A_ROW, Block, blocks_per_sm, preference, seconds
from fxopt.codegen.tile_sizes import power_of_two
from fxopt.ir.target import Target

LATENCY = 7e-7  # seconds from a load to its value, out of memory
OVERHEAD = 24  # registers of a thread for addresses and counters
LAUNCH = 2e-6  # seconds for which a GPU is not yet, or no longer, busy
BLOCKS_PER_SM = 32
PER_SM = 2.0  # what an SM can draw of the bandwidth, as a multiple of its share
FACTORS = (0.25, 0.5, 1, 2, 4)
WARPS = (1, 2, 4, 8, 16)
STAGES = (2, 3, 4)


@dataclass(frozen=True)
class Estimate:
    """What the model says of a launch: `seconds`, and the `blocks` that an SM holds at once (0: none)."""

    seconds: float
    blocks: int


def proposals(kernel: KernelFile, target: Target, count: int = 6) -> list[KernelFile]:
    """At most `count` kernels that compute the same: `kernel` itself, its alternatives, then others, best
    first.

    The model does not tell apart what differs by less than a twentieth. Among those, 8 elements a thread are
    preferred: accesses of 16 or 32 bytes. Of a kernel that it does not know there are all alternatives.
    """
    if not kernel.modelled:
        return [kernel, *kernel.alternatives]
    moved = _moved(kernel)
    apart = [estimate(*one, target).seconds for one in zip(kernel.launches, moved, strict=True)]
    ranks: dict[KernelFile, tuple[int, tuple[float, ...], str]] = {}
    for place, launch in enumerate(kernel.launches):
        others = [one for one in _neighbours(launch, target) if one != launch]
        guesses = {one: estimate(one, moved[place], target) for one in others}
        for other in _unlike([one for one in others if guesses[one].blocks], guesses):
            launches = (*kernel.launches[:place], other, *kernel.launches[place + 1 :])
            variant = replace(kernel, launches=launches, alternatives=())
            alike = _alike(sum(apart) - apart[place] + guesses[other].seconds)
            ranks[variant] = alike, _preference(other, target), configuration(variant)
    found = [kernel, *kernel.alternatives, *sorted(ranks, key=ranks.__getitem__)]
    return found[:count]


def predicted(kernel: KernelFile, target: Target) -> float:
    """Seconds of a kernel as it is launched now."""
    pairs = zip(kernel.launches, _moved(kernel), strict=True)
    return sum(estimate(launch, moved, target).seconds for launch, moved in pairs)


def _moved(kernel: KernelFile) -> list[float]:
    """The bytes of each launch."""
    return [kernel.about.seen[0] * share for share in _shares(kernel.launches)]


def _unlike(found: Sequence[Launch], guesses: Mapping[Launch, Estimate]) -> list[Launch]:
    """Of launches with products the best for each tile of a result: they are to differ in more than steps."""
    best: dict[object, Launch] = {}
    for one in found:
        tile = (constant(one, "ROWS"), constant(one, "COLUMNS")) if one.products else one
        rank = (_alike(guesses[one].seconds), preference(block_of(one))) if one.products else ()
        kept = best.get(tile)
        if kept is None or rank < (_alike(guesses[kept].seconds), preference(block_of(kept))):
            best[tile] = one
    return list(best.values())


def _preference(launch: Launch, target: Target) -> tuple[float, ...]:
    if launch.products:
        return preference(block_of(launch))
    return (abs(math.log2(_tile(launch) / _threads(launch, target)) - 3),)


def _alike(seconds: float) -> int:
    """A number that is the same for times that differ by less than a twentieth."""
    return round(math.log(seconds) / math.log(1.05)) if math.isfinite(seconds) else sys.maxsize


def _shares(launches: Sequence[Launch]) -> list[float]:
    """How much of the traffic is each launch's, by the elements that it goes over."""
    elements = [_elements(one) for one in launches]
    return [one / sum(elements) for one in elements]


def _elements(launch: Launch) -> int:
    if launch.products:
        sizes = launch.products
        return sizes.batch * sizes.depth * (sizes.rows + sum(sizes.columns) * sizes.together)
    return _tile(launch) * _programs(launch) * _steps(launch, in_grid=False)


def constant(launch: Launch, name: str) -> int:
    """The value of a constant."""
    return int(dict(launch.constants)[name])


def block_of(launch: Launch) -> Block:
    """What a program of a launch with products has at once."""
    rows, columns, depth = (constant(launch, name) for name in ("ROWS", "COLUMNS", "DEPTH"))
    operands = sum(one.type.startswith("*") for one in launch.arguments)
    return Block(rows, columns, depth, launch.num_warps, launch.num_stages, operands)


def configuration(kernel: KernelFile) -> str:
    """How a kernel is launched, in one line."""
    return "; ".join(
        ", ".join(
            [f"{name}={value}" for name, value in one.constants]
            + [f"num_warps={one.num_warps}", f"num_stages={one.num_stages}"]
        )
        for one in kernel.launches
    )


def estimate(launch: Launch, moved: float, target: Target) -> Estimate:
    """Seconds for a launch that moves `moved` bytes."""
    if launch.products:
        block = block_of(launch)
        blocks = blocks_per_sm(launch.products, block, target)
        return Estimate(seconds(launch.products, block, moved, target), blocks)
    tile, threads = _tile(launch), _threads(launch, target)
    widths = [_width(argument.type) for argument in launch.arguments if argument.type.startswith("*")]
    registers = OVERHEAD + math.ceil(tile / threads) * len(widths)
    stages = launch.num_stages - 1 if _loops(launch) else 1
    shared = tile * max(widths, default=0) * (stages if stages > 1 else 0)
    if registers > target.max_registers or shared > target.shared_per_block or threads > 1024:
        return Estimate(math.inf, 0)
    blocks = min(
        target.threads_per_sm // threads,
        target.registers_per_sm // (registers * threads),
        target.shared_per_sm // shared if shared else BLOCKS_PER_SM,
        BLOCKS_PER_SM,
    )
    if not blocks:
        return Estimate(math.inf, 0)
    programs, at_once = _programs(launch), target.sms * blocks
    flying = min(programs, at_once) * tile * stages * sum(widths)
    busy = PER_SM * programs / target.sms
    rate = target.bandwidth * min(1.0, flying / (target.bandwidth * LATENCY), busy)
    waves = programs / at_once
    tail = math.ceil(waves) / waves if waves > 1 else 1.0
    return Estimate(LAUNCH + moved / rate * tail, blocks)


def _tile(launch: Launch) -> int:
    """The elements that a program has at once."""
    return math.prod(int(value) for _, value in launch.constants)


def _threads(launch: Launch, target: Target) -> int:
    return launch.num_warps * target.warp_size


def _neighbours(launch: Launch, target: Target) -> Iterator[Launch]:
    """The launch with sizes around its own."""
    extents, bounds = dict(launch.adjustable), {name: rest for name, *rest in launch.bounds}
    sizes = [
        sorted({_scaled(value, factor, extents[name], *bounds.get(name, ())) for factor in FACTORS})
        if name in extents
        else [value]
        for name, value in launch.constants
    ]
    stages = STAGES if _loops(launch) else (launch.num_stages,)
    several: tuple[int, ...] = WARPS
    if launch.products:
        several = WARPS_OF_A_ROW if constant(launch, "ROWS") == 1 else PRODUCT_WARPS
    names = [name for name, _ in launch.constants]
    for chosen in itertools.product(*sizes):
        for warps, depth in itertools.product(several, stages):
            if math.prod(chosen) >= warps * target.warp_size:
                constants = tuple(zip(names, chosen, strict=True))
                yield replace(launch, constants=constants, num_warps=warps, num_stages=depth)


def _scaled(value: float, factor: float, extent: int, least: int = 1, most: int = sys.maxsize) -> int:
    """A multiple of `value`, within bounds and not above the first power of two that covers the extent."""
    return max(least, min(int(value * factor), power_of_two(extent), most))


def _loops(launch: Launch) -> bool:
    return any(not _in_grid(name, launch) for name, _ in launch.adjustable)


def _in_grid(name: str, launch: Launch) -> bool:
    return any(name in extent for extent in launch.grid)


def _programs(launch: Launch) -> int:
    return _steps(launch, in_grid=True)


def _steps(launch: Launch, in_grid: bool) -> int:
    """How often the sizes of a tile fit into their extents: in the grid, or in the loops of a program."""
    values = dict(launch.constants)
    parts = [
        math.ceil(size / values[name])
        for name, size in launch.adjustable
        if _in_grid(name, launch) is in_grid
    ]
    return max(1, math.prod(parts))


def _width(pointer: str) -> int:
    """Bytes of an element: ``"*bf16"`` has 2."""
    digits = "".join(letter for letter in pointer if letter.isdigit())
    return max(1, int(digits or 8) // 8)
