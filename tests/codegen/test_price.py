"""The time below which a kernel cannot come."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from codegen.test_product_model import kernel_for
from torch.fx.experimental.proxy_tensor import make_fx
from torch.nn import functional as F
from torch.utils._sympy.functions import FloorDiv

import fxopt
from fxopt.codegen.price import hinted, least_seconds
from fxopt.ir.ops.tile_plan import live_scores
from fxopt.ir.program import MaskProgram
from fxopt.ir.sizes import size_of
from fxopt.ir.target import Target
from fxopt.report.record import collect

HOPPER = Target.named("sm_90")
LENGTH, WINDOW, HEADS, WIDTH = 512, 32, 2, 64


@pytest.mark.parametrize(("dtype", "on_matrix_units"), [(torch.bfloat16, True), (torch.float32, False)])
def test_a_large_product_takes_as_long_as_its_units_multiply(
    dtype: torch.dtype, on_matrix_units: bool
) -> None:
    """Matrix units have no float32 in full precision."""
    flops = 2 * 4096 * 2048 * 4096
    found = least_seconds(kernel_for(4096, dtype, HOPPER).about, HOPPER)
    assert found == pytest.approx(flops / HOPPER.rate(dtype, tensor_cores=on_matrix_units), rel=1e-3)


def test_a_product_of_one_row_takes_as_long_as_its_weight_is_read() -> None:
    about = kernel_for(1, torch.bfloat16, HOPPER).about
    assert least_seconds(about, HOPPER) == about.seen[0] / HOPPER.bandwidth
    assert about.seen[0] == pytest.approx(2 * 2048 * 4096, rel=1e-2)


@pytest.mark.parametrize("cut", [lambda x: x[: x.shape[0] // 4], lambda x: x[: x.shape[0] // 4 * 2 + 3]])
def test_sizes_of_which_parts_are_seen(cut: Callable[[torch.Tensor], torch.Tensor]) -> None:
    gm = make_fx(lambda x: cut(x).exp(), tracing_mode="symbolic")(torch.randn(12))
    first, last = gm.graph.find_nodes(op="placeholder")[0], list(gm.graph.nodes)[-2]
    (symbol,) = size_of(first.meta["val"].shape[0]).free_symbols
    assert size_of(last.meta["val"].shape[0]).has(FloorDiv)
    assert hinted(symbol, [last]) == hinted(symbol, [last, first]) == 12


def windowed(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
    places = torch.arange(LENGTH)
    back = places[:, None] - places
    return F.scaled_dot_product_attention(query, key, value, attn_mask=(back >= 0) & (back < WINDOW))


def test_scores_outside_of_a_window_take_no_time() -> None:
    inputs = [torch.randn(1, HEADS, LENGTH, WIDTH).bfloat16() for _ in range(3)]
    exact = sum(min(row + 1, WINDOW) for row in range(LENGTH))
    with collect() as records:
        cross = fxopt.cross_compile(windowed, *inputs, target="sm_90")
    (kernel,) = [one for record in records for one in record.kernels if "attention" in one.name]
    flops = kernel.about.seen[1] / (4 * HEADS * WIDTH)
    assert exact <= flops <= 1.4 * exact
    assert kernel.about.multiplied == (kernel.about.seen[1], "bfloat16")
    assert [one.seconds for one in cross.kernels] == [least_seconds(kernel.about, HOPPER)]


@pytest.mark.parametrize(
    ("mask", "sizes", "least", "most"),
    [
        ("True", (), 300 * 500, 300 * 500),
        ("k <= q", (), 300 * 301 // 2, 300 * 301 // 2 + 300 * 5),
        ("k <= q + n0", (100,), 300 * 301 // 2 + 300 * 100, 300 * 301 // 2 + 300 * 105),
        ("c0[b, k]", (), 300 * 500, 300 * 500),
        ("False", (), 0, 0),
    ],
)
def test_scores_that_a_mask_leaves(mask: str, sizes: tuple[int, ...], least: int, most: int) -> None:
    assert least <= live_scores(MaskProgram.parse(mask), sizes, 300, 500) <= most
