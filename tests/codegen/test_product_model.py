"""Which tiles of a product fit a GPU, and which the model takes for faster."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from codegen.test_large_products import regions_of

from fxopt.codegen.configurations import configuration, proposals
from fxopt.codegen.kernel_file import KernelFile, Products
from fxopt.codegen.kernels import kernel_of
from fxopt.codegen.product_model import Block, best_tile, blocks_per_sm, seconds
from fxopt.ir.target import Target, all_targets
from support.emitted_products import gated, residual

HOPPER = Target.named("sm_90")
SQUARE = Products(1, 4096, (4096,), 4096, 1, 1, "bfloat16", True)


def kernel_for(rows: int, dtype: torch.dtype, target: Target) -> KernelFile:
    found = regions_of(residual, (rows, 4096), (2048, 4096), (rows, 2048), dtype=dtype)
    return kernel_of(found.regions[0], target)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("rows", [1, 16, 100, 4096])
@pytest.mark.parametrize("target", all_targets(), ids=lambda target: target.card)
def test_what_is_proposed_fits(rows: int, dtype: torch.dtype, target: Target) -> None:
    kernel = kernel_for(rows, dtype, target)
    found = proposals(kernel, target)
    assert found[0] is kernel
    assert 2 <= len(found) <= 6
    assert len({(one.jit, configuration(one)) for one in found}) == len(found)
    assert found == proposals(kernel, target)
    for launch in (launch for one in found for launch in one.launches if launch.products):
        sizes, values = launch.products, dict(launch.constants)
        assert sizes is not None
        block = Block(
            values["ROWS"], values["COLUMNS"], values["DEPTH"], launch.num_warps, launch.num_stages, 4
        )
        assert blocks_per_sm(sizes, block, target) >= 1
        assert launch.num_warps * target.warp_size <= 1024


def test_products_of_one_weight_are_products_that_meet() -> None:
    """A tensor that both read is no other tensor whose values take registers."""
    sizes = replace(SQUARE, together=2)
    block = Block(128, 128, 64, 8, 3, operands=4)
    assert blocks_per_sm(sizes, block, HOPPER) == blocks_per_sm(sizes, replace(block, operands=3), HOPPER) > 0
    assert blocks_per_sm(sizes, replace(block, operands=5), HOPPER) == 0, "a residual is one"


@pytest.mark.parametrize(("depth", "fits"), [(80, False), (128, False), (200, True)])
def test_a_deep_block_without_matrix_units_needs_a_loop(depth: int, fits: bool) -> None:
    """Where all of it is written out at once the assembler spills registers."""
    sizes = Products(1, 26, (48,), depth, 1, 1, "float32", False)
    assert bool(blocks_per_sm(sizes, Block(16, 16, 128, 4, 4, 3), HOPPER)) is fits
    assert blocks_per_sm(sizes, Block(16, 16, 64, 4, 4, 3), HOPPER)


def test_proposals_differ_in_their_tiles() -> None:
    kernel = kernel_for(4096, torch.bfloat16, HOPPER)
    tiles = {one.launches[0].constants[:2] for one in proposals(kernel, HOPPER)}
    assert len(tiles) >= 4


def test_bounds_keep_what_the_text_relies_on() -> None:
    """Without a mask along columns only tiles that divide their number may be proposed."""
    found = regions_of(residual, (1000, 4096), (96, 4096), (1000, 96))
    kernel = kernel_of(found.regions[0], HOPPER)
    columns = dict(kernel.launches[0].constants)["COLUMNS"]
    for one in proposals(kernel, HOPPER):
        now = dict(one.launches[0].constants)["COLUMNS"]
        assert 96 % columns or 96 % now == 0


def test_no_time_is_below_the_roofline() -> None:
    flops, moved = 2.0 * 4096**3, 3.0 * 2 * 4096**2
    least = HOPPER.time(moved, flops, torch.bfloat16, tensor_cores=True)
    for rows, columns in ((64, 64), (128, 128), (128, 256)):
        assert seconds(SQUARE, Block(rows, columns, 64, 8, 3, 3), moved, HOPPER) > least


def test_large_tiles_are_faster_for_large_products_and_small_ones_where_sms_are_idle() -> None:
    large, small = Block(128, 128, 64, 8, 3, 3), Block(32, 32, 64, 4, 3, 3)
    few = replace(SQUARE, rows=256, columns=(256,))
    assert seconds(SQUARE, large, 1e8, HOPPER) < seconds(SQUARE, small, 1e8, HOPPER)
    assert seconds(few, small, 1e6, HOPPER) < seconds(few, large, 1e6, HOPPER)
    assert best_tile(SQUARE, 3, 256, HOPPER).rows >= 128


def test_what_does_not_fit_takes_for_ever() -> None:
    too_much = Block(256, 256, 128, 8, 4, 3)
    assert blocks_per_sm(SQUARE, too_much, HOPPER) == 0
    assert math.isinf(seconds(SQUARE, too_much, 1e8, HOPPER))


def test_a_tile_for_pairs_is_no_wider_than_a_pair() -> None:
    assert best_tile(SQUARE, 3, 64, HOPPER).columns <= 64


@pytest.mark.parametrize("rows", [1, 8, 512])
def test_threads_are_what_warps_follow_from(rows: int) -> None:
    """On a card with wider warps blocks have the threads that they have elsewhere, not the warps."""
    wide = replace(HOPPER, warp_size=64)
    shapes = [(rows, 512), (512,), (1024, 512), (1024, 512)]
    for region in regions_of(gated, *shapes).regions:
        narrow, other = kernel_of(region, HOPPER), kernel_of(region, wide)
        for one, two in zip(narrow.launches, other.launches, strict=True):
            assert one.products or one.num_warps == 2 * two.num_warps
        for one in proposals(other, wide):
            assert all(launch.num_warps * 64 <= 1024 for launch in one.launches)
