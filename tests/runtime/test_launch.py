"""A kernel as part of a compiled graph: what AOTAutograd and Inductor get to see of it."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import fx
from torch._dynamo.backends.common import aot_autograd
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.symbolic_shapes import ShapeEnv

from fxopt.codegen.compile import assumed_device
from fxopt.ir.target import Target
from fxopt.runtime.kernel_cache import KernelCache
from fxopt.runtime.launch import as_op, kernel_graph
from support import kernels

FUNCTIONAL = torch.ops.higher_order.triton_kernel_wrapper_functional


@pytest.fixture
def cache(tmp_path: Path) -> KernelCache:
    return KernelCache(tmp_path)


@pytest.fixture(autouse=True)
def hopper() -> Iterator[None]:
    with assumed_device(Target.named("sm_90")):
        yield


def _launches(graph: fx.Graph) -> list[fx.Node]:
    return [node for node in graph.nodes if node.target is FUNCTIONAL]


def test_autograd_dissolves_the_op_into_allocation_and_launch(cache: KernelCache) -> None:
    op = as_op(kernels.add(), cache=cache)
    graphs: list[fx.GraphModule] = []

    def keep(gm: fx.GraphModule, inputs: Any) -> Any:
        graphs.append(gm)
        return lambda *given: [torch.empty_like(given[-1])]

    compiled = torch.compile(
        lambda a, b: op(a * 2, b) + 1, backend=aot_autograd(fw_compiler=keep), fullgraph=True, dynamic=True
    )
    compiled(torch.randn(200).bfloat16(), torch.randn(200).bfloat16())
    (launch,) = _launches(graphs[0].graph)
    assert launch.kwargs["tensors_to_clone"] == ["out_ptr"]
    assert launch.kwargs["kwargs"]["out_ptr"].target is torch.ops.aten.empty.memory_format
    targets = [node.target for node in graphs[0].graph.nodes]
    assert op not in targets
    assert torch.ops.aten.mul.Tensor in targets


def test_graph_of_a_kernel_for_graphs_behind_autograd(cache: KernelCache) -> None:
    mode = FakeTensorMode(shape_env=ShapeEnv())
    given = mode.from_tensor(torch.randn(8, 40), static_shapes=False)
    gm = kernel_graph(kernels.softmax(), given, cache=cache)
    (launch,) = _launches(gm.graph)
    (grid,) = launch.kwargs["grid"]
    assert isinstance(grid[0], fx.Node), "the number of rows is symbolic"
    assert launch.kwargs["kwargs"]["BLOCK"] == 64
    (result,) = gm.graph.output_node().all_input_nodes
    assert result.meta["val"].shape == given.shape


def test_every_launch_is_in_the_graph_and_in_order(cache: KernelCache) -> None:
    mode = FakeTensorMode()
    given = mode.from_tensor(torch.randn(64))
    gm = kernel_graph(kernels.accumulate(), given, 0.5, cache=cache)
    first, second = _launches(gm.graph)
    assert first.kwargs["tensors_to_clone"] == ["x_ptr"]
    assert sorted(second.kwargs["tensors_to_clone"]) == ["square_ptr", "total_ptr"]


def test_fake_results_come_from_the_file(cache: KernelCache) -> None:
    op = as_op(kernels.softmax("bfloat16"), cache=cache)
    with FakeTensorMode():
        result = op(torch.empty(5, 90, dtype=torch.bfloat16)[:, :40])
    assert (tuple(result.shape), result.stride(), result.dtype) == ((5, 40), (40, 1), torch.bfloat16)


def test_another_fake_can_be_given(cache: KernelCache) -> None:
    op = as_op(kernels.softmax("float16"), lambda x: x.new_empty(2, 2), cache=cache)
    with FakeTensorMode():
        assert op(torch.empty(5, 90, dtype=torch.float16)).shape == (2, 2)


def test_equal_files_are_one_op_and_others_are_not(cache: KernelCache) -> None:
    assert as_op(kernels.add(), cache=cache) is as_op(kernels.add(), cache=cache)
    assert as_op(kernels.add(), cache=cache) is not as_op(kernels.add("float32"), cache=cache)
