"""simplify-cat: one tensor joined with nothing is copied; anything else stays a concatenation."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from fxopt.measure.models import build
from fxopt.measure.shrink import Scale
from support.compiled import all_handled, compile_fxopt
from support.golden import assert_golden
from support.numerics import assert_closer
from support.rewriting import rewriting

NAME = "simplify-cat"
F = Callable[[torch.Tensor], torch.Tensor]

FIRES: dict[str, F] = {
    "empty_first": lambda x: torch.cat([x.new_empty(0), x.transpose(0, 1)], -2),
    "empty_last": lambda x: torch.cat([x.sin(), x.new_empty(0)], -1),
    "empty_of_the_same_rank": lambda x: torch.cat([x[:0], x.mT.mT, x[2:]], 0),
    "alone": lambda x: torch.cat([x.transpose(0, 1)], 1),
}


def same(a: torch.Tensor, b: torch.Tensor) -> bool:
    return torch.equal(a, b) and a.stride() == b.stride()


@pytest.mark.parametrize("case", FIRES)
def test_fires(case: str) -> None:
    found = rewriting(FIRES[case], (NAME,))
    x = torch.randn(2, 3, 4)
    assert same(found.call(x), FIRES[case](x))
    assert found.applied() == 1, found.reasons()


def test_fires_with_the_same_gradients() -> None:
    found = rewriting(FIRES["empty_first"], (NAME,))
    grads = []
    for call in (found.call, FIRES["empty_first"]):
        x = torch.linspace(-1, 2, 24).view(2, 3, 4).requires_grad_()
        (call(x) ** 2).sum().backward()
        grads.append(x.grad)
    assert torch.equal(*grads)
    assert found.applied() == 1


def test_not_with_symbolic_sizes() -> None:
    found = rewriting(FIRES["empty_first"], (NAME,), dynamic=True)
    for rows in (3, 5, 8):
        x = torch.randn(2, rows, 4)
        assert same(found.call(x), FIRES["empty_first"](x))
    assert found.applied() == 0
    assert "symbols" in found.reasons()


def test_fires_golden() -> None:
    found = rewriting(FIRES["empty_first"], (NAME,))
    found.call(torch.randn(2, 3, 4))
    assert_golden(found.before[0] + "->\n" + found.after[0], NAME.replace("-", "_"), "empty_first")


def test_the_result_is_a_copy() -> None:
    def f(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        copied = torch.cat([x.new_empty(0), x], 0)
        x.add_(1)
        return copied, copied.mul(2)

    found = rewriting(f, (NAME,))
    x, y = torch.zeros(2, 3), torch.zeros(2, 3)
    assert torch.equal(found.call(x)[0], f(y)[0])
    assert torch.equal(x, y)


NEAR_MISSES: dict[str, Callable[..., Any]] = {
    "two": lambda x: torch.cat([x, x], 0),
    "all_empty": lambda x: torch.cat([x[:0], x[:0]], 0),
    "promoted": lambda x: torch.cat([torch.empty(0, dtype=torch.float64), x], 0),
    "channels_last": lambda x: torch.cat([x[None].to(memory_format=torch.channels_last)], 0),
}


@pytest.mark.parametrize("case", NEAR_MISSES)
def test_near_miss(case: str) -> None:
    found = rewriting(NEAR_MISSES[case], (NAME,))
    x = torch.randn(2, 3, 4)
    assert same(found.call(x), NEAR_MISSES[case](x))
    assert found.applied() == 0


def test_not_a_size_that_may_be_zero() -> None:
    f = lambda x, y: torch.cat([x, y], 0)  # noqa: E731
    found = rewriting(f, (NAME,), dynamic=True)
    for rows in (3, 0, 2):
        x, y = torch.randn(2, 3).mT.contiguous().mT, torch.randn(rows, 3)
        assert same(found.call(x, y), f(x, y))
    assert "clone" not in found.after[0]


def test_cached_keys_have_eagers_layout_on_inductor() -> None:
    subject = build("llama", Scale(layers=1))
    model = subject.model.eval()

    def cached(call: Callable[..., Any]) -> list[torch.Tensor]:
        with torch.no_grad():
            layers = call(**subject.kwargs, use_cache=True).past_key_values.layers
        return [tensor for layer in layers for tensor in (layer.keys, layer.values)]

    eager = cached(model)
    with all_handled():
        got = cached(compile_fxopt(model, host="inductor"))
    exact = [t.double() for t in cached(subject.double().model)]
    assert_closer(exact, got, eager)
    assert [t.stride() for t in got] == [t.stride() for t in eager]
