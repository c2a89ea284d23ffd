"""Tensors made of literals inside the compiled function."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import fx

from fxopt.frontend import constants
from fxopt.report.record import collect
from support.frontend import watch_lowered


def _grow(x: torch.Tensor) -> torch.Tensor:
    """As a growing cache begins: an empty tensor, then the first entries."""
    return torch.cat([torch.tensor([], dtype=x.dtype), x], 0) * torch.tensor([2.0, 3.0])


def _graph_given_to_the_host(monkeypatch: pytest.MonkeyPatch, function: Any, *inputs: Any) -> fx.GraphModule:
    seen = watch_lowered(monkeypatch)
    options = {"host": "eager", "strict": True}
    result = torch.compile(function, backend="fxopt", options=options)(*inputs)
    torch.testing.assert_close(result, function(*inputs))
    return seen[0]


def test_small_literals_are_calls(monkeypatch: pytest.MonkeyPatch) -> None:
    gm = _graph_given_to_the_host(monkeypatch, _grow, torch.randn(3, 2))
    assert not gm.graph.find_nodes(op="get_attr")
    assert not list(gm.named_buffers())
    assert [node.args[0] for node in gm.graph.find_nodes(op="call_function", target=torch.tensor)] == [
        [2.0, 3.0]
    ]
    assert [node.args[0] for node in gm.graph.find_nodes(op="call_function", target=torch.empty)] == [(0,)]


def test_a_long_literal_stays_an_attribute_with_a_source(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(constants, "LARGEST", 1)
    gm = _graph_given_to_the_host(monkeypatch, _grow, torch.randn(3, 2))
    (node,) = gm.graph.find_nodes(op="get_attr")
    assert str(node.target) in gm._param_name_to_source


@pytest.mark.parametrize("largest", [1, 64])
def test_inductor_takes_the_graph(monkeypatch: pytest.MonkeyPatch, largest: int) -> None:
    monkeypatch.setattr(constants, "LARGEST", largest)
    x = torch.randn(3, 2)
    with collect() as records:
        result = torch.compile(_grow, backend="fxopt", options={"host": "inductor"})(x)
    assert [record.failures for record in records] == [[]]
    torch.testing.assert_close(result, _grow(x))


def test_a_literal_is_new_at_every_call() -> None:
    def write(x: torch.Tensor) -> torch.Tensor:
        y = torch.tensor([1.0, 1.0])
        y += x
        return y

    compiled = torch.compile(write, backend="fxopt", options={"host": "eager"})
    first = compiled(torch.ones(2))
    second = compiled(torch.ones(2))
    assert first.tolist() == second.tolist() == [2.0, 2.0]
