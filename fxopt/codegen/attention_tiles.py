"""How large the tiles of attention are, for a target and a width of heads."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

import torch

from fxopt.codegen.attention_spec import Spec
from fxopt.codegen.tile_sizes import power_of_two
from fxopt.ir.target import Target

LEAST_WIDTH = 16  # of an operand of a matrix unit


@dataclass(frozen=True)
class Tiles:
    """Of one kernel. rows: (query, head) pairs. columns: keys."""

    rows: int
    columns: int
    num_warps: int
    num_stages: int

    @property
    def why(self) -> str:
        return (
            f"BLOCK_M={self.rows}, BLOCK_N={self.columns}, {self.num_warps} warps, {self.num_stages} stages: "
            "for operands in shared memory and sums in registers"
        )


def beside(tiles: Tiles) -> tuple[Tiles, ...]:
    """What else to try: tiles that need fewer registers or less shared memory, and last one of more keys."""
    rows, columns = max(LEAST_WIDTH, tiles.rows // 2), max(LEAST_WIDTH, tiles.columns // 2)
    found = (
        replace(tiles, num_stages=1),
        replace(tiles, columns=columns),
        replace(tiles, rows=rows),
        replace(tiles, rows=rows, columns=columns, num_stages=1),
        replace(tiles, columns=2 * tiles.columns),
    )
    return tuple(one for one in dict.fromkeys(found) if one != tiles)


def padded_width(width: int) -> int:
    """The width of a tile that holds heads of this width."""
    return max(LEAST_WIDTH, power_of_two(width))


# Chosen by what compiles without spills and within the shared memory of a block, the largest first; not
# measured on a GPU yet. By the width of a head: up to 64, up to 128.
_FORWARD = {
    80: (Tiles(128, 64, 8, 3), Tiles(128, 32, 8, 2)),
    90: (Tiles(128, 64, 8, 3), Tiles(128, 64, 8, 3)),
}
# Where each score has an address of its own, of an entry of a matrix or a table.
_FORWARD_PAIRS = {
    80: (Tiles(64, 64, 8, 2), Tiles(64, 32, 8, 2)),
    90: (Tiles(64, 64, 8, 2), Tiles(64, 32, 8, 3)),
}
_QUERIES = {
    80: (Tiles(64, 32, 4, 2), Tiles(64, 64, 8, 2)),
    90: (Tiles(128, 64, 8, 2), Tiles(128, 64, 8, 2)),
}
# With a loop of their own for rows without a live key.
_QUERIES_DEAD = {
    80: (Tiles(32, 32, 4, 2), Tiles(64, 64, 8, 2)),
    90: _QUERIES[90],
    100: (Tiles(64, 64, 8, 2), Tiles(128, 64, 8, 2)),
}
_QUERIES_PAIRS = {
    80: (Tiles(64, 32, 8, 2), Tiles(64, 32, 8, 2)),
    90: (_QUERIES[90][0], Tiles(64, 32, 8, 2)),
    100: (_QUERIES_DEAD[100][0], Tiles(64, 32, 8, 2)),
}
_KEYS = {
    80: (Tiles(32, 64, 8, 1), Tiles(32, 64, 8, 2)),
    90: (Tiles(64, 64, 8, 2), Tiles(32, 64, 8, 2)),
    100: (Tiles(64, 64, 8, 2), Tiles(64, 64, 8, 2)),
}
_SCORES = {
    80: (Tiles(64, 32, 8, 1), Tiles(64, 32, 8, 1)),
    100: (Tiles(64, 32, 8, 1), Tiles(32, 32, 8, 1)),
}
# Where much is computed of each score: random numbers, or formulas of many terms.
_FORWARD_HEAVY = {80: (Tiles(64, 64, 8, 2), Tiles(64, 32, 8, 2))}
_QUERIES_HEAVY = {
    80: (Tiles(64, 32, 8, 2), Tiles(32, 32, 4, 2)),
    90: (Tiles(64, 32, 8, 2), Tiles(64, 32, 8, 2)),
}
_KEYS_HEAVY = {80: (Tiles(32, 64, 8, 1), Tiles(32, 64, 8, 2))}
_WIDE = Tiles(32, 32, 4, 1)
_FLOAT32 = Tiles(32, 32, 4, 1)
# Float32 is multiplied by the vector units, whose operands are in registers.
_FLOAT32_WIDE, _FLOAT32_FORWARD_WIDE = Tiles(16, 16, 8, 1), Tiles(32, 16, 8, 1)


def forward_tiles(spec: Spec, target: Target | None) -> Tiles:
    """Of the forward."""
    if spec.dtype is torch.float32 and max(spec.width, spec.width_v) > 128:
        return _FLOAT32_FORWARD_WIDE
    if spec.reads_pairs:
        return _chosen(_FORWARD_PAIRS, spec, target, Tiles(32, 32, 8, 2))
    return _chosen(_FORWARD_HEAVY if spec.is_heavy else _FORWARD, spec, target, Tiles(64, 32, 8, 2))


def query_tiles(spec: Spec, target: Target | None) -> Tiles:
    """Of the kernel for dQ."""
    plain = _QUERIES_DEAD if spec.dead_code else _QUERIES
    plain = _QUERIES_HEAVY if spec.is_heavy else plain
    return _chosen(_QUERIES_PAIRS if spec.reads_pairs else plain, spec, target, _WIDE)


def key_tiles(spec: Spec, target: Target | None) -> Tiles:
    """Of the kernel for dK and dV."""
    return _chosen(_KEYS_HEAVY if spec.is_heavy else _KEYS, spec, target, _WIDE)


def score_tiles(spec: Spec, target: Target | None) -> Tiles:
    """Of the kernels for the gradients of matrices and tables: queries of one head, and keys."""
    return _chosen(_SCORES, spec, target, _WIDE)


def _chosen(
    table: Mapping[int, tuple[Tiles, Tiles]], spec: Spec, target: Target | None, wide: Tiles
) -> Tiles:
    """The row of the newest architecture that the target is not older than; the oldest row where operands
    are in registers, as they are there."""
    width = max(padded_width(spec.width), padded_width(spec.width_v))
    if spec.dtype is torch.float32:
        return _FLOAT32 if width <= 128 else _FLOAT32_WIDE
    if width > 128:
        return wide
    arch = target.arch if target is not None and target.multiplies_from_shared else min(table)
    return table[max(each for each in table if each <= arch)][int(width > 64)]
