"""What must hold of a graph after every pass, and what a replacement must share with the original."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import fx

from fxopt.ir.verify import Violation, check_graph, check_replacement
from support.frontend import capture

aten = torch.ops.aten


def function(x: torch.Tensor) -> torch.Tensor:
    y = x.sin()
    y.mul_(2.0)
    return y.cos() + x.add_(1.0)


def graph() -> fx.Graph:
    return capture(function, torch.ones(2, 3)).graph.graph


def by_name(found: fx.Graph, name: str) -> fx.Node:
    return next(node for node in found.nodes if node.name == name)


def without_value(found: fx.Graph) -> None:
    del by_name(found, "cos").meta["val"]


def out_of_order(found: fx.Graph) -> None:
    by_name(found, "sin").replace_input_with(by_name(found, "l_x_"), by_name(found, "cos"))


def of_another_graph(found: fx.Graph) -> None:
    by_name(found, "cos").args = (graph().find_nodes(op="placeholder")[0],)


def test_a_normalized_graph_is_well_formed() -> None:
    check_graph(graph())


@pytest.mark.parametrize(
    ("damage", "text"),
    [
        (without_value, "cos.*has no value"),
        (out_of_order, "before it has been defined"),
        (of_another_graph, "does not belong to this Graph"),
    ],
)
def test_damage_is_found(damage: Callable[[fx.Graph], None], text: str) -> None:
    found = graph()
    damage(found)
    with pytest.raises((Violation, RuntimeError), match=text):
        check_graph(found)


def test_calls_without_readers_need_no_value() -> None:
    found = graph()
    with found.inserting_before(found.output_node()):
        found.call_function(torch._C._set_grad_enabled, (True,))
    check_graph(found)


def replaced_by(make: Callable[[torch.Tensor], object]) -> tuple[fx.Node, fx.Node]:
    found = graph()
    old = by_name(found, "cos")
    new = found.call_function(aten.sin.default, (old,))
    new.meta["val"] = make(old.meta["val"])
    return old, new


@pytest.mark.parametrize(
    "make",
    [
        lambda value: value.double(),
        lambda value: value[0],
        lambda value: value.t(),
        lambda value: value.to("meta"),
        lambda value: (value, value),
        lambda value: None,
    ],
)
def test_another_dtype_shape_device_or_kind_is_a_violation(make: Callable[[torch.Tensor], object]) -> None:
    with pytest.raises(Violation, match=r"replaced torch\.float32 \(2, 3\)"):
        check_replacement(*replaced_by(make))


@pytest.mark.parametrize("make", [lambda value: value, lambda value: value.t().contiguous().t()])
def test_other_strides_are_none(make: Callable[[torch.Tensor], object]) -> None:
    check_replacement(*replaced_by(make))
