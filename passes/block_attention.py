"""Attention whose mask is a formula that bounds the keys of each query -> attention block by block.

A sliding window over 4096 tokens reads a band of the scores, a causal mask over a padded batch half of them.
The mask's program says which keys a block of queries can see at all; the others are not read, and of the mask
no more than one block is ever made. On the CPU; on other devices fused kernels read the mask as it is.

Assumed: scores are far from the lowest number of their dtype, so that a key masked by it counts as excluded
in a row that has another key.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import fx
from torch._ops import OpOverload

from fxopt.ir import facts
from fxopt.ir.bounds import bounds, has_live_key, live_columns
from fxopt.ir.cone import cone
from fxopt.ir.contract import Context, Match, Miss, Verdict
from fxopt.ir.facts import argument, val
from fxopt.ir.index_rules import value_of
from fxopt.ir.linear import Unsupported
from fxopt.ir.ops.attention import ATTENTION
from fxopt.ir.ops.masking import MEAN, row_blocks

from .mask_program import Recovered, recover, written

# Measured on one core: below, calls of the kernel cost more than the keys that they skip.
LEAST_SCORES = 96 * 96
LARGEST_SHARE = 0.8


@dataclass(frozen=True)
class BlockAttention:
    """The program of a mask in the place of its tensor."""

    name: ClassVar[str] = "block-attention"
    after: ClassVar[tuple[str, ...]] = ("rewrite-attention", "fold-causal-mask")

    @property
    def anchors(self) -> tuple[OpOverload, ...]:
        return (ATTENTION.overload,)

    def match(self, node: fx.Node) -> Match | Miss | None:
        mask = argument(node, "attn_mask")
        if mask is None:
            return None
        try:
            return Match(node, (node,), {"mask": mask, "recovered": recover(mask, node)})
        except Unsupported as refusal:
            return Miss("a mask that is a function of indices and integers", str(refusal))

    def legal(self, match: Match, ctx: Context) -> Verdict:
        node, recovered = match.anchor, match["recovered"]
        query, key = val(node.args[0]), val(node.args[1])
        if not all(isinstance(size, int) for size in (*query.shape, *key.shape)) or recovered.sizes:
            return Verdict.no("wanted sizes that are known, saw symbols")
        if argument(node, "dropout_p"):
            return Verdict.no("wanted no dropout, whose random numbers are drawn for all scores at once")
        outside = next((each for each in recovered.captures.values() if each.graph is not node.graph), None)
        if outside is not None:
            return Verdict.no(f"wanted captured tensors of this graph, saw {outside.name} outside of it")
        stale = written([*cone(match["mask"])], node, ctx)
        if stale:
            return Verdict.no(stale)
        return _same_rows(match, ctx)

    def profit(self, match: Match, ctx: Context) -> Verdict:
        node = match.anchor
        query, key = val(node.args[0]), val(node.args[1])
        if query.device.type != "cpu":
            return Verdict.no(f"on {query.device.type} fused kernels read the mask")
        rows, columns = query.shape[-2], key.shape[-2]
        if rows * columns < LEAST_SCORES:
            return Verdict.no(f"{rows} x {columns} scores per head, blocks pay from {LEAST_SCORES}")
        tasks, threads = query.shape[0] * query.shape[1], torch.get_num_threads()
        if tasks < threads:
            return Verdict.no(f"{tasks} heads keep no more than {tasks} of {threads} threads busy")
        share = read_share(match["recovered"], rows, columns)
        if share > LARGEST_SHARE:
            return Verdict.no(f"blocks would read {share:.0%} of the scores, pay below {LARGEST_SHARE:.0%}")
        return Verdict.yes(f"blocks read {share:.0%} of {rows} x {columns} scores per head")

    def replace(self, match: Match, graph: fx.Graph) -> fx.Node:
        node, recovered = match.anchor, match["recovered"]
        dropped = ("attn_mask", "mask_replaces")
        kwargs: dict[str, Any] = {name: kept for name, kept in node.kwargs.items() if name not in dropped}
        kwargs |= {"mask": str(recovered.program), "captures": list(recovered.captures.values())}
        if any(math.isfinite(fill) for fill in _fills(match["mask"])):
            kwargs["dead_rows"] = MEAN
        return graph.call_function(ATTENTION.overload, node.args[:3], kwargs)


def read_share(recovered: Recovered, rows: int, columns: int) -> float:
    """The part of all scores that blocks compute."""
    found = bounds(recovered.program)
    read = 0
    for first, last in row_blocks(rows):
        low, high = live_columns(found, first, last, columns)
        read += (last - first) * (high - low)
    return read / (rows * columns)


def _same_rows(match: Match, ctx: Context) -> Verdict:
    """Rows without a live key give what they gave before, and have the same gradient."""
    node, recovered = match.anchor, match["recovered"]
    query, key = val(node.args[0]), val(node.args[1])
    fills = _fills(match["mask"])
    if len(fills) > 1:
        return Verdict.no(f"wanted one number that excludes keys, saw {sorted(fills)}")
    if query.dtype is torch.float16 and any(math.isfinite(fill) for fill in fills):
        return Verdict.no("wanted a fill that absorbs every score, saw float16's lowest number")
    # A score that was replaced by a finite fill has no gradient, and the row is the mean of V in both.
    same_gradient = not fills or (argument(node, "mask_replaces") and all(map(math.isfinite, fills)))
    alive = has_live_key(recovered.program, query.shape[-2], key.shape[-2])
    if not same_gradient and not alive and ctx.facts.differentiates(node):
        return Verdict.no("rows without a live key may exist, and would have another gradient")
    return Verdict.yes(f'mask="{recovered}"')


def _fills(mask: fx.Node) -> set[float]:
    """What excludes keys in an additive mask; nothing for a bool mask."""
    if facts.dtype(mask) is torch.bool:
        return set()
    return {number for number in value_of(mask).constants() if number != 0.0}
