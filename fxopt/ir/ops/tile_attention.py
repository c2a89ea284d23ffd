"""Attention tile by tile on the CPU, with any mask and score program: forward, and one tile differentiated.

Tiles whose scores are only scaled and biased go to the CPU's flash kernel. The others are computed as
product, score program, softmax, product; the backward computes them again.

    P = softmax(score(scale * Q K^T))      O = P V
    dV = P^T dO      dP = dO V^T      dS = P * (dP - rowsum(P * dP)) * score'
    dQ = scale * dS K      dK = scale * dS^T Q

Source: Dao et al., "FlashAttention", 2022, algorithms 1 and 4, which take rowsum(dO * O) for rowsum(P * dP).
The two are rounded differently: in a row of few keys the difference to dP is small, and loses up to half of
its digits more. A tile has all keys of its rows, so the sum over them costs little.
Dropout acts on P; its random numbers are drawn again in the backward, from the same seed and in the same
order.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace

import sympy
import torch

from fxopt.ir.formula import captures_of
from fxopt.ir.ops.attention_attributes import computed_in
from fxopt.ir.ops.decomposed_attention import absorbs, scaled_product
from fxopt.ir.ops.masking import MEAN, NAN
from fxopt.ir.ops.tiles import Band, Problem, Tile, tiles

aten = torch.ops.aten


@dataclass(frozen=True)
class Rows:
    """What else decides on the rows of the result.

    Attributes:
        dead: what a row without a live key gives, see `masking`. stops: its scores get no gradient.
        stopped: names of captures that get none from it either.
        sinks: (Hq,), the score of one more key whose value is 0. dropout_p, seed: of the attention weights.
    """

    dead: str
    stops: bool
    stopped: frozenset[str]
    sinks: torch.Tensor | None
    dropout_p: float
    seed: torch.Tensor | None

    @property
    def fill_dead(self) -> bool:
        """A row without a live key gives something else than 0."""
        return self.sinks is None and self.dead in (MEAN, NAN)

    def generator(self) -> torch.Generator | None:
        """The random numbers of one pass over all tiles."""
        if self.seed is None:
            return None
        return torch.Generator(self.seed.device).manual_seed(int(self.seed))


def forward(problem: Problem, rows: Rows) -> tuple[torch.Tensor, torch.Tensor]:
    """(out, lse): out (B, Hq, Sq, Dv) of query's dtype, laid out as (B, Sq, Hq, Dv); lse (B, Hq, Sq)."""
    query, value = problem.query, problem.value
    batch, heads, count, _ = query.shape
    out = query.new_zeros(batch, count, heads, value.shape[-1]).transpose(1, 2)
    lse = query.new_zeros(batch, heads, count, dtype=computed_in(query.dtype))
    generator = rows.generator()
    flash = flash_serves(problem, rows)
    problem = problem if flash else heads_first(problem)
    for tile in tiles_of(problem, flash):
        at = tile.of_query
        if not tile.is_empty:
            if not flash:
                out[at], lse[at] = DenseTile(problem, rows, tile, generator).forward()
            elif tile.batch == (0, batch) and tile.rows == (0, count):
                whole, lse = _flash(problem, tile)
                lse = lse.contiguous()
                # The flash kernel lays its result out as the queries are.
                out = whole if whole.stride() == out.stride() else out.copy_(whole)
            else:
                out[at], lse[at] = _flash(problem, tile)
        if rows.fill_dead and tile.dead is not None:
            weights = dead_weights(problem, rows, tile, generator)
            mean = per_group(weights, problem.key.shape[1]) @ value[slice(*tile.batch)]
            out[at] = torch.where(tile.dead, per_head(mean, heads).to(out.dtype), out[at])
    return out, lse


# Scores that are computed at once, so that the steps between two products find them in the cache.
DENSE_SCORES = 2**20
# The flash kernel has tiles of its own; this bounds the masks.
FLASH_SCORES = 2**22


def tiles_of(problem: Problem, flash: bool) -> Iterator[Tile]:
    """The tiles of a problem; in the forward the same as in the backward where numbers are random."""
    return tiles(problem, FLASH_SCORES if flash else DENSE_SCORES)


def heads_first(problem: Problem) -> Problem:
    """With operands laid out as (B, H, S, D), of whose tiles products read matrices without a copy."""
    query, key, value = (each.contiguous() for each in (problem.query, problem.key, problem.value))
    return replace(problem, query=query, key=key, value=value)


def flash_serves(problem: Problem, rows: Rows) -> bool:
    """The CPU's flash kernel has the answer."""
    plain = problem.score.bias is not None and rows.sinks is None and rows.seed is None
    plain = plain and problem.query.device.type == "cpu"
    # It gives 0 for a row to which only -inf is added.
    plain = plain and not (rows.dead == NAN and problem.score.captures)
    return plain and not problem.wide_scores and problem.query.shape[-1] == problem.value.shape[-1]


