"""Matrix products with many rows: which become kernels, with what around them, and when."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import fx
from torch._inductor.decomposition import select_decomp_table
from torch._subclasses import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx
from torch.nn import functional as F
from torch.utils._pytree import tree_map_only

from fxopt.codegen.choose_products import candidates, choose, compared
from fxopt.codegen.emit import Decision, emit_kernels
from fxopt.codegen.kernel_file import KernelFile
from fxopt.codegen.kernels import kernel_of
from fxopt.codegen.matmul import MatmulBody
from fxopt.codegen.regions import Partition, partition
from fxopt.ir.contract import Status
from fxopt.ir.target import Target
from fxopt.options import Options
from support.emitted_large_products import gradients, interleaved_projections, stacks
from support.emitted_products import gated, projections, residual

CPU = frozenset({"cpu"})
HOPPER = Target.named("sm_90")


def module_of(
    function: Callable[..., Any], *shapes: Sequence[int], dtype: torch.dtype = torch.bfloat16
) -> fx.GraphModule:
    with FakeTensorMode():
        inputs = [torch.empty(shape, dtype=dtype) for shape in shapes]
        gm = make_fx(function, decomposition_table=select_decomp_table())(*inputs)
    gm.graph.eliminate_dead_code()
    return gm


def regions_of(function: Callable[..., Any], *shapes: Sequence[int], **options: Any) -> Partition:
    graph = module_of(function, *shapes, **options).graph
    choose(graph, candidates(graph, CPU))
    return partition(graph, CPU)


def products(found: Partition) -> list[int]:
    bodies = [region.body for region in found.regions]
    return [len(body.products) if isinstance(body, MatmulBody) else 0 for body in bodies]


def reasons(found: Partition) -> str:
    return "; ".join(reason for _, reason in found.refused)


# What becomes one kernel


@pytest.mark.parametrize(
    ("function", "shapes", "expected"),
    [
        (lambda a, w: F.relu(F.linear(a, w)), [(64, 32), (48, 32)], [1]),
        (lambda a, w, b: F.gelu(F.linear(a, w, b)), [(2, 32, 32), (48, 32), (48,)], [1]),
        (residual, [(64, 48), (32, 48), (64, 32)], [1]),
        (lambda a, g, u: F.silu(F.linear(a, g)) * F.linear(a, u), [(64, 32), (48, 32), (48, 32)], [2]),
        (lambda a, q, k: (F.linear(a, q) + 1, F.linear(a, k) + 1), [(64, 32), (48, 32), (16, 32)], [2]),
        (lambda g, x: (g.t() @ x).float(), [(64, 32), (64, 48)], [1]),
        (lambda a, w: F.relu(a).t() @ w + 1, [(64, 32), (64, 48)], [1]),
        (stacks, [(3, 20, 40), (3, 40, 24), (24,)], [1]),
        (interleaved_projections(16, 8), [(2, 30, 32), (64, 32), (32, 32), (30, 1, 8), (30, 1, 8)], [2]),
    ],
)
def test_one_kernel(function: Callable[..., Any], shapes: list[Sequence[int]], expected: list[int]) -> None:
    found = regions_of(function, *shapes)
    assert products(found) == expected, reasons(found)


def test_a_norm_in_front_of_projections_is_in_their_kernel() -> None:
    shapes = [(64, 32), (32,), (48, 32), (48, 32), (48, 32), (48,)]
    assert products(regions_of(projections, *shapes, dtype=torch.float32)) == [3]


def test_a_gradient_is_computed_behind_the_product_that_is_computed_again() -> None:
    """Of an activation; then a product with the input's gradient added; sums over rows are another kernel."""
    found = regions_of(gradients, (64, 32), (48, 32), (64, 48))
    assert products(found) == [1, 1, 0]
    assert "at another element" in reasons(found), "the transposed gradient, for that of the weight"


# What must not


def test_none_becomes_a_kernel_without_being_chosen() -> None:
    graph = module_of(lambda a, w: F.relu(F.linear(a, w)), (64, 32), (48, 32)).graph
    choose(graph, candidates(graph, CPU))
    choose(graph, ())
    assert products(partition(graph, CPU)) == []


@pytest.mark.parametrize(
    "shapes", [[(64, 1), (48, 1)], [(0, 32), (48, 32)], [(64, 32), (0, 32)]], ids=["K=1", "M=0", "N=0"]
)
def test_what_has_no_sum_or_no_elements_is_left(shapes: list[Sequence[int]]) -> None:
    assert products(regions_of(lambda a, w: F.relu(F.linear(a, w)), *shapes)) == []


