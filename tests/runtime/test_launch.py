"""A kernel as part of a compiled graph: what AOTAutograd and Inductor get to see of it."""

from __future__ import annotations

import operator
import re
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest
import torch
from torch import fx
from torch._dynamo.backends.common import aot_autograd
from torch._inductor.custom_graph_pass import CustomGraphPass
from torch._inductor.graph import GraphLowering
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.symbolic_shapes import ShapeEnv

from fxopt.codegen.compile import assumed_device
from fxopt.ir.target import Target
from fxopt.runtime.kernel_cache import KernelCache
from fxopt.runtime.launch import as_op, dissolve_ops, kernel_graph
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


class Generated(Exception):
    """Inductor has generated code; to run it would need a GPU."""


def _code(function: Any, *inputs: torch.Tensor, **options: Any) -> str:
    """What Inductor makes of a function."""

    def stop(code: str) -> None:
        raise Generated(code)

    with patch.object(GraphLowering, "save_output_code", stop), pytest.raises(Exception) as caught:
        torch.compile(function, fullgraph=True, dynamic=True, options=options)(*inputs)
    assert "Generated" in str(caught.value), caught.value
    return str(caught.value)


def test_inductor_launches_the_kernel_itself(cache: KernelCache) -> None:
    op = as_op(kernels.softmax(), cache=cache)
    code = _code(lambda a: op(a * 2) + 1, torch.randn(8, 40))
    _assert_native(code)


def _assert_native(code: str) -> None:
    (launch,) = re.findall(r"_softmax_kernel_0\.run\((\w+), (\w+), .*", code)
    assert launch[0] != launch[1]
    assert "torch.ops.fxopt_kernels" not in code
    # The product and the result, which takes the product's place: nothing was copied.
    assert code.count("= empty_strided") == 2


def test_a_result_without_dimensions_is_allocated_and_not_filled(cache: KernelCache) -> None:
    kernel = replace(
        kernels.accumulate(), mutates=(), launches=kernels.accumulate().launches[1:], name="two_sums"
    )
    op = as_op(kernel, cache=cache)
    code = _code(lambda a: [one + a for one in op(a * 2, 0.5)], torch.randn(64))
    assert len(re.findall(r"_kernel\w*\.run\(", code)) == 1
    assert "empty_strided_cpu((1, ), (1, )" in code


def test_ops_behind_autograd_dissolve(cache: KernelCache) -> None:
    op = as_op(kernels.softmax(), cache=cache)

    class Emit(CustomGraphPass):
        def __call__(self, graph: fx.Graph) -> None:
            (root,) = graph.find_nodes(op="call_function", target=torch.ops.aten.add.Tensor)
            old = root.args[0]
            with graph.inserting_before(root):
                call = graph.call_function(op, (old.args[0],))
            call.meta["val"] = old.meta["val"]
            old.replace_all_uses_with(call)
            graph.erase_node(old)
            assert dissolve_ops(graph) == 1
            graph.lint()

        def uuid(self) -> None:
            return None

    code = _code(lambda a: torch.sigmoid(a * 2) + 1, torch.randn(8, 40), post_grad_custom_pre_pass=Emit())
    _assert_native(code)


def test_several_results_dissolve_each(cache: KernelCache) -> None:
    kernel = replace(
        kernels.accumulate(), mutates=(), launches=kernels.accumulate().launches[1:], name="two_totals"
    )
    op = as_op(kernel, cache=cache)
    mode = FakeTensorMode()
    graph = fx.Graph()
    x = graph.placeholder("x")
    x.meta["val"] = mode.from_tensor(torch.randn(64))
    call = graph.call_function(op, (x, 0.5))
    second = graph.call_function(operator.getitem, (call, 1))
    graph.output((second,))
    assert dissolve_ops(graph) == 1
    graph.lint()
    (launch,) = _launches(graph)
    (result,) = graph.output_node().all_input_nodes
    while result.target is torch.ops.aten.view.default:  # from the one element that is allocated
        result = result.args[0]
    assert result.args == (launch, "square_ptr")


def test_ops_that_write_to_their_inputs_stay(cache: KernelCache) -> None:
    op = as_op(kernels.accumulate(), cache=cache)
    graph = fx.Graph()
    call = graph.call_function(op, (graph.placeholder("x"), 0.5))
    graph.output(call)
    assert dissolve_ops(graph) == 0
    assert call.target is op


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
