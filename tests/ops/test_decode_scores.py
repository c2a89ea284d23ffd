"""Attention of a few queries over a long cache under masks of numbers, and with scores that are changed."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from torch.nn.functional import scaled_dot_product_attention as sdpa

from fxopt.ir.ops import attention_providers, register_ops
from fxopt.ir.ops.decode_attention import in_decode, span_of
from fxopt.ir.ops.masking import MEAN, NAN, NONE, ZERO
from support.numerics import assert_closer
from support.reference import reference_mode
from support.rewriting import rewriting

PASSES = ("eliminate-noops", "rewrite-attention", "fold-causal-mask", "remove-repeat-kv", "recover-mask")
B, H, GROUPS, C, D = 2, 4, 2, 50, 8
Attend = Callable[[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]

pytestmark = pytest.mark.usefixtures("at_any_size")


@pytest.fixture
def at_any_size(monkeypatch: pytest.MonkeyPatch) -> None:
    register_ops()
    for least in ("DECODE_NUMBERS", "DENSE_NUMBERS"):
        monkeypatch.setattr(attention_providers, least, 0)


def live_keys(rows: int) -> torch.Tensor:
    """Query i sees the first 20 keys and those up to its own, but no padding."""
    live = (torch.arange(C) < 20 + torch.arange(rows)[:, None] + 1).expand(B, 1, rows, C).clone()
    live[0, ..., :7] = False
    return live


def lowest(rows: int, dtype: torch.dtype = torch.float32, low: float | None = None) -> torch.Tensor:
    """What transformers passes to eager attention over a static cache."""
    fill = torch.finfo(dtype).min if low is None else low
    return torch.full((B, 1, rows, C), fill, dtype=dtype).masked_fill(live_keys(rows), 0.0)


def repeated(x: torch.Tensor) -> torch.Tensor:
    return x[:, :, None].expand(-1, -1, H // GROUPS, -1, -1).reshape(len(x), H, C, x.shape[-1])


def eager(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    scores = torch.matmul(q, repeated(k).transpose(2, 3)) * 0.3 + mask
    return torch.softmax(scores, -1, dtype=torch.float32).to(q.dtype) @ repeated(v)


def given(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    return sdpa(q, k, v, attn_mask=mask, enable_gqa=True)


def capped(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    scores = torch.tanh(q @ repeated(k).mT * 0.3 / 2.0) * 2.0 + mask
    return torch.softmax(scores, -1) @ repeated(v)


def filled(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    scores = torch.tanh(q @ repeated(k).mT / 5.0) * 5.0
    return torch.softmax(scores.masked_fill(mask < 0.0, torch.finfo(q.dtype).min), -1) @ repeated(v)


def with_slopes(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    slopes = 0.5 ** torch.arange(1, H + 1, dtype=q.dtype).view(H, 1, 1)
    bias = slopes * torch.arange(C, dtype=q.dtype)
    return torch.softmax(q @ repeated(k).mT * 0.3 + bias + mask, -1) @ repeated(v)


def with_sinks(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    sinks = torch.linspace(-1.0, 2.0, H, dtype=q.dtype).view(1, H, 1, 1).expand(*q.shape[:3], 1)
    scores = torch.cat([q @ repeated(k).mT * 0.3 + mask, sinks], -1)
    return torch.softmax(scores, -1)[..., :-1] @ repeated(v)


def narrow_values(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    return eager(q, k, v[..., :4], mask)


SPELLINGS: tuple[Attend, ...] = (eager, given, capped, filled, with_slopes, with_sinks, narrow_values)


def inputs(rows: int, dtype: torch.dtype = torch.float32) -> list[torch.Tensor]:
    q = torch.randn(B, H, rows, D).to(dtype)
    return [q, *(torch.randn(B, GROUPS, C, D).to(dtype) for _ in range(2))]


def check(attend: Attend, args: list[torch.Tensor]) -> None:
    """Fires, with the answer of the whole."""
    found = rewriting(attend, PASSES)
    with torch.no_grad():
        got, plain = found.call(*args), attend(*args)
        with reference_mode():
            exact = attend(*(each.double() for each in args))
    assert_closer(exact, got, plain, strides=False)
    assert "('attention', 'decode', '')" in found.providers, found.providers


@pytest.mark.parametrize("attend", SPELLINGS, ids=lambda each: each.__name__)
@pytest.mark.parametrize("rows", [1, 3])
def test_fires_with_the_answer_of_the_whole(attend: Attend, rows: int) -> None:
    check(attend, [*inputs(rows), lowest(rows)])


@pytest.mark.parametrize("attend", SPELLINGS, ids=lambda each: each.__name__)
def test_reads_no_key_that_no_query_sees(attend: Attend) -> None:
    q, k, v = inputs(1)
    mask = lowest(1)
    found = rewriting(attend, PASSES)
    with torch.no_grad():
        wanted = attend(q, k, v, mask)
        k[:, :, 21:], v[:, :, 21:] = math.nan, math.nan
        torch.testing.assert_close(found.call(q, k, v, mask), wanted)


@pytest.mark.parametrize("attend", [eager, given, capped, with_slopes, with_sinks], ids=lambda e: e.__name__)
@pytest.mark.parametrize("none", [1, 3])
def test_a_row_without_a_key(attend: Attend, none: int) -> None:
    """Its scores may matter: all keys are read, and the answer is that of the model."""
    mask = lowest(3)
    mask[1, :, :none] = torch.finfo(torch.float32).min
    check(attend, [*inputs(3), mask])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("attend", [eager, with_sinks], ids=lambda each: each.__name__)
def test_in_half_precision(attend: Attend, dtype: torch.dtype) -> None:
    """Scores of float16 may be as low as its lowest number: only -inf excludes."""
    check(attend, [*inputs(2, dtype), lowest(2, dtype)])


def test_numbers_that_are_low_but_exclude_nothing() -> None:
    check(eager, [*inputs(2), lowest(2, low=-3.0)])
    assert span_of(lowest(2, low=-1e4), True).tolist() == [0, C, 0]


def test_the_span_under_numbers() -> None:
    assert span_of(lowest(1), True).tolist() == [0, 21, 0]
    assert span_of(lowest(1)[1:], True).tolist() == [0, 21, 1]
    assert span_of(lowest(1)[:1], True).tolist() == [7, 21, 1]
    assert span_of(lowest(1, low=-math.inf), True).tolist() == [0, 21, 0]
    half = lowest(1, torch.float16)
    assert span_of(half, True).tolist() == [0, C, 0]
    assert span_of(half.masked_fill(half < 0, -math.inf), True).tolist() == [0, 21, 0]
    dead = lowest(1)
    dead[0] = torch.finfo(torch.float32).min
    assert span_of(dead, True).tolist() == [0, C, 0]


@pytest.mark.parametrize("dead", [ZERO, MEAN, NAN, NONE])
def test_rows_of_minus_infinity(dead: str) -> None:
    q, k, v = inputs(3)
    mask = lowest(3, low=-math.inf)
    mask[1, :, 1] = -math.inf
    out = in_decode(q, k, v, mask, enable_gqa=True, dead_rows=dead, scale=0.3)
    wanted = eager(q, k, v, mask)
    wanted = wanted if dead == NAN else wanted.nan_to_num(0.0)
    torch.testing.assert_close(out, wanted, equal_nan=True)


def test_not_where_scores_change_by_key() -> None:
    def weighted(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        return torch.softmax(q @ repeated(k).mT * torch.arange(1.0, C + 1) + mask, -1) @ repeated(v)

    found = rewriting(weighted, PASSES)
    args = [*inputs(1), lowest(1)]
    with torch.no_grad():
        torch.testing.assert_close(found.call(*args), weighted(*args))
    assert "decode: it needs scores that change alike for every key" in found.providers[0]
