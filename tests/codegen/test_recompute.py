"""What a kernel computes again in place of reading it, and when it must not."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import fx
from torch._inductor.decomposition import select_decomp_table
from torch.fx.experimental.proxy_tensor import make_fx

from fxopt.codegen.emit import Decision, emit_kernels
from fxopt.codegen.kernel_file import KernelFile
from fxopt.codegen.region import Region
from fxopt.codegen.regions import partition
from fxopt.ir.contract import Status
from fxopt.options import Options

CPU = frozenset({"cpu"})
Value = torch.Tensor
x, y = torch.randn(64, 96).bfloat16(), torch.randn(64, 96).bfloat16()


def graph_of(function: Callable[..., Any], *inputs: Value) -> fx.GraphModule:
    return make_fx(function, decomposition_table=select_decomp_table(), tracing_mode="fake")(*inputs)


def regions_of(function: Callable[..., Any], *inputs: Value) -> list[Region]:
    return partition(graph_of(function, *inputs).graph, CPU).regions


def again(regions: list[Region]) -> list[list[str]]:
    return [[node.name for node in region.again] for region in regions]


def both_sums(a: Value, b: Value) -> tuple[Value, Value]:
    """In float32, from tensors of half the width: neither loop has it from the other unless it is written."""
    wide = a.float() * b.float()
    return wide - wide.sum(-1, keepdim=True), wide.sum(0)


def test_a_wide_product_of_narrow_tensors_is_computed_twice() -> None:
    rows, columns = regions_of(both_sums, x, y)
    assert again([rows, columns]) == [[], ["convert_element_type", "convert_element_type_1", "mul"]]
    assert [len(region.outputs) for region in (rows, columns)] == [1, 1], "the product is written nowhere"
    assert columns.fused.bytes == 2 * x.nbytes + 96 * 4
    assert "bytes of the kernels concerned" in columns.why_again
    assert rows.why_again == ""


def test_a_chain_of_narrow_tensors_is_read() -> None:
    """Reading one result costs less than reading the three tensors that it is made of."""

    def function(a: Value, b: Value, c: Value) -> tuple[Value, Value]:
        total = a + b * c
        return total - total.sum(-1, keepdim=True), total.sum(0)

    assert again(regions_of(function, x, x + 1, x + 2)) == [[], []]


def test_what_is_written_anyway_is_read() -> None:
    def function(a: Value, b: Value, weight: Value) -> tuple[Value, ...]:
        wide = a.float() * b.float()
        return wide - wide.sum(-1, keepdim=True), wide.sum(0), wide @ weight

    for region in regions_of(function, x, y, torch.randn(96, 32)):
        assert region.again == (), "two tensors of half the width are as much as it"


def test_many_operations_are_not_repeated() -> None:
    """More operations than a GPU does while it reads the bytes that they save."""

    def function(a: Value, b: Value) -> tuple[Value, Value]:
        wide = a.float()
        for _ in range(12):
            wide = (wide * b.float()).sin().exp()
        return wide - wide.sum(-1, keepdim=True), wide.sum(0)

    assert again(regions_of(function, x, x + 1)) == [[], []]


def test_reductions_are_not_repeated() -> None:
    def function(a: Value) -> tuple[Value, Value]:
        normal = a.float() - a.float().mean(-1, keepdim=True)
        return normal * 2, normal.sum(0)

    for region in regions_of(function, x):
        assert not any("mean" in node.name for node in region.again)


def test_nothing_is_read_on_another_side_of_a_write() -> None:
    def function(a: Value, b: Value) -> tuple[Value, Value]:
        wide = a.float() * b.float()
        rows = wide - wide.sum(-1, keepdim=True)
        a.copy_(b)
        return rows, wide.sum(0)

    assert again(regions_of(function, x.clone(), x)) == [[], []]


def test_random_numbers_are_not_repeated() -> None:
    def function(a: Value) -> tuple[Value, Value]:
        wide = torch.rand_like(a).float() * a.float()
        return wide - wide.sum(-1, keepdim=True), wide.sum(0)

    for region in regions_of(function, x):
        assert all("rand" not in node.name for node in region.again)


def test_a_result_that_all_its_readers_compute_is_written_by_none() -> None:
    """Three loops over the same product."""

    def function(a: Value, b: Value) -> tuple[Value, ...]:
        wide = a.float() * b.float()
        return wide - wide.sum(-1, keepdim=True), wide.sum(0), wide.view(16, 4, 96).sum(1) * 2

    regions = regions_of(function, x, x + 1)
    assert sum(bool(region.again) for region in regions) == len(regions) - 1
    for region in regions:
        assert all(node.name != "mul" for node in region.outputs)


def test_the_same_graph_gives_the_same_decisions() -> None:
    graph = graph_of(both_sums, x, y).graph
    first, second = (partition(graph, CPU).regions for _ in range(2))
    assert again(first) == again(second)
    assert [one.members for one in first] == [one.members for one in second], "nothing was changed"


def emitted(tmp_path: Any, left: int | None) -> tuple[fx.GraphModule, list[Any]]:
    """The graph with calls of all kernels but the one that is left to the host."""
    graph = graph_of(both_sums, x, y)

    def decide(kernels: list[KernelFile]) -> list[Decision]:
        return [Decision(None if place == left else one) for place, one in enumerate(kernels)]

    options = Options.parse(options={"cache_dir": str(tmp_path), "target": "sm_90"})
    import triton

    with triton.knobs.runtime.scope():
        triton.knobs.runtime.interpret = True
        _, evidence = emit_kernels(graph, options, call=True, decide=decide)  # type: ignore[arg-type]
    return graph, evidence


def test_kernels_take_the_place_of_both(tmp_path: Any) -> None:
    graph, evidence = emitted(tmp_path, None)
    calls = [node for node in graph.graph.nodes if node.op == "call_function"]
    assert len(calls) == 2, graph.code
    reasons = [entry.reason for entry in evidence if entry.status is Status.APPLIED]
    assert any("3 operators of others computed again" in reason for reason in reasons)


def test_the_host_computes_what_a_kernel_no_longer_writes(tmp_path: Any) -> None:
    """Whichever of both kernels the host keeps, the graph still says the same."""
    for left in (0, 1):
        graph, _ = emitted(tmp_path, left)
        names = [str(node.target) for node in graph.graph.nodes if node.op == "call_function"]
        assert sum("fused" in name for name in names) == 1, names
        assert sum("mul" in name for name in names) == 1, "computed once by the host"