def test_a_stack_and_a_matrix_are_different_kernels() -> None:
    found = regions_of(lambda a, b, w: (a @ b)[0] * (a[0] @ w), (3, 20, 40), (3, 40, 24), (40, 24))
    assert 2 not in products(found)


def test_too_much_in_front_is_computed_once() -> None:
    def function(a: torch.Tensor, w: torch.Tensor) -> torch.Tensor:
        return F.relu(F.linear(a.exp().sin().tanh().cos(), w))

    found = regions_of(function, (64, 32), (48, 32))
    assert sorted(products(found)) == [0, 1]
    assert "operations for each element" in reasons(found)


def test_pairs_that_are_not_neighbours_nor_halves_are_not_exchanged() -> None:
    def function(a: torch.Tensor, w: torch.Tensor) -> torch.Tensor:
        y = F.linear(a, w).unflatten(-1, (-1, 6))
        return y + torch.cat([-y[..., 3:], y[..., :3]], -1)

    found = regions_of(function, (64, 32), (48, 32))
    assert products(found) == [0] or products(found) == []
    assert "at another element" in reasons(found)


def test_neighbours_of_an_odd_number_of_columns_are_not_exchanged() -> None:
    def function(a: torch.Tensor, w: torch.Tensor) -> torch.Tensor:
        y = F.linear(a, w)
        return y[:, :-1] + torch.stack([-y[:, 1::2], y[:, :-1:2]], -1).flatten(-2)

    found = regions_of(function, (64, 32), (49, 32))
    assert 1 not in products(found)


# When


def emitted(
    function: Callable[..., Any], *shapes: Sequence[int], decide: Any = None, directory: Path, **options: Any
) -> tuple[list[KernelFile], list[str]]:
    """The kernels, and why products were left to the library."""
    gm = module_of(function, *shapes)
    gm.graph = _on_gpu(gm)
    given = Options.parse(options={"cache_dir": str(directory), "target": "sm_90", **options}, environ={})
    kernels, evidence = emit_kernels(gm, given, call=False, decide=decide)
    left = [one.reason for one in evidence if one.status is Status.UNPROFITABLE]
    return kernels, [reason for reason in left if reason.startswith("left to the library")]


def _on_gpu(gm: fx.GraphModule) -> fx.Graph:
    """Kernels are made for graphs on a GPU: the values of this one say that they are there."""

    def moved(value: Any) -> torch.Tensor:
        with value.fake_mode:
            return torch.empty_strided(value.shape, value.stride(), dtype=value.dtype, device="cuda")

    for node in gm.graph.nodes:
        node.meta["val"] = tree_map_only(torch.Tensor, moved, node.meta.get("val"))
    return gm.graph


LARGE = (residual, (4096, 8192), (2048, 8192), (4096, 2048))
SMALL = (residual, (32, 4096), (4096, 4096), (32, 4096))


def test_the_model_leaves_large_products_to_the_library(tmp_path: Path) -> None:
    kernels, left = emitted(*LARGE, directory=tmp_path)
    assert kernels == []
    (reason,) = left
    assert "by the model" in reason
    assert "us in one kernel" in reason
    assert reason.endswith("on sm_90")


def test_always_and_never(tmp_path: Path) -> None:
    (kernel,), left = emitted(*LARGE, directory=tmp_path, gemm="always")
    assert kernel.launches[0].products is not None
    assert left == []
    assert emitted(*LARGE, directory=tmp_path, gemm="never") == ([], [])


def test_few_more_rows_than_a_tile_are_priced_a_win(tmp_path: Path) -> None:
    """Reading the weights takes all the time, and the launch between is saved."""
    kernels, left = emitted(*SMALL, directory=tmp_path)
    assert (len(kernels), left) == (1, [])


@pytest.mark.parametrize("faster", [True, False])
def test_what_was_measured_decides(tmp_path: Path, faster: bool) -> None:
    def decide(kernels: Sequence[KernelFile]) -> list[Decision]:
        return [Decision(kernel, "measured: 3 us, 4 us", faster=faster) for kernel in kernels]

    for case in (LARGE, SMALL):
        kernels, left = emitted(*case, directory=tmp_path, decide=decide)
        assert len(kernels) == faster
        assert left == ([] if faster else ["left to the library: measured: 3 us, 4 us"])


