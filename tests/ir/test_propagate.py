"""Values brought up to date after a replacement: strides, memory, and dtypes as autocast decides them."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import fx
from torch._subclasses import FakeTensor, FakeTensorMode

from fxopt.ir.graph_facts import Facts
from fxopt.ir.ops import register_ops
from fxopt.ir.ops.attention import ATTENTION
from fxopt.ir.propagate import (
    can_evaluate,
    describe,
    equivalent,
    evaluate,
    fake_mode_of,
    propagate_from,
    storage_of,
)
from support.frontend import capture

aten = torch.ops.aten


class Replaced:
    """`sin` replaced by `make(graph, its input)`, and everything that reads it brought up to date."""

    def __init__(self, function: Callable[..., Any], make: Callable[[fx.Graph, fx.Node], fx.Node]) -> None:
        graph = capture(function, torch.ones(2, 3)).graph.graph
        facts = Facts(graph)
        mode = fake_mode_of(graph)
        assert mode is not None
        self.nodes = {node.name: node for node in graph.nodes}
        self.changed: dict[fx.Node, Any] = {}
        old = self.nodes["sin"]
        with graph.inserting_before(old):
            self.new = make(graph, old.args[0])  # type: ignore[arg-type]
        self.new.meta["val"] = evaluate(self.new, mode)
        old.replace_all_uses_with(self.new)
        propagate_from(
            self.new, old.meta["val"], mode, self.changed.setdefault, lambda node: facts.mode_at(node)[1]
        )

    def value(self, name: str) -> Any:
        return self.nodes[name].meta["val"]


def cosine(graph: fx.Graph, x: fx.Node) -> fx.Node:
    return graph.call_function(aten.cos.default, (x,))


def strided(graph: fx.Graph, x: fx.Node) -> fx.Node:
    """Ones with the columns of a matrix side by side in memory."""
    return graph.call_function(aten.new_empty_strided.default, (x, [2, 3], [1, 2]))


def test_strides_follow_as_far_as_they_change_something() -> None:
    dense = torch.contiguous_format
    found = Replaced(lambda x: (x.sin().exp() * 2.0).clone(memory_format=dense).tanh().sum(), strided)
    assert found.value("exp").stride() == found.value("mul").stride() == (1, 2)
    assert found.value("clone").stride() == found.value("tanh").stride() == (3, 1)
    assert {node.name for node in found.changed} & {"exp", "mul", "tanh", "sum_1"} == {"exp", "mul"}


def test_nothing_changes_where_nothing_differs() -> None:
    found = Replaced(lambda x: (x.sin().exp() * 2.0).sum(), cosine)
    assert found.changed == {}


def test_old_values_are_told_before_they_are_replaced() -> None:
    found = Replaced(lambda x: x.sin().exp(), strided)
    assert {node.name: value.stride() for node, value in found.changed.items()} == {"exp": (3, 1)}


def test_views_and_writes_move_to_the_new_memory() -> None:
    def function(x: torch.Tensor) -> torch.Tensor:
        y = x.sin()
        y[0].mul_(2.0)
        return y.view(-1) + 1.0

    found = Replaced(function, cosine)
    memory = storage_of(found.new.meta["val"])
    assert {storage_of(found.value(name)) for name in ("select", "mul_", "view")} == {memory}
    assert storage_of(found.value("add")) != memory


def test_dtypes_are_what_autocast_makes_of_them() -> None:
    def function(x: torch.Tensor) -> torch.Tensor:
        y = x.sin()
        with torch.autocast("cpu", dtype=torch.bfloat16):
            inside = y.t() @ y
            with torch.autocast("cpu", enabled=False):
                disabled = y.t() @ y
        return inside + disabled + y.t() @ y

    found = Replaced(function, strided)
    dtypes = [found.value(name).dtype for name in ("matmul", "matmul_1", "matmul_2")]
    assert dtypes == [torch.bfloat16, torch.float32, torch.float32]
    assert not torch.is_autocast_enabled("cpu")


def test_a_reader_that_cannot_take_the_strides_raises() -> None:
    with pytest.raises((RuntimeError, ValueError), match="view"):
        Replaced(lambda x: x.sin().view(-1), strided)


def test_writes_and_higher_order_ops_are_not_repeated() -> None:
    gm = capture(
        lambda x: torch.cond(x.sum() > 0, torch.sin, torch.cos, (x.add_(1.0) * 1.0,)), torch.ones(2)
    ).graph
    answers = {node.name: can_evaluate(node) for node in gm.graph.nodes}
    assert answers["mul"]
    assert not answers["add_"]
    assert not answers["cond"]
    assert not answers["l_x_"]


def test_a_graph_without_tensors_has_no_fake_mode() -> None:
    graph = fx.Graph()
    graph.output(graph.placeholder("x"))
    assert fake_mode_of(graph) is None


@pytest.mark.parametrize(
    ("other", "wanted"),
    [
        (torch.ones(2, 3), True),
        (torch.ones(3, 2).t(), False),
        (torch.ones(2, 3).double(), False),
        (torch.ones(6), False),
        (torch.ones(2, 3, device="meta"), False),
        (3, False),
    ],
)
def test_equivalent(other: Any, wanted: bool) -> None:
    assert equivalent(torch.ones(2, 3), other) is wanted


def test_descriptions() -> None:
    assert describe(torch.ones(2, 3).t()) == "torch.float32 (3, 2) strides (1, 3) on cpu"
    assert describe(3) == "int"


def test_a_semantic_op_is_evaluated_once_for_each_form_of_its_arguments() -> None:
    """Results have memory of their own, and what is kept does not keep the fake mode."""
    register_ops()
    mode = FakeTensorMode()
    graph = fx.Graph()
    with mode:
        values = [torch.empty(2, 3, 5, 8) for _ in range(3)]
    operands = []
    for name, value in zip("qkv", values, strict=True):
        operands.append(graph.placeholder(name))
        operands[-1].meta["val"] = value
    calls = [graph.call_function(ATTENTION.overload, tuple(operands)) for _ in range(2)]
    first, second = (evaluate(call, mode) for call in calls)
    assert equivalent(first, second) and isinstance(second, FakeTensor)
    assert storage_of(first) != storage_of(second)
    operands[0].meta["val"] = values[0].new_empty(2, 3, 7, 8)
    assert evaluate(calls[0], mode).shape == (2, 3, 7, 8)
    kept = weakref.ref(mode)
    del mode, graph, values, value, operands, calls, first, second
    gc.collect()
    assert kept() is None
