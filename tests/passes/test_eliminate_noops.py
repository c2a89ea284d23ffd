"""eliminate-noops: what computes nothing goes, what only looks like it stays."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch.nn.functional import dropout

from fxopt.report.record import collect
from support.golden import assert_golden
from support.rewriting import rewriting

NAME = "eliminate-noops"
F = Callable[[torch.Tensor], Any]

FIRES: dict[str, F] = {
    "to_same_dtype": lambda x: x.sin().to(torch.float32).cos(),
    "to_same_device": lambda x: x.sin().to("cpu").cos(),
    "type_as": lambda x: x.sin().type(torch.float32).cos(),
    "dropout_eval": lambda x: dropout(x.sin(), 0.5, False).cos(),
    "dropout_p0": lambda x: dropout(x.sin(), 0.0, True).cos(),
    "expand_same": lambda x: x.sin().expand(4, 6).cos(),
    "reshape_same": lambda x: x.sin().reshape(4, 6).cos(),
    "view_same": lambda x: x.sin().view(4, -1).cos(),
    "slice_all": lambda x: x.sin()[:, :].cos(),
    "transpose_same": lambda x: x.sin().transpose(1, 1).cos(),
    "mul_one": lambda x: (x.sin() * 1).cos(),
    "mul_one_float": lambda x: (1.0 * x.sin()).cos(),
    "div_one": lambda x: (x.sin() / 1.0).cos(),
    "integer_add_zero": lambda x: (torch.arange(6) + 0) * x,
    "integer_sub_zero": lambda x: (torch.arange(6) - 0) * x,
    "and_true": lambda x: ((x > 0) & torch.ones((), dtype=torch.bool)).float() * x,
    "clone": lambda x: x.sin().clone().cos(),
}


def same(a: Any, b: Any) -> bool:
    left, right = (value if isinstance(value, tuple) else (value,) for value in (a, b))
    return all(torch.equal(u, v) and u.stride() == v.stride() for u, v in zip(left, right, strict=True))


@pytest.mark.parametrize("case", FIRES)
def test_fires(case: str) -> None:
    found = rewriting(FIRES[case], (NAME,))
    x = torch.randn(4, 6)
    assert same(found.call(x), FIRES[case](x))
    assert found.applied() >= 1, found.before[0]


def test_fires_on_symbolic_sizes_without_guards() -> None:
    def f(x: torch.Tensor) -> torch.Tensor:
        return x.sin().expand(x.shape[0], x.shape[1]).reshape(x.shape).cos()

    found = rewriting(f, (NAME,), dynamic=True)
    for rows in (4, 7, 9):
        x = torch.randn(rows, rows + 1)
        assert same(found.call(x), f(x))
    assert found.graphs == 1
    assert found.applied() >= 1


def test_fires_golden() -> None:
    def f(x: torch.Tensor) -> torch.Tensor:
        y = (x.sin().contiguous() * 1.0).to(torch.float32)
        return dropout(y, 0.1, False).view(4, 6).cos() + 0

    found = rewriting(f, (NAME,))
    x = torch.randn(4, 6)
    assert same(found.call(x), f(x))
    assert_golden(found.before[0], "eliminate_noops", "chain_before")
    assert_golden(found.after[0], "eliminate_noops", "chain_after")


def promoted(x: torch.Tensor) -> torch.Tensor:
    return torch.arange(6) * 1.0 + x


def negative_zero(x: torch.Tensor) -> torch.Tensor:
    return 1.0 / (x * 0.0 + 0)


def broadcast(x: torch.Tensor) -> torch.Tensor:
    return x[:1].expand(4, 6) + x


def dense_copy(x: torch.Tensor) -> torch.Tensor:
    return x.t()[::2].contiguous().view(-1) * 2


def training_dropout(x: torch.Tensor) -> torch.Tensor:
    return dropout(x.sin(), 0.5, True) * 0


def narrower(x: torch.Tensor) -> torch.Tensor:
    return x.sin().to(torch.bfloat16).to(torch.float32)


def all_but_first(x: torch.Tensor) -> torch.Tensor:
    return x.sin()[1:].cos()


@pytest.mark.parametrize(
    "f", [promoted, negative_zero, broadcast, dense_copy, training_dropout, narrower, all_but_first]
)
def test_near_miss(f: F) -> None:
    found = rewriting(f, (NAME,))
    x = -torch.rand(4, 6)
    assert same(found.call(x), f(x))
    assert found.applied() == 0, found.reasons()


def copy_then_write(x: torch.Tensor) -> torch.Tensor:
    y = x.sin()
    kept = y * 1
    y.add_(1)
    return kept + y


def write_to_the_copy(x: torch.Tensor) -> torch.Tensor:
    y = x.sin()
    kept = y.clone()
    kept.add_(1)
    return kept * y


def copy_of_an_input_that_is_written(x: torch.Tensor) -> torch.Tensor:
    kept = x / 1
    x.add_(1)
    return kept * 2


@pytest.mark.parametrize("f", [copy_then_write, write_to_the_copy, copy_of_an_input_that_is_written])
def test_not_a_copy_that_a_write_tells_apart(f: F) -> None:
    found = rewriting(f, (NAME,))
    x = torch.randn(4, 6)
    mine, theirs = x.clone(), x.clone()
    assert same(found.call(mine), f(theirs))
    assert torch.equal(mine, theirs)
    assert "written later" in found.reasons()


def write_to_the_source_of_a_dropout(x: torch.Tensor) -> torch.Tensor:
    y = x.sin()
    same_memory = dropout(y, 0.5, False)
    y.add_(1)
    return same_memory.view(-1) * 2


def write_to_the_result_of_a_dropout(x: torch.Tensor) -> torch.Tensor:
    dropout(x, 0.5, False)[1:].add_(1)
    return x * 2


@pytest.mark.parametrize("f", [write_to_the_source_of_a_dropout, write_to_the_result_of_a_dropout])
@pytest.mark.parametrize("host", ["eager", "inductor"])
def test_dropout_that_drops_nothing_returns_its_input_as_in_eager(f: F, host: str) -> None:
    mine, theirs = torch.ones(4, 6), torch.ones(4, 6)
    with collect() as records:
        got = torch.compile(f, backend="fxopt", options={"host": host})(mine)
    assert len(records[0].applied(NAME)) == 1
    torch.testing.assert_close(got, f(theirs))
    assert torch.equal(mine, theirs)


def returned_copy(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    y = x.sin()
    return y * 1, y


def view_of_a_returned_copy(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    y = x.sin()
    return (y * 1).view(-1)[2:], y


@pytest.mark.parametrize("f", [returned_copy, view_of_a_returned_copy])
def test_not_a_copy_that_leaves_the_graph(f: F) -> None:
    found = rewriting(f, (NAME,))
    x = torch.randn(4, 6)
    first, second = found.call(x)
    first.zero_()
    assert torch.equal(second, x.sin())
    assert "output" in found.reasons()


def _gradient(f: Callable[[torch.Tensor], torch.Tensor]) -> torch.Tensor:
    x = torch.ones(3, requires_grad=True)
    (gradient,) = torch.autograd.grad(f(x).sum(), x)
    return gradient


def test_not_what_no_grad_cuts_off() -> None:
    def f(x: torch.Tensor) -> torch.Tensor:
        y = x.sin()
        with torch.no_grad():
            cut = y * 1
        return y * cut

    found = rewriting(f, (NAME,))
    assert torch.equal(_gradient(found.call), _gradient(f))
    assert "no_grad" in found.reasons()


def test_not_the_copy_that_makes_a_value_of_inference_mode_one_for_autograd() -> None:
    def f(x: torch.Tensor) -> torch.Tensor:
        with torch.inference_mode():
            scale = x.abs() + 1
        return x.sin() / scale.clone()

    found = rewriting(f, (NAME,))
    assert torch.equal(_gradient(found.call), _gradient(f))
    assert "autograd" in found.reasons()
