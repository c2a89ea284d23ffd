"""substitute-expert-products: products with stacks of matrices take quantized stacks; others say why not."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
import transformers.integrations.moe  # noqa: F401 - registers its op
from torch import nn

from fxopt.ir.quantize import quantize_parameter
from support.golden import assert_golden
from support.quantizing import quantizing, texts

E, N, K, S = 4, 512, 384, 7
IDS = torch.tensor([2, 0, 2, 3, 1, 1, 0])
ENDS = torch.tensor([2, 2, 5, 7], dtype=torch.int32)


class Stack(nn.Module):
    """A stack of matrices, multiplied as a test says."""

    def __init__(self, run: Callable[[torch.Tensor, torch.Tensor], torch.Tensor], *shape: int) -> None:
        super().__init__()
        self.run = run
        self.experts = nn.Module()
        self.experts.down_proj = nn.Parameter(torch.randn(*(shape or (E, N, K))) / 16)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.run(x, self.experts.down_proj)


@pytest.fixture(autouse=True)
def _without_gradients() -> Any:
    torch.manual_seed(0)
    with torch.no_grad():
        yield


def fallback(x: torch.Tensor, w: torch.Tensor) -> torch.Tensor:
    out: torch.Tensor = torch.ops.transformers.grouped_mm_fallback(x, w, offs=ENDS)
    return out


def each_in_turn(x: torch.Tensor, w: torch.Tensor) -> torch.Tensor:
    out = torch.zeros(S, N)
    for expert in range(E):
        out = out + nn.functional.linear(x, w[expert]) * IDS.eq(expert).unsqueeze(1)
    return out


# How it is multiplied, and the shape of the stack; x is (S, K).
SPELLINGS: dict[str, tuple[Callable[[torch.Tensor, torch.Tensor], torch.Tensor], tuple[int, ...]]] = {
    "picked": (lambda x, w: torch.bmm(w[IDS], x.unsqueeze(-1)).squeeze(-1), (E, N, K)),
    "picked_right": (lambda x, w: torch.bmm(x.unsqueeze(1), w[IDS].mT).squeeze(1), (E, N, K)),
    "picked_transposed": (lambda x, w: torch.bmm(x.unsqueeze(1), w[IDS]).squeeze(1), (E, K, N)),
    "index_select": (lambda x, w: torch.bmm(w.index_select(0, IDS), x[..., None])[..., 0], (E, N, K)),
    "turned_first": (lambda x, w: torch.bmm(x[:, None], w.transpose(-2, -1)[IDS])[:, 0], (E, N, K)),
    "several_tokens": (lambda x, w: torch.bmm(torch.stack((x, x.sin()), 1), w[IDS]).sum(1), (E, K, N)),
    "grouped": (lambda x, w: fallback(x, w.transpose(-2, -1)), (E, N, K)),
    "grouped_transposed": (fallback, (E, K, N)),
    "all_of_all": (lambda x, w: torch.bmm(x.expand(E, S, K).sin(), w).sum(0), (E, K, N)),
    "all_left": (lambda x, w: torch.bmm(w, x.t().expand(E, K, S).cos()).sum(0).t(), (E, N, K)),
    "one": (lambda x, w: nn.functional.linear(x, w[2]), (E, N, K)),
    "one_transposed": (lambda x, w: x @ w[1], (E, K, N)),
    "one_from_the_end": (lambda x, w: torch.mm(x, w.transpose(1, 2)[-1]), (E, N, K)),
    "each": (each_in_turn, (E, N, K)),
}  # fmt: skip


def expected(model: Stack, shape: tuple[int, ...], format: str = "int8") -> Stack:
    """The model with the stack as it is stored."""
    model, turned = copy.deepcopy(model), shape[1] == K
    weight = model.experts.down_proj
    stored = quantize_parameter(weight, format, transposed=turned).dequantize(weight.dtype).view(E, N, K)
    weight.copy_(stored.mT if turned else stored)
    return model


def close(a: torch.Tensor, b: torch.Tensor, limit: float = 1e-5) -> bool:
    return a.shape == b.shape and a.dtype == b.dtype and float((a - b).norm() / b.norm()) < limit


@pytest.mark.parametrize("dynamic", [False, True])
@pytest.mark.parametrize("spelling", SPELLINGS)
def test_fires(spelling: str, dynamic: bool) -> None:
    run, shape = SPELLINGS[spelling]
    model, x = Stack(run, *shape), torch.randn(S, K)
    found = quantizing(model, dynamic=dynamic)
    assert close(found.call(x), expected(model, shape)(x))
    assert len(found.applied) == (E if spelling == "each" else 1), found.refused


@pytest.mark.parametrize("format", ["int4", "nf4", "fp4"])
@pytest.mark.parametrize("spelling", ["picked", "grouped_transposed", "one_transposed"])
def test_fires_for_formats(spelling: str, format: str) -> None:
    run, shape = SPELLINGS[spelling]
    model, x = Stack(run, *shape), torch.randn(S, K)
    found = quantizing(model, format)
    assert close(found.call(x), expected(model, shape, format)(x))
    assert len(found.applied) == 1, found.refused


@pytest.mark.parametrize("scheme", ["int8-dynamic", "fp8-dynamic"])
def test_fires_with_rounded_tokens(scheme: str) -> None:
    run, shape = SPELLINGS["picked"]
    model, x = Stack(run, *shape), torch.randn(S, K)
    found = quantizing(model, scheme)
    assert close(found.call(x), model(x), 6e-2)
    assert not close(found.call(x), model(x), 3e-3)


def test_fires_for_groups_of_pytorch() -> None:
    model = Stack(lambda x, w: torch._grouped_mm(x, w.transpose(-2, -1), offs=ENDS), E, N, K).bfloat16()
    x = torch.randn(S, K).bfloat16()
    found = quantizing(model)
    assert close(found.call(x), expected(model, (E, N, K))(x), 1e-2)
    assert len(found.applied) == 1, found.refused


def test_fires_for_other_numbers_of_tokens() -> None:
    model = Stack(lambda x, w: torch.bmm(x.view(E, -1, K), w), E, K, N)
    found = quantizing(model, dynamic=True)
    for tokens in (8, 4, 0, 20):
        x = torch.randn(tokens, K)
        result, wanted = found.call(x), expected(model, (E, K, N))(x)
        assert result.shape == wanted.shape
        assert not tokens or close(result, wanted)


def test_fires_in_inductor() -> None:
    run, shape = SPELLINGS["grouped"]
    model, x = Stack(lambda x, w: torch.relu(run(x, w)), *shape), torch.randn(S, K)
    found = quantizing(model, host="inductor")
    assert close(found.call(x), expected(model, shape)(x))
    assert len(found.applied) == 1, found.refused


@pytest.mark.parametrize("spelling", ["picked", "grouped"])
def test_fires_golden(spelling: str) -> None:
    run, shape = SPELLINGS[spelling]
    before, after = texts(Stack(run, *shape), [torch.randn(S, K)], name="substitute-expert-products")
    assert_golden(before, "substitute_expert_products", f"{spelling}_before")
    assert_golden(after, "substitute_expert_products", f"{spelling}_after")


def test_rows_behind_the_last_group_are_zero() -> None:
    ends = torch.tensor([1, 3, 3, 5], dtype=torch.int32)
    model = Stack(lambda x, w: torch.ops.transformers.grouped_mm_fallback(x, w, offs=ends), E, K, N)
    found, x = quantizing(model), torch.randn(S, K)
    assert not found.call(x)[5:].any()
    assert close(found.call(x)[:5], expected(model, (E, K, N))(x)[:5])


def test_a_changed_stack_is_noticed() -> None:
    run, shape = SPELLINGS["picked"]
    model, x = Stack(run, *shape), torch.randn(S, K)
    found = quantizing(model)
    found.call(x)
    model.experts.down_proj.mul_(3)
    assert close(found.call(x), expected(model, shape)(x))


def test_gradients_flow_to_tokens() -> None:
    run, shape = SPELLINGS["picked"]
    model = Stack(run, *shape).requires_grad_(False)
    stored, found = expected(model, shape), quantizing(model)
    grads = []
    with torch.enable_grad():
        first = torch.randn(S, K)
        for each in (found.call, stored):
            x = first.clone().requires_grad_()
            each(x).square().sum().backward()
            assert x.grad is not None
            grads.append(x.grad)
    assert close(*grads, limit=1e-4)
    assert len(found.applied) == 1, found.refused


def test_stacks_are_reported() -> None:
    from fxopt.report.record import collect
    from support.compiled import compile_fxopt

    run, shape = SPELLINGS["each"]
    model, x = Stack(run, *shape), torch.randn(S, K)
    with collect() as records:
        compile_fxopt(model, quantize="int4")(x)
    (note,) = records[0].linears
    assert (note.name, note.bytes_before) == ("experts.down_proj", 4 * E * N * K)
    assert note.bytes_after < 0.17 * note.bytes_before and 18 < note.decibels < 24
    torch._dynamo.reset()
    with collect() as records:
        compile_fxopt(Stack(SPELLINGS["picked"][0]), quantize="int4")(x)
    (note,) = records[0].linears
    assert (note.name, note.route) == ("experts.down_proj", "fxopt::expert_linear (product of experts)")


# ---- what must stay as it is ----

MASK = torch.tensor([True, False, True, True])
Miss = tuple[Callable[[torch.Tensor, torch.Tensor], torch.Tensor], tuple[int, ...], str]
NEAR_MISSES: dict[str, Miss] = {
    "tiny": (lambda x, w: torch.bmm(w[IDS], x[:, :64, None]), (E, 64, 64), "worth it from 131072"),
    "computed": (lambda x, w: torch.bmm((w * 2)[IDS], x[..., None]), (E, N, K), ""),
    "masked": (lambda x, w: torch.bmm(w[MASK], x[:3, :, None]), (E, N, K), ""),
    "by_rows": (lambda x, w: torch.bmm(w[:, IDS], x[:E, :, None]), (E, N, K), ""),
    "of_columns": (lambda x, w: torch.bmm(w[..., :128][IDS], x[:, :128, None]), (E, N, K), ""),
    "a_part": (lambda x, w: torch.bmm(w[1:3], x[:2, :, None]), (E, N, K), ""),
    "two_places": (lambda x, w: nn.functional.linear(x, w[1:2, IDS[:1]].view(1, K)), (E, N, K),
                   "wanted a weight that is a parameter of the graph"),
    "a_row": (lambda x, w: nn.functional.linear(x, w[:, 3]), (E, N, K),
              "wanted a weight that is a parameter of the graph"),
    "double": (lambda x, w: torch.bmm(w[IDS], x[..., None].double()), (E, N, K), "saw torch.float64"),
}  # fmt: skip


@pytest.mark.parametrize("case", NEAR_MISSES)
def test_near_miss(case: str) -> None:
    run, shape, reason = NEAR_MISSES[case]
    model, x = Stack(run, *shape), torch.randn(S, K)
    if case == "double":
        model.double()
    found = quantizing(model)
    assert torch.equal(found.call(x), model(x))
    assert not found.applied
    assert not reason or any(reason in each for each in found.refused), found.refused


def test_stays_where_the_options_say_so() -> None:
    run, shape = SPELLINGS["picked"]
    model, x = Stack(run, *shape), torch.randn(S, K)
    found = quantizing(model, skip=["experts.*"])
    assert torch.equal(found.call(x), model(x))
    assert found.refused == ["the options skip 'experts.*'"]


def test_stays_where_it_is_trained() -> None:
    run, shape = SPELLINGS["picked"]
    model, x = Stack(run, *shape), torch.randn(S, K)
    found = quantizing(model)
    with torch.enable_grad():
        found.call(x).sum().backward()
    assert found.refused == ["its weight is trained"]
    assert model.experts.down_proj.grad is not None


def test_refuses_stacks_that_are_written() -> None:
    def run(x: torch.Tensor, w: torch.Tensor) -> torch.Tensor:
        out = torch.bmm(w[IDS], x[..., None])
        w.mul_(2)
        return out

    model, x = Stack(run), torch.randn(S, K)
    other = copy.deepcopy(model)
    found = quantizing(model)
    assert torch.equal(found.call(x), other(x))
    assert any("its weight is written by mul_" in each for each in found.refused)
