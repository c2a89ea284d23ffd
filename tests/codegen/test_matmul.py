"""Matrix products with few rows: what becomes one kernel with them, and what must not."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import fx
from torch._inductor.decomposition import select_decomp_table
from torch.fx.experimental.proxy_tensor import make_fx
from torch.nn import functional as F

from fxopt.codegen.kernels import kernel_of
from fxopt.codegen.matmul import MatmulBody
from fxopt.codegen.product_operands import MOST_ROWS
from fxopt.codegen.regions import Partition, partition
from fxopt.ir.target import Target

x, scale = torch.randn(1, 2, 32), torch.randn(32)
square, wide = torch.randn(32, 32), torch.randn(48, 32)


def rms_norm(a: torch.Tensor) -> torch.Tensor:
    return a * (a.pow(2).mean(-1, keepdim=True) + 1e-6).rsqrt()


def graph_of(function: Callable[..., Any], *inputs: Any) -> fx.Graph:
    return make_fx(function, decomposition_table=select_decomp_table(), tracing_mode="fake")(*inputs).graph


def regions_of(function: Callable[..., Any], *inputs: Any) -> Partition:
    return partition(graph_of(function, *inputs), frozenset({"cpu"}))


def products(found: Partition) -> list[int]:
    """How many products each region has."""
    bodies = [region.body for region in found.regions]
    return [len(body.products) if isinstance(body, MatmulBody) else 0 for body in bodies]


def reasons(found: Partition) -> str:
    return "; ".join(reason for _, reason in found.refused)


# What becomes one kernel


def test_norm_and_projections_of_queries_keys_and_values() -> None:
    def project(a: torch.Tensor, *weights: torch.Tensor) -> list[torch.Tensor]:
        normal = rms_norm(a)
        return [F.linear(normal, weight) for weight in weights]

    (region,) = regions_of(project, x, square, wide, wide).regions
    assert isinstance(region.body, MatmulBody)
    assert [int(part.columns.size) for part in region.body.parts] == [32, 48, 48]
    assert len(region.outputs) == 3
    assert region.fused.bytes < region.apart.bytes


def test_norm_gate_up_and_activation() -> None:
    def gated(a: torch.Tensor, gate: torch.Tensor, up: torch.Tensor) -> torch.Tensor:
        normal = rms_norm(a)
        return F.silu(F.linear(normal, gate)) * F.linear(normal, up)

    (region,) = regions_of(gated, x, wide, wide).regions
    assert isinstance(region.body, MatmulBody)
    assert [len(part.products) for part in region.body.parts] == [2]
    assert len(region.outputs) == 1


def test_projection_bias_and_residual() -> None:
    found = regions_of(lambda a, w, b, r: r + F.linear(a, w, b), x, square, scale, x)
    assert [len(region.members) for region in found.regions] == [2]
    assert products(found) == [1]


def test_what_is_in_front_and_read_elsewhere_is_a_second_result() -> None:
    """The residual sum in front of a norm, as in layers that normalise what they add."""

    def layer(a: torch.Tensor, b: torch.Tensor, weight: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        total = a + b
        return total, F.linear(F.layer_norm(total, (32,)), weight)

    (region,) = regions_of(layer, x, x, wide).regions
    assert len(region.outputs) == 2
    assert "for start in range(tile * SPAN, 32, tl.num_programs(0) * SPAN):" in kernel_of(region, None).jit


def test_a_product_that_others_read_is_a_result() -> None:
    (region,) = regions_of(lambda a, w: (y := F.linear(a, w), y.topk(2)[0], F.silu(y) * 2), x, wide).regions
    assert len(region.outputs) == 2


def test_products_of_one_operand_need_nothing_in_front() -> None:
    assert products(regions_of(lambda a, v, w: (F.linear(a, v), F.linear(a, w)), x, square, wide)) == [2]


def test_weights_are_converted_where_they_are_read() -> None:
    def dequantized(a: torch.Tensor, weight: torch.Tensor, scales: torch.Tensor) -> torch.Tensor:
        return F.linear(a, weight.to(a.dtype) * scales)

    narrow = torch.randint(-9, 9, (48, 32), dtype=torch.int8)
    (region,) = regions_of(dequantized, x, narrow, torch.randn(48, 1)).regions
    assert products(Partition([region])) == [1]
    assert region.fused.bytes < 48 * 32 * 4


@pytest.mark.parametrize("rows", range(1, MOST_ROWS + 1))
def test_every_number_of_rows(rows: int) -> None:
    found = regions_of(lambda a, w: F.relu(F.linear(a, w)) * 2, torch.randn(rows, 32), wide)
    assert products(found) == [1]
    assert ("tl.dot(" in kernel_of(found.regions[0], None).jit) == (rows > 1)


# What must not


def test_more_rows_are_left_to_the_host() -> None:
    found = regions_of(lambda a, w: F.linear(a, w) + 1, torch.randn(MOST_ROWS + 1, 32), wide)
    assert products(found) == []


def test_one_product_alone_is_left_to_the_host() -> None:
    assert products(regions_of(F.linear, x, wide)) == []


@pytest.mark.parametrize("dtype", [torch.float64, torch.int32])
def test_other_dtypes_are_left_to_the_host(dtype: torch.dtype) -> None:
    found = regions_of(lambda a, w: (a @ w) + 1, torch.ones(2, 32).to(dtype), torch.ones(32, 8).to(dtype))
    assert products(found) == []


def test_scaled_sums_are_left_to_the_host() -> None:
    found = regions_of(lambda a, w, b: torch.addmm(b, a, w, beta=0.5) * 2, x[0], square, scale)
    assert products(found) == []


def test_other_numbers_of_summands_are_other_kernels() -> None:
    """The same numbers read as other rows."""

    def function(a: torch.Tensor, v: torch.Tensor, w: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        return a @ v + 1, a.view(4, 16) @ w + 1

    found = regions_of(function, x[0], square, torch.randn(16, 8))
    assert products(found) == [1, 1]


def test_other_operands_are_other_kernels() -> None:
    found = regions_of(lambda a, b, w: (a @ w) * (b @ w), x[0], x[0] + 1, square)
    assert products(found) == [1]
    assert "different operands" in reasons(found)


def test_the_transposed_result_is_computed_behind() -> None:
    found = regions_of(lambda a, w: (y := a @ w) + y.t(), torch.randn(8, 32), torch.randn(32, 8))
    assert products(found) == []
    assert "at another element" in reasons(found)


def test_what_only_reads_the_operand_is_another_kernel() -> None:
    found = regions_of(lambda a, w: ((a @ w) + 1, (a * 2).exp()), x[0], square)
    assert products(found) == [1, 0]
    found = regions_of(lambda a, w: ((a @ w) + 1, a.exp()), x[0], square)
    assert products(found) == [1]


def test_a_norm_behind_is_another_kernel() -> None:
    found = regions_of(lambda a, w: rms_norm(a @ w + 1), x[0], square)
    assert products(found) == [1, 0]


def test_a_second_product_is_another_kernel() -> None:
    found = regions_of(lambda a, v, w: F.relu(F.relu(a @ v) @ w), x[0], square, square)
    assert products(found) == [1, 1]


def test_a_write_between_is_not_crossed() -> None:
    def function(a: torch.Tensor, b: torch.Tensor, w: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        before = (a @ w) + 1
        b.copy_(before)
        return F.linear(a, w) * 2, before

    found = regions_of(function, x[0].clone(), x[0].clone(), square)
    assert products(found) == [1, 1]
    found = regions_of(lambda a, w: (n := a * 2, a.add_(1), n @ w)[2], x[0].clone(), square)
    assert products(found) == []
    assert "a write" in reasons(found)


def test_a_path_between_siblings_keeps_them_apart() -> None:
    """The second reads, through an operator of the host, what the first computes."""

    def function(a: torch.Tensor, v: torch.Tensor, w: torch.Tensor) -> torch.Tensor:
        first = (a @ v) + 1
        return (a @ w) * first.sort(0)[0]

    found = regions_of(function, x[0], square, square)
    assert products(found) == [1, 1]


def test_dear_operators_are_not_computed_again_by_every_program() -> None:
    def function(a: torch.Tensor, w: torch.Tensor) -> torch.Tensor:
        return a.exp().sin().tanh().cos().sigmoid() @ w + 1

    assert [len(region.members) for region in regions_of(function, torch.randn(1, 32), square).regions] == [7]
    found = regions_of(function, torch.randn(16, 32), square)
    assert [len(region.members) for region in found.regions] == [5, 2]
    assert "operations for each byte of weights" in reasons(found)


# Texts


def test_equal_layers_have_equal_texts() -> None:
    def layer(a: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        return a + F.silu(F.linear(rms_norm(a), weight))

    found = regions_of(lambda a, v, w: layer(layer(a, v), w).sort()[0], x, square, square)
    texts = [kernel_of(region, Target.named("sm_90")).jit for region in found.regions]
    assert len(texts) == 2
    assert texts[0] == texts[1]


def test_few_columns_are_spread_over_the_target() -> None:
    (region,) = regions_of(
        lambda a, w: F.linear(a, w) + 1, torch.randn(1, 512), torch.randn(1024, 512)
    ).regions
    columns = {
        name: dict(kernel_of(region, Target.named(name)).launches[0].constants) for name in ("sm_80", "sm_86")
    }
    assert columns["sm_80"]["COLUMNS"] == 4
    assert columns["sm_86"]["COLUMNS"] == 4


def test_pieces_of_a_deep_product_are_summed_by_programs_of_their_own() -> None:
    def grids(columns: int, depth: int, name: str | None) -> list[int]:
        weight = torch.empty(columns, depth, device="meta")
        gm = make_fx(lambda a, w: F.relu(F.linear(a, w)) + 1, select_decomp_table(), "fake")(
            torch.empty(4, depth, device="meta"), weight
        )
        (region,) = partition(gm.graph, frozenset({"meta"})).regions
        kernel = kernel_of(region, Target.named(name) if name else None)
        assert len(kernel.scratch) == len(kernel.launches) - 1
        return [len(launch.grid) for launch in kernel.launches]

    assert grids(1024, 16384, "sm_90") == [3, 1]
    assert grids(1024, 2048, "sm_90") == [2], "SMs are idle for less than a launch takes"
    assert grids(8192, 16384, "sm_90") == [2], "all SMs have columns"
    assert grids(1024, 16384, None) == [2], "nothing is known of SMs"
