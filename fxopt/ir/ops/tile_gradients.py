"""The backward of attention tile by tile: what `tile_attention` says of one tile, summed up."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from fxopt.ir.ops.attention_attributes import computed_in
from fxopt.ir.ops.masking import ZERO
from fxopt.ir.ops.tile_attention import (
    DenseTile,
    Rows,
    TileGradients,
    additive,
    dead_number,
    flash_serves,
    heads_first,
    operands,
    tiles_of,
)
from fxopt.ir.ops.tiles import Problem, Tile

aten = torch.ops.aten

Gradients = tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, list[torch.Tensor]]


def backward(
    problem: Problem,
    rows: Rows,
    grad: torch.Tensor,
    out: torch.Tensor,
    lse: torch.Tensor,
    learned: Sequence[str],
) -> Gradients:
    """Gradients of query, key, value, sinks, and of the captures named in `learned`.

    Args:
        grad, out: (B, Hq, Sq, Dv). lse: (B, Hq, Sq), from the forward.

    Returns:
        Those of query, key and value have their shape, and sequences before heads in memory. That of sinks
        is empty when there are none.
    """
    total = _Totals(problem, rows, learned)
    generator = rows.generator()
    flash = flash_serves(problem, rows) and not learned and _flash_is_exact(problem, rows, lse)
    if not flash:
        problem, grad = heads_first(problem), grad.contiguous()
    for tile in tiles_of(problem, flash):
        at = tile.of_query
        given, result, sums = grad[at], out[at], lse[at]
        if tile.dead is not None:  # they are in no sum over live keys
            result = torch.where(tile.dead, torch.zeros_like(result), result)
        if not tile.is_empty:
            if flash:
                total.add(tile, _flash(problem, tile, given, result, sums))
            else:
                dense = DenseTile(problem, rows, tile, generator)
                found = dense.backward(given)
                total.add(tile, found)
                total.add_captured(dense, found.scores)
            total.add_sinks(given, result, sums)
        if rows.fill_dead and tile.dead is not None:
            whole = Tile(tile.batch, tile.rows, (0, problem.key.shape[-2]))
            dense = DenseTile(problem, rows, whole, generator)
            number = dead_number(rows.dead, problem.key.shape[-2])
            weights = torch.where(tile.dead, number, torch.zeros_like(dense.raw))
            found = dense.of_weights(weights, given)
            total.add(whole, found, only_value=rows.stops)
            total.add_captured(dense, found.scores, without=rows.stopped)
    return total.results()


# exp(score - lse) is off by this times the dtype's precision.
LARGEST_LSE = 2.0**10


def _flash_is_exact(problem: Problem, rows: Rows, lse: torch.Tensor) -> bool:
    """The backward of the flash kernel has an error like eager's.

    It does where eager's is that kernel as well, and in the lower dtypes, in which eager rounds the weights.
    In float32 it has 1.1 to 1.5 times eager's error (rms), and single entries have more than twice the
    largest one: exp(score - lse) rounds a difference of the size of log(keys), not one near 0.
    """
    if problem.query.dtype is torch.float32 and rows.dead != ZERO:
        return False
    # The weights are found again: no row has only scores to which a huge number was added.
    return not bool(((lse.abs() > LARGEST_LSE) & lse.isfinite()).any())


def _flash(
    problem: Problem, tile: Tile, grad: torch.Tensor, out: torch.Tensor, lse: torch.Tensor
) -> TileGradients:
    # The kernel wants the layout of its own results: sequences before heads.
    saved = lse.transpose(1, 2).contiguous().transpose(1, 2)
    query, key, value = operands(problem, tile)
    groups = key.shape[1]
    # The kernel's own sum over the heads of a group has up to three times the error of eager's.
    own = (each.repeat_interleave(problem.heads // groups, 1) for each in (key, value))
    of_query, of_key, of_value = aten._scaled_dot_product_flash_attention_for_cpu_backward(
        grad, query, *own, out, saved, 0.0, False,
        attn_mask=additive(problem, tile), scale=problem.scale,
    )  # fmt: skip
    return TileGradients(of_query, _over_groups(of_key, groups), _over_groups(of_value, groups), grad)


def _over_groups(tensor: torch.Tensor, groups: int) -> torch.Tensor:
    """The sum over the query heads of each group: (B, Hq, S, N) to (B, Hkv, S, N)."""
    if tensor.shape[1] == groups:
        return tensor
    batch, heads, rows, width = tensor.shape
    return tensor.view(batch, groups, heads // groups, rows, width).sum(2)


class _Totals:
    """The sums over all tiles, in the dtype of scores."""

    def __init__(self, problem: Problem, rows: Rows, learned: Sequence[str]) -> None:
        self.problem, self.sinks = problem, rows.sinks
        self.dtype = computed_in(problem.query.dtype)
        # In the layout of what is added to them.
        self.query, self.value = (
            each.new_zeros(each.shape, dtype=self.dtype) for each in (problem.query, problem.value)
        )
        self.key = problem.key.new_zeros(problem.key.mT.shape, dtype=self.dtype).mT
        self.of_sinks = problem.query.new_zeros(
            0 if self.sinks is None else self.sinks.shape[0], dtype=self.dtype
        )
        self.captured = {name: torch.zeros_like(problem.captures[name], dtype=self.dtype) for name in learned}
        self.sensitivities = {
            access: formula
            for access, formula in problem.score.sensitivities().items()
            if str(access.func) in self.captured
        }

    def add(self, tile: Tile, found: TileGradients, *, only_value: bool = False) -> None:
        self.value[tile.of_key] += found.value
        if not only_value:
            self.query[tile.of_query] += found.query
            self.key[tile.of_key] += found.key

    def add_sinks(self, grad: torch.Tensor, out: torch.Tensor, lse: torch.Tensor) -> None:
        if self.sinks is not None:
            share = torch.exp(self.sinks.to(self.dtype).view(1, -1, 1) - lse)
            of_share = (grad.to(self.dtype) * out.to(self.dtype)).sum(-1)
            self.of_sinks -= (share * of_share).sum((0, 2))

    def add_captured(
        self, dense: DenseTile, grad: torch.Tensor, without: frozenset[str] = frozenset()
    ) -> None:
        """Args: grad: of the scores of the tile, after the score program. without: names left out."""
        for access, formula in self.sensitivities.items():
            if str(access.func) in without:
                continue
            part = grad if formula == 1 else grad * dense.evaluate(formula)
            total = self.captured[str(access.func)]
            places = dense.values.places(access)
            reach = torch.broadcast_shapes(*(each.shape for each in places))
            summed = [dim for dim in range(4) if reach[dim] == 1 and part.shape[dim] > 1]
            part = part.sum(summed, keepdim=True) if summed else part
            total.index_put_(places, part, accumulate=True)

    def results(self) -> Gradients:
        problem = self.problem
        given = (problem.query, problem.key, problem.value)
        totals = (self.query, self.key, self.value)
        found = [empty_like_heads_last(each).copy_(total) for each, total in zip(given, totals, strict=True)]
        sinks = self.of_sinks if self.sinks is None else self.of_sinks.to(self.sinks.dtype)
        captured = [total.to(problem.captures[name].dtype) for name, total in self.captured.items()]
        return found[0], found[1], found[2], sinks, captured


def empty_like_heads_last(tensor: torch.Tensor) -> torch.Tensor:
    """(B, H, S, D) laid out as (B, S, H, D)."""
    batch, heads, rows, width = tensor.shape
    return tensor.new_empty(batch, rows, heads, width).transpose(1, 2)
