"""Which configurations a model of the GPU proposes."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from torch._inductor.decomposition import select_decomp_table
from torch._subclasses import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx

from fxopt.codegen.configurations import configuration, estimate, proposals
from fxopt.codegen.kernel_file import KernelFile, Launch
from fxopt.codegen.kernels import kernel_of
from fxopt.codegen.regions import partition
from fxopt.ir.target import Target, all_targets

HOPPER = Target.named("sm_90")


def kernel_for(name: str) -> KernelFile:
    function, shape = {
        "pointwise": (lambda x: torch.sin(x) * 2, (4096, 4096)),
        "rows": (lambda x: torch.layer_norm(x, [4096]) * 2, (2048, 4096)),
        "long rows": (lambda x: x.softmax(-1) * 2, (512, 32000)),
        "columns": (lambda x: (x * 2).sum(0), (8192, 512)),
        "few": (lambda x: torch.sin(x) * 2, (3,)),
    }[name]
    with FakeTensorMode():
        gm = make_fx(function, select_decomp_table())(torch.empty(shape))
    (region,) = partition(gm.graph, frozenset({"cpu"})).regions
    return kernel_of(region, HOPPER)


NAMES = ("pointwise", "rows", "long rows", "columns", "few")


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("target", all_targets(), ids=lambda target: target.name)
def test_proposals_fit_the_target(name: str, target: Target) -> None:
    kernel = kernel_for(name)
    found = proposals(kernel, target)
    assert found[0] is kernel
    assert len(found) <= 6
    assert len(set(map(configuration, found))) == len(found)
    for launch in (launch for one in found[1:] for launch in one.launches):
        assert launch.num_warps * target.warp_size <= 1024
        assert estimate(launch, 1 << 20, target).blocks >= 1
    assert found == proposals(kernel, target)


@pytest.mark.parametrize("name", ["pointwise", "rows", "long rows", "columns"])
def test_there_is_a_choice(name: str) -> None:
    assert len(proposals(kernel_for(name), HOPPER)) >= 4


def test_only_what_may_change_changes() -> None:
    kernel = kernel_for("rows")
    for one in proposals(kernel, HOPPER):
        assert dict(one.launches[0].constants)["COLUMNS"] == 4096, "a row is one tile"
        assert (one.jit, one.outputs, one.reference) == (kernel.jit, kernel.outputs, kernel.reference)


def test_what_must_not_change_stays_and_the_warps_vary() -> None:
    kernel = kernel_for("rows")
    fixed = replace(kernel, launches=tuple(replace(one, adjustable=()) for one in kernel.launches))
    found = proposals(fixed, HOPPER)
    assert {one.launches[0].constants for one in found} == {kernel.launches[0].constants}
    assert len({one.launches[0].num_warps for one in found}) == len(found) >= 3


def launch(tile: int, warps: int, extent: int = 1 << 24, pointers: int = 2) -> Launch:
    from fxopt.codegen.kernel_file import Argument

    arguments = tuple(Argument(f"x{place}_ptr", "*fp32") for place in range(pointers))
    grid = ("triton.cdiv(n, ROWS)",)
    return Launch("f", arguments, grid, (("ROWS", tile),), warps, adjustable=(("ROWS", extent),))


def test_what_needs_more_registers_than_there_are_does_not_fit() -> None:
    assert estimate(launch(1 << 16, 4), 1 << 26, HOPPER).blocks == 0
    assert math.isinf(estimate(launch(1 << 16, 4), 1 << 26, HOPPER).seconds)


def test_blocks_on_few_sms_are_slow() -> None:
    few, many = launch(8192, 16, extent=1 << 17), launch(512, 4, extent=1 << 17)
    assert estimate(many, 1 << 20, HOPPER).seconds < estimate(few, 1 << 20, HOPPER).seconds


def test_no_estimate_is_below_the_roofline() -> None:
    moved = 1 << 28
    for tile in (128, 512, 2048):
        assert estimate(launch(tile, 4), moved, HOPPER).seconds > HOPPER.time(moved, 0.0, torch.float32)