def _flash(problem: Problem, tile: Tile) -> tuple[torch.Tensor, torch.Tensor]:
    out, lse = aten._scaled_dot_product_flash_attention_for_cpu(
        *operands(problem, tile), 0.0, False, attn_mask=additive(problem, tile), scale=problem.scale
    )
    return out, lse


def operands(problem: Problem, tile: Tile) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """The parts of query, key and value that a tile is made of."""
    return problem.query[tile.of_query], problem.key[tile.of_key], problem.value[tile.of_key]


def additive(problem: Problem, tile: Tile) -> torch.Tensor | None:
    """The bias and the mask of a tile as numbers to add, (batch, H, rows, columns)."""
    dtype = computed_in(problem.query.dtype)
    bias = problem.score.bias
    total: torch.Tensor | float = 0.0
    if bias is not None and bias != 0:
        total = problem.values(tile).number(bias)
        total = total.to(dtype) if isinstance(total, torch.Tensor) else float(total)
    if isinstance(tile.mask, Band) and not isinstance(total, torch.Tensor) and total == 0:
        total = tile.mask.added
    elif tile.live is not None:
        total = torch.where(tile.live, total, -math.inf).to(dtype)
    elif not isinstance(total, torch.Tensor):
        return None
    first, last = tile.batch
    shape = (last - first, problem.heads, tile.rows[1] - tile.rows[0], tile.columns[1] - tile.columns[0])
    return total.expand(shape)


class DenseTile:
    """The scores of one tile, computed and differentiated."""

    def __init__(self, problem: Problem, rows: Rows, tile: Tile, generator: torch.Generator | None) -> None:
        self.problem, self.rows, self.tile = problem, rows, tile
        self.query, self.key, self.value = operands(problem, tile)
        self.dtype = computed_in(problem.query.dtype)
        grouped = per_group(self.query, self.key.shape[1])
        if problem.query.dtype in (torch.float32, torch.float64):
            raw = multiplied(grouped, self.key.transpose(-2, -1), problem.scale)
        else:
            raw = scaled_product(grouped, self.key, problem.scale, problem.wide_scores)
        self.raw = per_head(raw, problem.heads).to(self.dtype)
        self.values = problem.values(tile, self.raw)
        self.scores = self.raw if problem.score.is_identity else self.evaluate(problem.score.result)
        if tile.live is not None:
            # In place where the result is this object's own for sure.
            fill = torch.Tensor.masked_fill_ if problem.score.is_identity else torch.masked_fill
            self.scores = fill(self.scores, ~tile.live, -math.inf)
        self.kept = _kept(self.raw.shape, rows.dropout_p, generator)

    def evaluate(self, formula: sympy.Expr) -> torch.Tensor:
        """A number of the tile's formulas, expanded to the scores."""
        found = self.values.number(formula)
        found = found if isinstance(found, torch.Tensor) else self.raw.new_full((1, 1, 1, 1), found)
        return found.to(self.dtype).expand(self.raw.shape)

    def forward(self) -> tuple[torch.Tensor, torch.Tensor]:
        """(out, lse) of the tile."""
        shares, top, total = self._shares()
        out = per_group(self.dropped(shares).to(self.value.dtype), self.key.shape[1]) @ self.value
        out = per_head(out, self.problem.heads) / total
        return out.to(self.value.dtype), (top + total.log()).squeeze(-1)

    def _shares(self) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """The weights times the sum of their row, the largest score of each row, and that sum."""
        top = self.scores.amax(-1, keepdim=True)
        sink = None
        if self.rows.sinks is not None:
            sink = self.rows.sinks.to(self.dtype).view(1, -1, 1, 1)
            top = torch.maximum(top, sink)
        lost = top == -math.inf
        top = top.masked_fill_(lost, 0.0)
        shares = (self.scores - top).exp_()
        total = shares.sum(-1, keepdim=True)
        if sink is not None:
            total += torch.exp(sink - top)
        total.masked_fill_(lost, 1.0)
        if self.rows.dead == NAN:  # what the formula says is dead is not computed from scores
            total.masked_fill_(lost if self.tile.dead is None else lost & ~self.tile.dead, math.nan)
        return shares, top, total

    def dropped(self, weights: torch.Tensor) -> torch.Tensor:
        return weights if self.kept is None else weights * self.kept

    def weights(self) -> torch.Tensor:
        """softmax(scores); 0 in rows without a live key, but NaN where only added numbers exclude all."""
        if self.rows.sinks is not None:
            shares, _, total = self._shares()
            return shares.div_(total)
        weights = torch.softmax(self.scores, -1)
        if self.tile.dead is not None:
            weights.masked_fill_(self.tile.dead, 0.0)
        if self.rows.dead != NAN and self.problem.score.captures:
            weights.masked_fill_(self.scores.amax(-1, keepdim=True) == -math.inf, 0.0)
        return weights

    def backward(self, grad: torch.Tensor) -> TileGradients:
        """Args: grad (batch, H, rows, Dv)."""
        # Not from the log-sum-exp, which rounds what is far below the largest score of a row of low ones.
        return self.of_weights(self.weights(), grad)

    def of_weights(self, weights: torch.Tensor, grad: torch.Tensor) -> TileGradients:
        """The gradients for weights that are given. Each product sums in the order of autograd's own."""
        groups, heads = self.key.shape[1], self.problem.heads
        work = torch.float32 if self.problem.wide_scores else grad.dtype
        gathered = per_group(grad, groups)
        value = per_group(self.dropped(weights).to(grad.dtype), groups).transpose(-2, -1) @ gathered
        of_weights = per_head(gathered @ self.value.transpose(-2, -1), heads).to(self.dtype)
        of_scores = aten._softmax_backward_data(self.dropped(of_weights), weights, -1, self.dtype)
        slope = self.problem.score.slope
        of_raw = of_scores if slope == 1 else of_scores * self.evaluate(slope)
        if self._selects(slope):  # no gradient, where the other scores of a row make it NaN too
            of_raw = of_raw.masked_fill_(self.evaluate(slope) == 0, 0.0)
        if self.rows.stops and self.problem.score.captures:
            of_raw = self._without_replaced(of_raw)
        product, scale = per_group(of_raw.to(work), groups), self.problem.scale
        query = per_head(multiplied(product, self.key.to(work), scale), heads)
        own = per_group(self.query, groups).to(work)
        key = multiplied(own.transpose(-2, -1), product, scale).transpose(-2, -1)
        return TileGradients(query, key, value, of_scores)

    def _without_replaced(self, grad: torch.Tensor) -> torch.Tensor:
        """0 for scores that a captured number stands for; it shows in rows of nothing else."""
        if not absorbs(self.scores.amax(-1)).any():
            return grad
        return grad.masked_fill(absorbs(self.scores), 0.0)

    def _selects(self, slope: sympy.Expr) -> bool:
        captured = self.problem.captures
        return any(captured[name].dtype is torch.bool for name in captures_of(slope))


