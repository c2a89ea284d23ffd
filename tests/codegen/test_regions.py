"""Which operators become one kernel, and which must not."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import sympy
import torch
from torch import fx
from torch._inductor.decomposition import select_decomp_table
from torch.fx.experimental.proxy_tensor import make_fx

from fxopt.codegen.emit import emit_kernels
from fxopt.codegen.kernels import kernel_of
from fxopt.codegen.regions import Partition, is_barrier, partition
from fxopt.options import Options
from support.programs import findings

aten = torch.ops.aten
CPU = frozenset({"cpu"})
x, y = torch.randn(6, 8), torch.randn(6, 8)


def graph_of(function: Callable[..., Any], *inputs: Any) -> fx.GraphModule:
    return make_fx(function, decomposition_table=select_decomp_table(), tracing_mode="fake")(*inputs)


def regions_of(function: Callable[..., Any], *inputs: Any) -> Partition:
    return partition(graph_of(function, *inputs).graph, CPU)


def members(found: Partition) -> list[list[str]]:
    return [[node.name for node in region.members] for region in found.regions]


def test_a_chain_is_one_region_and_counts_its_bytes_once() -> None:
    found = regions_of(lambda a, b: torch.relu(a + b) * 2, x, y)
    assert members(found) == [["add", "relu", "mul"]]
    assert found.regions[0].fused.bytes == 3 * x.nbytes
    assert found.regions[0].apart.bytes == (3 + 2 + 2) * x.nbytes


def test_a_norm_is_one_region_with_the_sum_in_front_as_second_result() -> None:
    def add_norm(a: torch.Tensor, b: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        total = a + b
        return total, total * (total.pow(2).mean(-1, keepdim=True) + 1e-6).rsqrt()

    found = regions_of(add_norm, x, x)
    assert [len(region.outputs) for region in found.regions] == [2]


def test_layer_norm_takes_both_moments() -> None:
    found = regions_of(lambda a: torch.nn.functional.layer_norm(a, (8,)), x)
    assert len(found.regions) == 1


def test_single_numbers_are_left_to_the_host() -> None:
    counter = torch.zeros((), dtype=torch.int64)
    found = regions_of(lambda a: (a + 1) * 2, counter)
    assert found.regions == []
    assert [reason for _, reason in found.refused] == [
        "a single number, which the host computes where it is used"
    ]
    assert len(regions_of(lambda a, b: (a + 1) * b, counter, x).regions) == 1
    assert len(regions_of(lambda a: (a + 1).sum(), x).regions) == 1, "made of many numbers"


def test_prices_are_expressions_of_symbolic_sizes() -> None:
    graph = make_fx(lambda a, b: (a[:, 1:] + b) * 2, tracing_mode="symbolic")(x, y[0, 1:])
    (region,) = partition(graph.graph, CPU).regions
    rows, columns = (size.node.expr for size in next(iter(graph.graph.nodes)).meta["val"].shape)
    wanted = 4 * (2 * rows * (columns - 1) + columns - 1)
    assert sympy.expand(region.fused.bytes - wanted) == 0
    assert kernel_of(region, None).about.seen == (4 * (2 * 6 * 7 + 7), 2 * 6 * 7)


def test_evidence_has_the_expressions_and_their_values(tmp_path: Any) -> None:
    """The size that is summed over is one of no result."""
    graph = make_fx(lambda a: (a * 2).sum(0), tracing_mode="symbolic")(torch.randn(6, 8))
    rows, columns = (size.node.expr for size in next(iter(graph.graph.nodes)).meta["val"].shape)
    options = Options.parse(options={"cache_dir": str(tmp_path)})
    _, (entry,) = emit_kernels(graph, options, call=False)
    every, sums = rows * columns, columns
    assert (
        f"bytes {12 * every + 4 * sums} -> {4 * every + 4 * sums}, operations {2 * every} -> {2 * every}, "
        "launches 2 -> 1" in entry.reason
    )
    assert (entry.before.bytes, entry.before.flops) == (12 * 48 + 4 * 8, 2 * 48)
    assert (entry.after.bytes, entry.after.flops) == (4 * 48 + 4 * 8, 2 * 48)


def test_softmax_is_one_region() -> None:
    assert len(regions_of(lambda a: a.softmax(-1), x).regions) == 1


def test_a_path_outside_keeps_two_regions() -> None:
    def function(a: torch.Tensor) -> torch.Tensor:
        first = torch.relu(a) * 2
        return first + (first @ first.t() @ first).exp() * 3

    found = regions_of(function, torch.randn(24, 8))
    assert members(found) == [["relu", "mul"], ["exp", "mul_1", "add"]]


def test_a_write_is_not_crossed() -> None:
    def function(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
        before = a.exp() + 1
        b.copy_(before)
        return (before * 2).exp()

    found = regions_of(function, x.clone(), x.clone())
    assert members(found) == [["exp", "add"], ["mul", "exp_1"]]
    assert any("a write, a collective or random numbers" in reason for _, reason in found.refused)


def test_a_collective_is_not_crossed() -> None:
    def function(a: torch.Tensor, b: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        before = (a.exp() + 1) * b
        reduced = before.neg()
        return (reduced * 2).exp(), before.sin() * 3

    graph = graph_of(function, x, y).graph
    (between,) = graph.find_nodes(op="call_function", target=torch.ops.aten.neg.default)
    assert members(partition(graph, CPU)) == [["exp", "add", "mul", "neg", "mul_1", "exp_1", "sin", "mul_2"]]
    between.target = torch.ops._c10d_functional.all_reduce.default
    between.args = (*between.args, "sum", "0")
    found = partition(graph, CPU)
    assert members(found) == [["exp", "add", "mul"], ["mul_1", "exp_1", "sin", "mul_2"]]
    assert any("a write, a collective or random numbers" in reason for _, reason in found.refused)


def test_random_numbers_are_not_crossed() -> None:
    def function(a: torch.Tensor) -> torch.Tensor:
        before = a.exp() + 1
        return before * torch.rand_like(before) + 2

    assert members(regions_of(function, x))[0] == ["exp", "add"]


def test_two_axes_are_two_regions() -> None:
    found = regions_of(lambda a: (a.exp().sum(0), a.exp().sum(1)), x)
    assert len(found.regions) == 2


def test_what_is_reduced_is_not_needed_along_the_row() -> None:
    """A matrix minus its columns' sums as rows: the loop over columns has another column's sum there."""
    square = torch.randn(8, 8)
    assert members(regions_of(lambda a: a - a.sum(0), square)) == [["sum_1", "sub"]]
    found = regions_of(lambda a: a - a.sum(0).unsqueeze(1), square)
    assert members(found) == [["sum_1"]]
    assert any("along the axes that it is reduced over" in reason for _, reason in found.refused)


def test_siblings_read_what_they_share_once() -> None:
    found = regions_of(lambda a, b: ((a + 1) * b, (a - b).exp() * a), x, y)
    assert members(found) == [["add", "mul", "sub", "exp", "mul_1"]]
    assert found.regions[0].fused.bytes == 4 * x.nbytes


def test_siblings_with_something_between_them_stay_apart() -> None:
    many = torch.randn(24, 8), torch.randn(24, 8)  # rows, which leave the products to the host
    found = regions_of(lambda a, b: ((a + 1) * 2, ((a + 1) * 3 @ b.t()) @ b + a), *many)
    assert len(found.regions) == 1
    assert "add_2" not in members(found)[0]


def test_siblings_over_other_axes_stay_apart() -> None:
    found = regions_of(lambda a: ((a + 1).sum(0), (a * 2).sum(1)), x)
    assert len(found.regions) == 2


# Kernels that read nothing of each other


@pytest.mark.parametrize(
    "function, count",
    [
        (lambda a, b: (a.exp() * 2, (b + 1).sin()), 2),
        (lambda a, b: (a.softmax(-1), b.float().softmax(-1)), 2),
        (lambda a, b: (a.sum(0) * 2, b.half().amax(0) + 1), 2),
        (lambda a, b: (a.exp() * 2, (b + 1).sin(), ((a @ b.t()) @ b + 1) * 2), 3),
    ],
)
def test_small_kernels_of_one_loop_are_one(function: Callable[..., Any], count: int) -> None:
    long = torch.randn(24, 8), torch.randn(24, 8)  # rows, which leave products to the host
    found = regions_of(function, *long)
    (region,) = found.regions
    total = sum(node.meta["val"].nbytes for node in region.outputs)
    total += sum(one.meta["val"].nbytes for one in {load.tensor for load in region.body.loads})
    assert region.why_beside == (
        f"{count} kernels that need nothing of each other: launches {count} -> 1, bytes {total} -> {total}"
    )
    assert region.fused.bytes == total


def test_kernels_that_were_joined_say_so() -> None:
    gm = graph_of(lambda a, b: (a.exp() * 2, (b + 1).sin()), x, y)
    _, (entry,) = emit_kernels(gm, Options.parse(options={"target": "sm_90"}), call=False)
    assert entry.reason.endswith("launches 2 -> 1, bytes 768 -> 768")


def written_between(a: torch.Tensor, b: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    first = a.exp() * 2
    b.add_(1)
    return first, (b + 1).sin()


@pytest.mark.parametrize(
    "function, sizes",
    [
        (
            lambda a, b: (a.exp() * 2, ((a.exp() * 2) @ b.t() @ b + 1).sin()),
            (24, 8, 24, 8),
        ),  # through a product
        (lambda a, b: (a.exp() * 2, (b + (a.exp() * 2).cumsum(0)).sin() * 3), (24, 8, 24, 8)),
        (lambda a, b: (a.exp() * 2, (b + 1).sin()), (6, 8, 8, 6)),  # as many elements, but others
        (lambda a, b: (a.exp() * 2, (b + 1).sin()), (6, 8, 6, 9)),
        (lambda a, b: (a.softmax(-1), b.softmax(0)), (6, 8, 6, 8)),
        (lambda a, b: (a.softmax(-1), b.exp() * 2), (6, 8, 6, 8)),  # no rows
        (lambda a, b: (a.exp() * 2, b.t().exp() * 2), (6, 6, 6, 6)),  # in another order in memory
        (written_between, (6, 8, 6, 8)),
        (lambda a, b: (a.exp() * 2, (b + 1).sin()), (512, 512, 512, 512)),  # longer than a launch
        (lambda a, b: (a.softmax(-1), b.softmax(-1)), (4, 4096, 4, 4096)),  # two rows fill the registers
    ],
)
def test_others_stay_apart(function: Callable[..., Any], sizes: tuple[int, int, int, int]) -> None:
    found = regions_of(function, torch.randn(*sizes[:2]), torch.randn(*sizes[2:]))
    assert len(found.regions) == 2
    assert [region.why_beside for region in found.regions] == ["", ""]


@pytest.mark.parametrize(
    "function, launches",
    [
        (lambda a: (a * 2).sum(0), 2),
        (lambda a: (a * 2).amax(), 2),
        (lambda a: (a * 2).sum(1), 1),  # rows enough
        (lambda a: a - (a * 2).sum(0), 1),  # the row is read again
        (lambda a: (a - a.mean(0)).abs().sum(0), 1),  # one reduction behind another
        (lambda a: (a[:300] * 2).sum(0), 1),  # short
    ],
)
def test_few_long_rows_are_reduced_in_pieces(function: Callable[..., Any], launches: int) -> None:
    (region, *_) = regions_of(function, torch.randn(40001, 5)).regions
    assert len(kernel_of(region, None).launches) == launches


@pytest.mark.parametrize("function", [torch.sin, torch.exp, torch.tanh])
def test_dear_operators_are_not_computed_again_for_a_broadcast(function: Callable[..., Any]) -> None:
    found = regions_of(lambda a, row: a * function(row + 1), x, x[0])
    assert any("computed again for every element" in reason for _, reason in found.refused)
    assert [len(region.members) for region in found.regions] == [2]


def test_views_are_index_arithmetic() -> None:
    def rotate(a: torch.Tensor) -> torch.Tensor:
        rotated = torch.cat([-a[:, 4:], a[:, :4]], -1) + a
        return rotated.view(2, 3, 8).transpose(0, 1).clone()

    found = regions_of(rotate, x)
    assert members(found) == [["neg", "cat", "add", "clone"]]


def test_single_operators_and_constants_are_left_to_the_host() -> None:
    found = regions_of(lambda a: (a.exp() @ a.t(), torch.ones(3) + 1), torch.randn(24, 8))
    assert members(found) == []


def test_what_nothing_reads_is_left_to_the_host() -> None:
    gm = graph_of(lambda a: (a @ a.t(), (a + 1).exp().sum(1)), x)
    (output,) = gm.graph.find_nodes(op="output")
    output.args = (output.args[0][0],)
    found = partition(gm.graph, CPU)
    assert "nothing reads its results" in [reason for _, reason in found.refused]


def test_empty_tensors_are_left_to_the_host() -> None:
    assert members(regions_of(lambda a: a.exp() + 1, x[:0])) == []


def test_complex_and_quantized_dtypes_are_left_to_the_host() -> None:
    assert members(regions_of(lambda a: a * 2 + 1, x.to(torch.complex64))) == []


def test_the_same_graph_gives_the_same_text() -> None:
    def function(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
        return (a * b).softmax(-1) + torch.tanh(b)

    def text() -> str:
        return "".join(kernel_of(region, None).render() for region in regions_of(function, x, y).regions)

    assert text() == text()


def test_the_same_graph_gives_the_same_text_in_every_process(monkeypatch: pytest.MonkeyPatch) -> None:
    """The order of sets is another one in each process."""
    found = []
    for seed in ("1", "2"):
        monkeypatch.setenv("PYTHONHASHSEED", seed)
        found.append(findings("support.region_texts", interpreted=False))
    assert len(found[0]) > 12
    assert found[0] == found[1]


def test_equal_layers_give_equal_kernels() -> None:
    def layer(a: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        return torch.nn.functional.silu(a @ weight) * 2 + a

    found = regions_of(lambda a, v, w: layer(layer(a, v), w), x, torch.randn(8, 8), torch.randn(8, 8))
    texts = [kernel_of(region, None).jit for region in found.regions]
    assert len(texts) == 2
    assert texts[0] == texts[1]


def test_offsets_beyond_32_bits_are_computed_in_64() -> None:
    wide = torch.empty(1, device="meta").expand(1 << 16, 1 << 16)
    gm = make_fx(lambda a: a.exp() + 1, tracing_mode="fake")(wide)
    found = partition(gm.graph, frozenset({"meta"}))
    (kernel,) = [kernel_of(region, None) for region in found.regions]
    assert "tl.program_id(0).to(tl.int64)" in kernel.jit
    small = partition(graph_of(lambda a: a.exp() + 1, x).graph, CPU).regions[0]
    assert "int64" not in kernel_of(small, None).jit


def test_attention_without_dropout_draws_no_numbers() -> None:
    def function(a: torch.Tensor, dropout: float) -> torch.Tensor:
        before = a.exp() + 1
        attended = aten._scaled_dot_product_flash_attention_for_cpu(a, a, a, dropout)[0]
        return before * 2 + attended

    heads = torch.randn(1, 2, 4, 8)
    together = regions_of(lambda a: function(a, 0.0), heads)
    assert members(together) == [["exp", "add", "mul", "add_1"]]
    barrier, *_ = (
        node
        for node in graph_of(lambda a: function(a, 0.5), heads).graph.find_nodes(
            op="call_function", target=aten._scaled_dot_product_flash_attention_for_cpu.default
        )
    )
    assert is_barrier(barrier)


def test_rope_in_sections_is_one_kernel_with_its_layout() -> None:
    def function(a: torch.Tensor, cos: torch.Tensor) -> torch.Tensor:
        parts = [2, 1, 3, 2, 1, 3]
        cos = torch.cat([one[i % 3] for i, one in enumerate(cos.split(parts, -1))], -1).unsqueeze(1)
        a = a.view(2, 5, 4, 12).transpose(1, 2)
        half = torch.cat([-a[..., 6:], a[..., :6]], -1)
        return (a * cos + half).transpose(1, 2).reshape(2, 5, 48)

    (region,) = regions_of(function, torch.randn(2, 5, 48), torch.randn(3, 2, 5, 12)).regions
    assert len(region.outputs) == 1


def test_evidence_has_numbers(tmp_path: Any) -> None:
    gm = graph_of(lambda a, b: torch.relu(a + b) * 2, x, x)
    before = gm.code
    kernels, evidence = emit_kernels(gm, Options.parse(options={"cache_dir": str(tmp_path)}), call=False)
    (applied,) = [entry for entry in evidence if entry.status == "applied"]
    assert "3 operators become the kernel" in applied.reason
    assert (applied.before.launches, applied.after.launches) == (3, 1)
    assert applied.after.bytes < applied.before.bytes
    assert len(kernels) == 1
    assert gm.code == before, "nothing is called, so nothing is changed"