def test_what_is_left_is_fused_without_the_product(tmp_path: Path) -> None:
    """The residual sum goes into the norm behind it, as if the product had not been tried."""

    def layer(a: torch.Tensor, w: torch.Tensor, r: torch.Tensor) -> torch.Tensor:
        return F.layer_norm(r + F.linear(a, w), (2048,))

    kernels, left = emitted(layer, *LARGE[1:], directory=tmp_path)
    assert len(left) == 1
    (kernel,) = kernels
    assert "aten.add.Tensor" in kernel.about.replaces
    assert kernel.launches[0].products is None


def test_a_product_alone_is_left_and_said_so(tmp_path: Path) -> None:
    kernels, left = emitted(lambda a, w: F.linear(a, w), (64, 32), (48, 32), directory=tmp_path)
    assert kernels == []
    assert left == ["left to the library: nothing in front of it or behind it can be part of its kernel"]


def test_a_comparison_knows_the_dtype() -> None:
    """Float32 in full precision is multiplied without the matrix units, by the library too."""
    shapes = [(4096, 4096), (4096, 4096), (4096, 4096)]
    narrow, wide = (
        regions_of(residual, *shapes, dtype=dtype).regions[0] for dtype in (torch.bfloat16, torch.float32)
    )
    by_dtype = [compared(one, kernel_of(one, HOPPER), HOPPER) for one in (narrow, wide)]
    assert by_dtype[1].library > 8 * by_dtype[0].library


# Texts


def test_masks_stand_on_ragged_edges_alone() -> None:
    def text(*sizes: int) -> str:
        rows, depth, columns = sizes
        found = regions_of(lambda a, w: F.relu(F.linear(a, w)), (rows, depth), (columns, depth))
        return kernel_of(found.regions[0], HOPPER).jit

    assert "inside" not in text(1024, 1024, 1024)
    assert "inside_m" in text(1000, 1024, 1024) and "inside_n" not in text(1000, 1024, 1024)
    assert "inside_k" in text(1024, 1000, 1024) and "inside_n" not in text(1024, 1000, 1024)
    assert "inside_n" in text(1024, 1024, 1000) and "inside_m" not in text(1024, 1024, 1000)


def test_offsets_that_need_64_bits_have_them() -> None:
    found = regions_of(lambda a, w: F.relu(F.linear(a, w)), (1 << 20, 4096), (64, 4096))
    assert "tl.program_id(0).to(tl.int64)" in kernel_of(found.regions[0], HOPPER).jit
    found = regions_of(lambda a, w: F.relu(F.linear(a, w)), (1 << 10, 4096), (64, 4096))
    assert "int64" not in kernel_of(found.regions[0], HOPPER).jit


@pytest.mark.parametrize(("allowed", "text"), [("highest", "ieee"), ("high", "tf32")])
def test_float32_is_as_precise_as_torch_is_told(allowed: str, text: str) -> None:
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision(allowed)
    try:
        found = regions_of(gated, (64, 32), (32,), (48, 32), (48, 32), dtype=torch.float32)
        (body,) = [one for one in found.regions if isinstance(one.body, MatmulBody)]
        assert f'input_precision="{text}"' in kernel_of(body, HOPPER).jit
    finally:
        torch.set_float32_matmul_precision(before)


def test_pieces_of_the_depth_are_added_in_order_or_as_they_come() -> None:
    def kernel(split_k: str) -> KernelFile:
        found = regions_of(lambda a, b: (a.t() @ b).float(), (65536, 64), (65536, 64))
        return kernel_of(found.regions[0], HOPPER, split_k)

    ordered, loose, whole = map(kernel, ("deterministic", "atomic", "never"))
    assert [len(one.launches) for one in (ordered, loose, whole)] == [2, 2, 1]
    assert "atomic_add" not in ordered.jit
    assert ordered.scratch[0].fill is None
    assert "tl.atomic_add" in loose.jit
    assert loose.scratch[0].fill == "0"
    assert loose.scratch[0].shape[0] == "1" != ordered.scratch[0].shape[0]
    assert len(whole.jit) in {len(one.jit) for one in ordered.alternatives}, "one of those to be measured"


def test_deterministic_algorithms_are_deterministic() -> None:
    found = regions_of(lambda a, b: (a.t() @ b).float(), (65536, 64), (65536, 64))
    torch.use_deterministic_algorithms(True)
    try:
        assert "atomic" not in kernel_of(found.regions[0], HOPPER, "atomic").jit
    finally:
        torch.use_deterministic_algorithms(False)
