"""Facts of whole graphs: what shares memory, what is written when, who needs grad, which mode is on."""

from __future__ import annotations

import operator
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import fx, nn
from torch.utils.checkpoint import checkpoint

from fxopt.ir.facts import (
    argument,
    is_last_dim,
    is_number,
    is_opaque,
    is_scalar,
    is_widening,
    is_write,
    location,
    peel_casts,
    peel_widening,
    same_shape,
    same_strides,
)
from fxopt.ir.graph_facts import Facts
from support.frontend import capture

aten = torch.ops.aten


@torch.library.custom_op("fxopt_tests::bump_", mutates_args=("x",))
def bump_(x: torch.Tensor, y: torch.Tensor) -> None:
    x.add_(y)


def graph_of(
    function: Callable[..., Any], *inputs: Any, **how: Any
) -> tuple[Facts, Callable[[str], fx.Node]]:
    """The facts of a function's graph, and its nodes by name."""
    graph = capture(function, *inputs, **how).graph.graph
    nodes = {node.name: node for node in graph.nodes}
    return Facts(graph), nodes.__getitem__


def ones(*shape: int, **how: Any) -> torch.Tensor:
    return torch.ones(*shape, **how)


VIEWS: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "view": lambda x: x.view(-1),
    "transpose": lambda x: x.transpose(0, 1),
    "slice": lambda x: x[1:],
    "select": lambda x: x[0],
    "expand": lambda x: x[:, None].expand(4, 2, 4),
    "reshape": lambda x: x.reshape(2, 8),
    "detach": lambda x: x.detach(),
    "to": lambda x: x.to(torch.float32),
    "contiguous": lambda x: x.contiguous(),
    "unbind": lambda x: x.unbind(0)[1],
    "chunk": lambda x: x.chunk(2, -1)[1],
    "dropout in eval": lambda x: nn.functional.dropout(x, 0.5, False),
    "view of a view": lambda x: x.t()[1:].unsqueeze(0),
}
COPIES: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "clone": lambda x: x.clone(),
    "sum": lambda x: x + 0.0,
    "to another dtype": lambda x: x.to(torch.float64),
    "contiguous of a transposed": lambda x: x.t().contiguous(),
    "reshape of a transposed": lambda x: x.t().reshape(-1),
    "index": lambda x: x[torch.tensor([0, 1])],
    "dropout in training": lambda x: nn.functional.dropout(x, 0.5, True),
}


@pytest.mark.parametrize("name", [*VIEWS, *COPIES])
def test_views_share_a_class_and_copies_do_not(name: str) -> None:
    function = {**VIEWS, **COPIES}[name]
    facts, node = graph_of(lambda x: (function(x.sin()).cos(), x), ones(4, 4))
    (read,) = node("cos").all_input_nodes
    assert (facts.alias_class(read) == facts.alias_class(node("sin"))) is (name in VIEWS)
    assert facts.alias_class(node("sin")) != facts.alias_class(node("l_x_"))


def test_results_of_writes_share_a_class_with_what_they_write() -> None:
    facts, node = graph_of(lambda x, y: torch.add(x.mul_(2.0), 1.0, out=y), ones(3), ones(3))
    assert facts.alias_class(node("mul_")) == facts.alias_class(node("l_x_"))
    assert facts.alias_class(node("add")) == facts.alias_class(node("l_y_"))
    assert facts.alias_class(node("l_x_")) != facts.alias_class(node("l_y_"))


def test_inputs_that_share_memory_outside_share_a_class() -> None:
    base = ones(6)
    facts, node = graph_of(lambda x, y, z: x.mul_(2.0) + y + z, base[:3], base[3:], ones(3))
    assert facts.alias_class(node("l_x_")) == facts.alias_class(node("l_y_"))
    assert facts.alias_class(node("l_x_")) != facts.alias_class(node("l_z_"))


def test_what_is_no_tensor_has_no_class() -> None:
    facts, node = graph_of(lambda x: x.view(x.shape[0] * 2), ones(4, 2), dynamic=True)
    symbols = [n for n in facts.graph.nodes if isinstance(n.meta.get("val"), torch.SymInt)]
    assert symbols
    assert {facts.alias_class(symbol) for symbol in symbols} == {None}


def written(x: torch.Tensor) -> torch.Tensor:
    a = x.sin()
    part = a[1:]
    b = a.cos()
    part.mul_(2.0)
    c = a.exp()
    return b + c


def test_writes_are_seen_through_views_and_only_between() -> None:
    facts, node = graph_of(written, ones(4))
    a, b, write, c = (node(name) for name in ("sin", "cos", "mul_", "exp"))
    assert facts.written_between(a, b, c) is write
    assert facts.written_between(node("slice_1"), a, c) is write
    assert facts.written_between(a, a, b) is None
    assert facts.written_between(a, write, c) is None
    assert facts.written_between(node("l_x_"), a, c) is None
    assert facts.written_after(a, b) is write
    assert facts.written_after(a, write) is None


