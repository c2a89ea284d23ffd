"""How large the tiles of attention are, for a target and a width of heads."""

from __future__ import annotations

from dataclasses import dataclass

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
            "operands in shared memory and sums in registers, without spills"
        )


def padded_width(width: int) -> int:
    """The width of a tile that holds heads of this width."""
    return max(LEAST_WIDTH, power_of_two(width))


def forward_tiles(spec: Spec, target: Target | None) -> Tiles:
    """Of the forward."""
    wide = max(padded_width(spec.width), padded_width(spec.width_v))
    if spec.dtype is torch.float32:
        return Tiles(32, 32, 4, 1) if wide > 64 else Tiles(64, 32, 4, 2)
    if wide > 128:
        return Tiles(64, 32, 4, 2)
    if target is not None and target.arch >= 90:
        return Tiles(128, 64, 8, 3) if wide == 128 else Tiles(128, 64, 4, 3)
    return Tiles(128, 64, 8, 2) if wide == 128 else Tiles(128, 64, 4, 3)


def query_tiles(spec: Spec, target: Target | None) -> Tiles:
    """Of the kernel for dQ."""
    wide = max(padded_width(spec.width), padded_width(spec.width_v))
    if spec.dtype is torch.float32:
        return Tiles(32, 32, 4, 1)
    if wide > 128:
        return Tiles(32, 32, 4, 1)
    return Tiles(64, 64, 4, 2) if wide == 128 else Tiles(128, 64, 8, 2)


def key_tiles(spec: Spec, target: Target | None) -> Tiles:
    """Of the kernel for dK and dV."""
    wide = max(padded_width(spec.width), padded_width(spec.width_v))
    if spec.dtype is torch.float32:
        return Tiles(32, 32, 4, 1)
    if wide > 128:
        return Tiles(32, 32, 4, 1)
    return Tiles(64, 64, 8, 2) if wide == 128 else Tiles(64, 128, 8, 2)
