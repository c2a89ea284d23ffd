"""functionalize-writes: a write that nobody sees goes, one that somebody may see stays."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from fxopt.passes.functionalize_writes import CAST_BY_AUTOCAST, PURE
from support.golden import assert_golden
from support.numerics import assert_closer
from support.rewriting import rewriting
from support.trees import leaves

NAME = "functionalize-writes"
F = Callable[..., Any]


def same(a: Any, b: Any) -> bool:
    pairs = zip(leaves(a), leaves(b), strict=True)
    return all(torch.equal(u, v) and u.stride() == v.stride() for (_, u), (_, v) in pairs)


def statement(x: torch.Tensor) -> torch.Tensor:
    y = x.sin()
    y.add_(1.0)
    return y * y


def chain(x: torch.Tensor) -> torch.Tensor:
    y = x.sin()
    y += x
    y *= 0.5
    y /= 3
    return y.masked_fill_(x > 0, -1e4).tanh_() - 1


def through_a_view(x: torch.Tensor) -> torch.Tensor:
    y = x.sin().view(-1)
    y += 1
    return y.view_as(x).cos()


def narrow(x: torch.Tensor) -> torch.Tensor:
    """The sum is computed in float32 and rounded once."""
    y = x.bfloat16()
    y += torch.linspace(0, 1, 6)
    return y.float()


def later_result(x: torch.Tensor) -> torch.Tensor:
    y = x.sin()
    y += 1
    z = y.view(-1)
    z *= 2
    return z + 1


def integers(x: torch.Tensor) -> torch.Tensor:
    mask = x > 0
    mask &= x < 1
    count = mask.long()
    count += 3
    return x * count


def of_a_copy(x: torch.Tensor) -> torch.Tensor:
    return x.clone().mul_(2).cos()


FIRES: dict[str, tuple[F, int]] = {
    f.__name__: (f, count)
    for f, count in ((statement, 1), (chain, 5), (through_a_view, 1), (narrow, 1), (later_result, 2),
                     (integers, 2), (of_a_copy, 1))
}  # fmt: skip


@pytest.mark.parametrize("name", FIRES)
def test_fires(name: str) -> None:
    f, count = FIRES[name]
    found = rewriting(f, (NAME,))
    x = torch.randn(4, 6)
    assert same(found.call(x), f(x))
    assert found.applied() == count, found.reasons()
    assert "_(" not in found.after[0].replace("_to_copy(", "").replace("__and__", ""), found.after[0]


@pytest.mark.parametrize("name", ["statement", "chain", "through_a_view", "later_result"])
def test_fires_with_the_same_gradients(name: str) -> None:
    f = FIRES[name][0]
    found = rewriting(f, (NAME,))
    grads = []
    for call in (found.call, f):
        x = torch.linspace(-1, 2, 24).view(4, 6).requires_grad_()
        call(x).pow(2).sum().backward()
        grads.append(x.grad)
    assert same(*grads)
    assert found.applied() == FIRES[name][1]


def test_fires_with_dynamic_shapes() -> None:
    found = rewriting(through_a_view, (NAME,), dynamic=True)
    for rows in (3, 5, 8):
        x = torch.randn(rows, rows + 1)
        assert same(found.call(x), through_a_view(x))
    assert found.graphs == 1
    assert found.applied() == 1


def test_fires_in_attention_and_uncovers_it() -> None:
    def attention(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, slopes: torch.Tensor) -> torch.Tensor:
        scores = q @ k.mT
        scores /= 8**0.5
        scores += slopes.view(3, 1, 1) * torch.arange(7)
        return torch.softmax(scores, -1) @ v

    found = rewriting(attention, (NAME, "rewrite-attention"))
    q, k, v = (torch.randn(2, 3, 7, 8) for _ in range(3))
    slopes = torch.nn.Parameter(torch.rand(3))
    exact = attention(q.double(), k.double(), v.double(), slopes.double())
    assert_closer(exact, found.call(q, k, v, slopes), attention(q, k, v, slopes))
    assert found.applied(NAME) == 2, found.reasons()


def test_fires_golden() -> None:
    found = rewriting(chain, (NAME,))
    found.call(torch.randn(4, 6))
    assert_golden(found.before[0] + "->\n" + found.after[0], NAME.replace("-", "_"), "chain")


def input_itself(x: torch.Tensor) -> torch.Tensor:
    return x.add_(1).cos()


def view_of_an_input(x: torch.Tensor) -> torch.Tensor:
    return x[0].mul_(2).cos()


def base_is_read(x: torch.Tensor) -> Any:
    y = x.sin()
    y[0].mul_(2)
    return y.cos()


def earlier_view_is_read(x: torch.Tensor) -> Any:
    y = x.sin()
    z = y.view(-1)
    y.add_(1)
    return z.cos()


def earlier_view_leaves(x: torch.Tensor) -> Any:
    y = x.sin()
    z = y.view(-1)
    y.add_(1)
    return z, y.cos()


def dropout_that_drops_nothing(x: torch.Tensor) -> Any:
    y = x.sin()
    z = torch.nn.functional.dropout(y, 0.5, False)
    z += 1
    return y.cos()


def part_of_a_split(x: torch.Tensor) -> Any:
    y, z = x.sin().split(3, -1)
    y += 1
    return y.cos() + z


def written_later_through_the_base(x: torch.Tensor) -> Any:
    y = x.sin()
    z = y[1:]
    z += 1
    y[0] = 3.0
    return z + y[1:]


def laid_out_otherwise(x: torch.Tensor) -> Any:
    """The result of an op is dense, what is written here is every other column."""
    y = torch.zeros(4, 12)[:, ::2]
    y += x
    return torch.as_strided(y, (4,), (12,)).cos()


NEAR_MISSES: dict[F, str] = {
    laid_out_otherwise: "layout",
    part_of_a_split: "reads what was written",
    written_later_through_the_base: "reads what was written",
    input_itself: "an input of it",
    view_of_an_input: "an input of it",
    base_is_read: "reads what was written",
    earlier_view_is_read: "reads what was written",
    earlier_view_leaves: "reads what was written",
    dropout_that_drops_nothing: "reads what was written",
}


@pytest.mark.parametrize("f", NEAR_MISSES, ids=lambda f: f.__name__)
def test_near_miss(f: F) -> None:
    found = rewriting(f, (NAME,))
    x, y = (torch.linspace(-1, 2, 24).view(4, 6) for _ in range(2))
    assert same(found.call(x), f(y))
    assert torch.equal(x, y), "what is written to an input is part of the answer"
    assert found.applied() == 0
    assert NEAR_MISSES[f] in found.reasons()


def test_not_across_grad_modes() -> None:
    """Written under no_grad the value keeps its history; a new result would have none."""

    def f(x: torch.Tensor) -> torch.Tensor:
        y = x.sin()
        with torch.no_grad():
            y += 1
        return y.cos()

    found = rewriting(f, (NAME,))
    grads = []
    for call in (found.call, f):
        x = torch.linspace(-1, 2, 24).requires_grad_()
        call(x).sum().backward()
        grads.append(x.grad)
    assert same(*grads)
    assert found.applied() == 0
    assert "one grad mode" in found.reasons()


@pytest.mark.parametrize("write", [each for each in PURE if each not in CAST_BY_AUTOCAST], ids=str)
def test_autocast_acts_on_both_alike(write: Any) -> None:
    """What autocast casts for would compute in another precision than the op that writes."""
    pure = PURE[write]
    assert [a.name for a in write._schema.arguments] == [a.name for a in pure._schema.arguments]
    boolean = "bitwise" in str(write) or "__i" in str(write)
    x = torch.rand(4, 4) > 0.5 if boolean else torch.rand(4, 4, dtype=torch.bfloat16)
    number = True if boolean else 2
    given = {
        "other": x if "Tensor" in write._overloadname or "logical" in str(write) else number,
        "value": 0.5,
    }
    given |= {"mask": x > 0, "min": 0.1, "max": 0.5, "diagonal": 0}
    if write._overloadname == "Tensor" and "masked_fill" in str(write):
        given["value"] = torch.tensor(0.5)
    arguments = [given[a.name] for a in write._schema.arguments[1:] if a.name in given]
    for dtype in (torch.bfloat16, torch.float16):
        with torch.autocast("cpu", dtype=dtype):
            assert torch.equal(pure(x, *arguments).to(x.dtype), write(x.clone(), *arguments))


def softmax_in_place(q: torch.Tensor) -> torch.Tensor:
    scores = q @ q.mT
    scores.mul_(0.5)
    scores.sub_(scores.amax(-1, keepdim=True))
    scores.exp_()
    scores.div_(scores.sum(-1, keepdim=True))
    return scores @ q


def powers(x: torch.Tensor) -> torch.Tensor:
    y = x.abs()
    return y.pow_(3).add_(1).log_().sqrt_() + y.rsqrt().reciprocal_()


def products(q: torch.Tensor) -> torch.Tensor:
    y = q.sin()
    y.baddbmm_(q, q, beta=0.5)
    return y.cos()


CASTED = {softmax_in_place: 4, powers: 5, products: 1}


@pytest.mark.parametrize("f", CASTED, ids=lambda f: f.__name__)
def test_fires_on_what_autocast_casts_for(f: F) -> None:
    found = rewriting(f, (NAME,))
    x = torch.randn(3, 5, 5)
    assert same(found.call(x), f(x))
    assert found.applied() == CASTED[f], found.reasons()


@pytest.mark.parametrize("f", CASTED, ids=lambda f: f.__name__)
@pytest.mark.parametrize("inside", [False, True])
def test_not_under_autocast_where_it_casts(f: F, inside: bool) -> None:
    def g(x: torch.Tensor) -> torch.Tensor:
        with torch.autocast("cpu", dtype=torch.bfloat16):
            return f(x)

    x = torch.randn(3, 5, 5).bfloat16()
    found = rewriting(g if inside else f, (NAME,))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        got = found.call(x)
    assert same(got, g(x))
    assert "autocast leaves as it is" in found.reasons()


def test_a_softmax_in_place_is_attention() -> None:
    found = rewriting(softmax_in_place, (NAME, "rewrite-attention"))
    q = torch.randn(2, 3, 7, 8)
    assert_closer(softmax_in_place(q.double()), found.call(q), softmax_in_place(q))
    assert found.applied("rewrite-attention") == 1, found.reasons()