def test_reasons_name_the_value_the_writer_and_its_line() -> None:
    facts, node = graph_of(written, ones(4))
    line = written.__code__.co_firstlineno + 4
    assert facts.unsafe_read([node("l_x_"), node("sin")], node("cos"), node("exp")) == (
        f"sin is written by mul_ ({__file__}:{line}) in between"
    )
    assert facts.unsafe_read([node("l_x_"), node("cos")], node("cos"), node("exp")) is None


def in_checkpoint(x: torch.Tensor, writes: bool) -> torch.Tensor:
    def body(y: torch.Tensor) -> torch.Tensor:
        if writes:
            bump_(y, y)
        return y * 2.0

    a = x.sin()
    b = a.cos()
    return b + checkpoint(body, a, use_reentrant=False) + a.exp()


@pytest.mark.parametrize("writes", [False, True])
def test_called_code_writes_if_it_holds_a_write(writes: bool) -> None:
    facts, node = graph_of(lambda x: in_checkpoint(x, writes), ones(4, requires_grad=not writes))
    found = facts.written_between(node("sin"), node("cos"), node("exp"))
    assert (found is not None) is writes
    assert found is None or "checkpoint" in str(found.target)


def test_custom_ops_write_what_their_schema_says() -> None:
    def f(x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        a = x.sin()
        bump_(x, y)
        return a + y

    facts, node = graph_of(f, ones(3), ones(3))
    write = next(n for n in facts.graph.nodes if is_write(n))
    assert facts.written_after(node("l_x_"), node("sin")) is write
    assert facts.written_after(node("l_y_"), node("sin")) is None


def test_writes_to_lists_of_tensors() -> None:
    facts, node = graph_of(lambda x, y: torch._foreach_add_([x, y], 1.0), ones(3), ones(3))
    (write,) = [n for n in facts.graph.nodes if is_write(n)]
    for name in ("l_x_", "l_y_"):
        assert facts.written_after(node(name), node("l_y_")) is write


def test_what_leaves_the_graph() -> None:
    facts, node = graph_of(lambda x: (x.sin()[1:], x.cos() * 2.0), ones(4))
    assert facts.leaves_graph(node("sin"))
    assert not facts.leaves_graph(node("cos"))
    assert not facts.leaves_graph(node("l_x_"))


@pytest.mark.parametrize(
    ("x_grad", "enabled", "inside", "wanted"),
    [
        (True, True, True, True),
        (False, True, True, False),
        (True, False, False, False),
        (True, False, True, True),
    ],
)
def test_needs_grad(x_grad: bool, enabled: bool, inside: bool, wanted: bool) -> None:
    """An input needs it and grad mode is on somewhere, around the graph or inside of it."""

    def f(x: torch.Tensor) -> torch.Tensor:
        with torch.set_grad_enabled(inside):
            return x.sin() * 2.0

    x = ones(3, requires_grad=x_grad)
    with torch.set_grad_enabled(enabled):
        facts, node = graph_of(f, x)
        assert facts.needs_grad is wanted
        assert facts.differentiates(node("sin")) is wanted


def in_modes(x: torch.Tensor) -> torch.Tensor:
    a = x.sin()
    with torch.no_grad(), torch.autocast("cpu", dtype=torch.bfloat16):
        b = x.cos()
        with torch.enable_grad(), torch.autocast("cpu", enabled=False):
            c = x.exp()
    with torch.inference_mode():
        d = x.tanh()
    return a + b + c + d.clone() + x.relu()


def test_modes() -> None:
    facts, node = graph_of(in_modes, ones(3, requires_grad=True))
    names = ("sin", "cos", "exp", "tanh", "relu")
    assert [facts.mode_at(node(name))[0] for name in names] == [True, False, True, False, True]
    assert [facts.in_autocast(node(name)) for name in names] == [False, True, False, False, False]
    assert [facts.in_inference_mode(node(name)) for name in names] == [False, False, False, True, False]
    assert facts.mode_at(node("sin")) == facts.mode_at(node("relu"))
    assert len(facts.mode_at(node("exp"))[1]) == 2


def test_autocast_of_another_device_does_not_end_a_region() -> None:
    def f(x: torch.Tensor) -> torch.Tensor:
        with torch.autocast("cpu", dtype=torch.bfloat16), torch.autocast("xpu", enabled=False):
            return x.sin() * 2.0

    facts, node = graph_of(f, ones(3))
    assert facts.in_autocast(node("sin"))


def test_grad_modes_are_no_modes_where_nothing_needs_grad() -> None:
    facts, node = graph_of(in_modes, ones(3))
    assert facts.mode_at(node("sin")) == facts.mode_at(node("tanh"))
    assert facts.mode_at(node("sin")) != facts.mode_at(node("cos"))  # autocast is one all the same


def test_opaque_calls() -> None:
    graph = fx.Graph()
    x = graph.placeholder("x")
    method, module = graph.call_method("sin", (x,)), graph.call_module("m", (x,))
    function = graph.call_function(test_opaque_calls, (x,))
    plain = graph.call_function(aten.sin.default, (x,))
    item = graph.call_function(operator.getitem, (x, 0))
    assert [is_opaque(node) for node in (method, module, function, plain, item, x)] == [
        True,
        True,
        True,
        False,
        False,
        False,
    ]


def test_arguments_by_name() -> None:
    graph = fx.Graph()
    x = graph.placeholder("x")
    node = graph.call_function(aten.mean.dim, (x, [-1]), {"dtype": torch.float64})
    assert argument(node, "dim") == [-1]
    assert argument(node, "keepdim") is False
    assert argument(node, "dtype") is torch.float64
    assert argument(node, "no such name", 7) == 7


def test_casts_are_peeled_as_far_as_they_may() -> None:
    def f(x: torch.Tensor) -> torch.Tensor:
        return x.sin().to(torch.bfloat16).to(torch.float32).to(torch.float64).cos()

    _, node = graph_of(f, ones(3))
    (last,) = node("cos").all_input_nodes
    assert peel_casts(last) is node("sin")
    narrow = peel_widening(last)
    assert narrow.meta["val"].dtype is torch.bfloat16
    assert not is_widening(narrow)


@pytest.mark.parametrize(
    ("value", "wanted", "answer"),
    [
        (1, None, True),
        (1.0, 1, True),
        (2.0, 1, False),
        (True, None, False),
        (1j, None, False),
        ("1", None, False),
    ],
)
def test_numbers(value: Any, wanted: float | None, answer: bool) -> None:
    assert is_number(value, wanted) is answer
    if wanted is None:
        assert is_scalar(value) is answer


def test_numbers_that_are_symbols_are_scalars() -> None:
    facts, node = graph_of(lambda x, s: x * s, ones(3), 2.5, dynamic=True)
    scale = next(n for n in facts.graph.nodes if str(n.target) == "aten.mul.Tensor").args[1]
    assert is_scalar(scale)
    assert not is_number(scale)


def test_shapes_of_symbols_add_no_guard() -> None:
    facts, node = graph_of(lambda x, y: (x.sin(), y.sin(), x * 2.0), ones(3, 4), ones(5, 4), dynamic=True)
    a, b, c = (node(name).meta["val"] for name in ("sin", "sin_1", "mul"))
    guards = len(a.shape[0].node.shape_env.guards)
    assert same_shape(a.shape, c.shape)
    assert not same_shape(a.shape, b.shape)
    assert not same_shape(a.shape, a.shape[:1])
    assert same_strides(a, c)
    assert len(a.shape[0].node.shape_env.guards) == guards


def test_dimensions_of_size_one_have_any_stride() -> None:
    assert same_strides(torch.empty_strided((1, 3), (7, 1)), torch.empty(1, 3))
    assert not same_strides(torch.empty_strided((2, 3), (7, 1)), torch.empty(2, 3))


def test_last_dimension() -> None:
    _, node = graph_of(lambda x, y: x.sin() * y.sin(), ones(2, 3), ones(()))
    assert [is_last_dim(node("sin"), dim) for dim in (-1, 1, 0, -2)] == [True, True, False, False]
    assert not is_last_dim(node("sin_1"), -1)


def test_location_is_the_innermost_line_of_the_user() -> None:
    _, node = graph_of(written, ones(4))
    assert location(node("sin")) == f"{__file__}:{written.__code__.co_firstlineno + 1}"
    assert location(fx.Graph().placeholder("x")) == "-"


def test_facts_follow_an_edit() -> None:
    """After an edit, `update` gives what facts made anew give."""

    def function(x: torch.Tensor) -> torch.Tensor:
        with torch.no_grad():
            y = x.view(-1) * 2
        y.add_(1)
        return y.view(2, 3) + x

    graph = capture(function, torch.ones(2, 3, requires_grad=True)).graph.graph
    facts = Facts(graph)
    product = next(node for node in graph.nodes if node.target is aten.mul.Tensor)
    with graph.inserting_before(product):
        view = graph.call_function(aten.alias.default, (product.args[0],))
        view.meta["val"] = product.args[0].meta["val"].view(-1)  # type: ignore[union-attr]
        new = graph.call_function(aten.mul_.Tensor, (view, 2))
        new.meta["val"] = view.meta["val"]
    product.replace_all_uses_with(new)
    graph.erase_node(product)
    facts.update([view, new], [], beside=product)
    anew = Facts(graph)
    for node in graph.nodes:
        assert facts.mode_at(node) == anew.mode_at(node), node
        assert set(map(str, facts.sharing(node))) == set(map(str, anew.sharing(node))), node
        for other in graph.nodes:
            assert str(facts.written_between(node, new, other)) == str(anew.written_between(node, new, other))
    assert facts.written_after(view, view) is new
