"""The formulas of a mask against the operations that they came from, entry by entry, on random data."""

from __future__ import annotations

import math
from collections.abc import Mapping

import sympy
import torch
from torch import fx

from fxopt.ir.cone import (
    NOT_AT_THESE_SIZES,
    call_on_cpu,
    run_all,
    shape_at,
    size_at,
    stand_in,
    symbols,
)
from fxopt.ir.facts import val
from fxopt.ir.linear import Unsupported
from fxopt.ir.ops.masking import LOWEST_SHARE
from fxopt.ir.tables import Table
from fxopt.ir.tile_values import TileValues

from .mask_program import Recovered
from .mask_proof import small_sizes

# Entries that are computed at most.
MOST = 2**22

Point = Mapping[sympy.Symbol, int]


def difference(recovered: Recovered, mask: fx.Node, attention: fx.Node) -> str | None:
    """Where the formulas of `mask` say something else than its operations; None when they agree everywhere.

    Raises:
        Unsupported: the mask can not be computed here; the message says why.
    """
    hints = symbols([*recovered.made_by, attention])
    known = {symbol: number for symbol, number in hints.items() if number is not None}
    points = [small_sizes(hints, mask), *([known] if known and len(known) == len(hints) else [])]
    refusal = Unsupported("a mask of unknown size")
    for at in points:
        try:
            return _difference_at(recovered, mask, attention, at)
        except Unsupported as reason:
            refusal = reason
        except NOT_AT_THESE_SIZES as reason:
            refusal = Unsupported(str(reason))
    raise refusal


def _difference_at(recovered: Recovered, mask: fx.Node, attention: fx.Node, at: Point) -> str | None:
    query, key = (shape_at(val(arg), at) for arg in attention.args[:2])
    shape = (*query[:3], key[2])
    if math.prod(shape) > MOST:
        raise Unsupported(f"{math.prod(shape)} entries, more than {MOST} are not compared")
    seeded = torch.Generator().manual_seed(0)
    values = run_all(recovered.made_by, at, lambda node: _random(node, at, seeded))
    captures = {name: _made(source, values, at) for name, source in recovered.captures.items()}
    sizes = {name: at[symbol] for name, symbol in recovered.sizes.items()}
    tile = TileValues(tuple((0, size) for size in shape), captures, sizes, torch.device("cpu"))
    live = tile.condition(recovered.program.live).expand(shape)
    wanted = values[mask].expand(shape)
    added = tile.index(tile.number(recovered.bias)).expand(shape).double()
    lives = wanted
    if wanted.dtype is not torch.bool:  # a bias that was captured whole may exclude keys by itself
        lowest = LOWEST_SHARE * torch.finfo(wanted.dtype).min
        live, lives = live & (added > lowest), wanted > lowest
    if not torch.equal(live, lives):
        place = (live != lives).nonzero()[0].tolist()
        return f"the formula says {bool(live[tuple(place)])} at [b, h, q, k] = {place}"
    if wanted.dtype is torch.bool or not live.any():
        return None
    bias = added[live]
    exact = wanted[live].double()
    # The formula is computed in float32, the mask in its own dtype, step by step.
    allowed = 16 * torch.finfo(wanted.dtype).eps * max(1.0, float(exact.abs().max()))
    worst = float((bias - exact).abs().max())
    return None if worst <= allowed else f"the formula of the bias differs by {worst}"


def _random(node: fx.Node, at: Point, seeded: torch.Generator) -> torch.Tensor:
    value = val(node)
    if not isinstance(value, torch.Tensor):
        raise Unsupported(f"{node.name}, which is no tensor")
    shape = shape_at(value, at)
    if value.dtype.is_floating_point:
        return torch.randn(shape, generator=seeded).to(value.dtype)
    return torch.randint(0, 2, shape, generator=seeded).to(value.dtype)


def _made(source: fx.Node | Table, values: dict[fx.Node, torch.Tensor], at: Point) -> torch.Tensor:
    if isinstance(source, fx.Node):
        return values[source]
    low, high = size_at(source.low, at), size_at(source.high, at)
    found = {**values, source.base: torch.arange(low, high + 1)}
    for step in source.steps:
        found[step] = call_on_cpu(step, lambda arg: found[arg] if arg in found else stand_in(val(arg), at))
    return found[source.root]
