"""Every node keeps the user's line and module path, through normalization, passes and lowering."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import fx, nn

from fxopt.ir.facts import location
from fxopt.report.record import collect
from support.frontend import calls, capture, watch_lowered

B, H, S, D = 1, 2, 96, 8  # long enough for one kernel to be chosen for attention


class Attention(nn.Module):
    def forward(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        scores = q @ k.transpose(-1, -2)
        weights = torch.softmax(scores * 0.125, dim=-1)
        return weights @ v


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.project = nn.Linear(D, D)
        self.attention = Attention()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.project(x)
        return y + self.attention(y, y, y)


def line_of(function: Callable[..., Any], text: str) -> str:
    """``file:line`` of the only line of `function` that contains `text`."""
    source, first = inspect.getsourcelines(function)
    (offset,) = [number for number, line in enumerate(source) if text in line]
    return f"{__file__}:{first + offset}"


def node_of(gm: fx.GraphModule, target: str) -> fx.Node:
    (found,) = [node for node in calls(gm) if str(node.target) == target]
    return found


def test_normalized_nodes_have_the_users_line_and_module() -> None:
    gm = capture(Block(), torch.randn(B, H, S, D)).graph
    assert all(location(node).startswith(f"{__file__}:") for node in calls(gm))

    softmax = node_of(gm, "aten.softmax.int")
    assert location(softmax) == line_of(Attention.forward, "torch.softmax")
    path, kind = list(softmax.meta["nn_module_stack"].values())[-1]
    assert path.endswith("attention")
    assert kind is Attention or kind == f"{Attention.__module__}.{Attention.__qualname__}"

    add = node_of(gm, "aten.add.Tensor")
    assert location(add) == line_of(Block.forward, "return y +")


def test_one_line_with_several_ops_gives_all_of_them_that_line() -> None:
    def f(x: torch.Tensor) -> torch.Tensor:
        y = x.cos()
        return torch.softmax(y @ y.mT, -1) * 2.0

    gm = capture(f, torch.randn(4, 4)).graph
    wanted = line_of(f, "return torch.softmax")
    names = ("aten.matmul.default", "aten.softmax.int", "aten.mul.Tensor")
    assert [location(node_of(gm, name)) for name in names] == [wanted] * 3
    assert location(node_of(gm, "aten.cos.default")) != wanted


def test_composite_functions_have_the_line_that_called_them() -> None:
    def f(x: torch.Tensor) -> torch.Tensor:
        y = x + 1
        return nn.functional.cosine_similarity(y, x, dim=-1)

    gm = capture(f, torch.randn(4, 4)).graph
    wanted = line_of(f, "return nn.functional")
    assert {location(node) for node in calls(gm) if str(node.target) != "aten.add.Tensor"} == {wanted}


def test_nodes_of_subgraphs_have_the_users_line() -> None:
    def positive(x: torch.Tensor) -> torch.Tensor:
        return x.sin() * 2.0

    def negative(x: torch.Tensor) -> torch.Tensor:
        return x.cos() * 3.0

    def f(x: torch.Tensor) -> torch.Tensor:
        return torch.cond(x.sum() > 0, positive, negative, (x,))

    gm = capture(f, torch.randn(3)).graph
    assert location(node_of(gm, "aten.sin.default")) == line_of(positive, "x.sin()")
    assert location(node_of(gm, "aten.cos.default")) == line_of(negative, "x.cos()")


def test_nodes_of_vmapped_code_have_the_users_line() -> None:
    def one(row: torch.Tensor) -> torch.Tensor:
        return torch.softmax(row, -1)

    def f(x: torch.Tensor) -> torch.Tensor:
        return torch.vmap(one)(x)

    gm = capture(f, torch.randn(3, 4)).graph
    assert {location(node).split(":")[0] for node in calls(gm)} == {__file__}


def test_evidence_names_the_line_of_the_anchor() -> None:
    with collect() as records:
        torch.compile(Block(), backend="fxopt", options={"host": "eager"})(torch.randn(B, H, S, D))
    (applied,) = records[0].applied("rewrite-attention")
    assert applied.location == line_of(Attention.forward, "torch.softmax")


def test_what_the_host_gets_has_the_users_line(monkeypatch: pytest.MonkeyPatch) -> None:
    lowered = watch_lowered(monkeypatch)
    with collect() as records, torch.no_grad():
        torch.compile(Block(), backend="fxopt", options={"host": "eager"})(torch.randn(B, H, S, D))
    assert records[0].applied("rewrite-attention")
    assert {location(node).split(":")[0] for node in calls(lowered[0])} == {__file__}
    attention = node_of(lowered[0], "aten.scaled_dot_product_attention.default")
    assert location(attention) == line_of(Attention.forward, "torch.softmax")
    assert list(attention.meta["nn_module_stack"].values())[-1][0].endswith("attention")