def multiplied(left: torch.Tensor, right: torch.Tensor, factor: float) -> torch.Tensor:
    """factor * left @ right, of rank 4, in one pass over the result."""
    flat = (each.flatten(0, 1) for each in (left, right))
    product: torch.Tensor = torch.baddbmm(left.new_empty(()), *flat, beta=0, alpha=factor)
    return product.view(*left.shape[:2], *product.shape[1:])


@dataclass(frozen=True)
class TileGradients:
    query: torch.Tensor
    key: torch.Tensor
    value: torch.Tensor
    scores: torch.Tensor  # after the score program


def _kept(shape: torch.Size, p: float, generator: torch.Generator | None) -> torch.Tensor | None:
    """0 for a weight that is dropped, 1/(1 - p) for one that is kept."""
    if generator is None:
        return None
    kept = torch.empty(shape, device=generator.device).bernoulli_(1.0 - p, generator=generator)
    return kept.mul_(1.0 / (1.0 - p)) if p < 1.0 else kept


def per_group(tensor: torch.Tensor, groups: int) -> torch.Tensor:
    """(B, Hq, S, N) as (B, Hkv, Hq/Hkv * S, N)."""
    batch, heads, rows, width = tensor.shape
    return tensor if heads == groups else tensor.reshape(batch, groups, heads // groups * rows, width)


def per_head(tensor: torch.Tensor, heads: int) -> torch.Tensor:
    """The inverse of `per_group`."""
    batch, groups, rows, width = tensor.shape
    return tensor if heads == groups else tensor.reshape(batch, heads, rows * groups // heads, width)


def dead_weights(problem: Problem, rows: Rows, tile: Tile, generator: torch.Generator | None) -> torch.Tensor:
    """The weights of rows without a live key over all keys, after dropout: equal, or NaN."""
    columns = problem.key.shape[-2]
    shape = (tile.batch[1] - tile.batch[0], problem.heads, tile.rows[1] - tile.rows[0], columns)
    number, device = dead_number(rows.dead, columns), problem.value.device
    weights = torch.full(shape, number, dtype=problem.value.dtype, device=device)
    kept = _kept(weights.shape, rows.dropout_p, generator)
    return weights if kept is None else (weights * kept).to(weights.dtype)


def dead_number(dead_rows: str, columns: int) -> float:
    """Each weight of a row without a live key, where it has any."""
    return 1.0 / columns if dead_rows == MEAN else math.nan
