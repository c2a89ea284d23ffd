"""known_value: what depends on no input is computed, anything else is not."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import fx

from fxopt.ir.known import MOST_ELEMENTS, known_value
from fxopt.ir.same_value import same_value
from support.frontend import capture

T = torch.Tensor


def returned(f: Callable[[T], tuple[T, ...]], *, dynamic: bool = False) -> list[fx.Node]:
    """What the graph of `f` returns, without the sum with its input that keeps it in the graph."""
    graph = capture(f, torch.randn(3, 4), dynamic=dynamic).graph.graph
    (outputs,) = graph.output_node().args
    return [node.args[1] for node in outputs]  # type: ignore[union-attr]


KNOWN: dict[str, Callable[[T], T]] = {
    "slopes": lambda x: 1.0 / torch.pow(2, torch.arange(1, 5).float() * 2.0),
    "literal": lambda x: torch.sqrt(torch.tensor(16.0) * 4),
    "mask": lambda x: torch.where(torch.ones(4, 4, dtype=torch.bool).tril(), 0.0, -1e9)[:3],
}


@pytest.mark.parametrize("case", KNOWN)
def test_known(case: str) -> None:
    f = KNOWN[case]
    (node,) = returned(lambda x: (x + f(x),))
    value = known_value(node)
    assert value is not None
    assert torch.equal(value, f(torch.empty(0)))


UNKNOWN: dict[str, Callable[[T], T]] = {
    "input": lambda x: x.mean(),
    "random": lambda x: torch.rand(3, 4),
    "large": lambda x: torch.arange(MOST_ELEMENTS + 4).float()[:4],
}


@pytest.mark.parametrize("case", UNKNOWN)
def test_unknown(case: str) -> None:
    f = UNKNOWN[case]
    (node,) = returned(lambda x: (x + f(x),))
    assert known_value(node) is None


def test_unknown_when_written() -> None:
    def f(x: T) -> tuple[T, ...]:
        mask = torch.zeros(3, 4)
        mask.view(12)[2:].fill_(7.0)
        return (x + mask,)

    (node,) = returned(f)
    assert known_value(node) is None


def test_unknown_with_symbolic_sizes() -> None:
    (node,) = returned(lambda x: (x + torch.arange(x.shape[1]),), dynamic=True)
    assert known_value(node) is None


def test_the_same_calls_give_the_same_value() -> None:
    first, second, third, fourth = returned(
        lambda x: (
            x + (x.view(12) == torch.tensor(1.0)).view(3, 4),
            x + (x.view(12) == torch.tensor(1.0)).view(3, 4),
            x + (x.view(12) == torch.tensor(2.0)).view(3, 4),
            x + torch.rand(3, 4),
        )
    )
    assert same_value(first, second)
    assert not same_value(first, third)
    assert same_value(fourth, fourth)


def test_two_draws_are_not_the_same() -> None:
    first, second = returned(lambda x: (x + torch.rand(3, 4), x + torch.rand(3, 4)))
    assert not same_value(first, second)
