"""Attention tile by tile against the same formulas computed at once, in float64: results and gradients."""

from __future__ import annotations

import itertools
import math
import random
from collections.abc import Iterator
from typing import Any

import pytest
import torch

from fxopt.ir.ops import register_ops
from fxopt.ir.ops.block_attention import in_blocks
from fxopt.ir.program import MaskProgram, ScoreProgram
from fxopt.ir.tile_values import TileValues

B, H, D = 2, 6, 8
MASKS = ("k <= q", "k <= q and c0[b, k]", "k <= q + 3 and k > q - 9", "c1[b, q] == c1[b, k]",
         "(k)//16 == (q)//16", "c0[b, k]", "k < 5 or k > 40 and k <= q", "k > q + 50", "True",
         "c0[b, q] and k <= q + n0")  # fmt: skip
SCORES = ("", "5*tanh(s/5)", "s + c2[h]*k", "s + c3[h, q, k]", "5*tanh(s/5) + c4[c5[k - q + 100], h]")
SIZES = ((70, 70), (65, 90), (33, 40))


@pytest.fixture(autouse=True, scope="module")
def _ops() -> None:
    register_ops()


def captures(columns: int, rows: int) -> dict[str, torch.Tensor]:
    """c0: padding, of which the second sequence has no left part; c1: documents; c2...: numbers."""
    length = max(rows, columns)
    keep = torch.ones(B, length, dtype=torch.bool)
    keep[0, :30], keep[1, length - 9 :] = False, False
    return {
        "c0": keep,
        "c1": (torch.arange(length) // 20).expand(B, -1).contiguous(),
        "c2": torch.randn(H, dtype=torch.float64, requires_grad=True),
        "c3": torch.randn(H, rows, columns, dtype=torch.float64, requires_grad=True),
        "c4": torch.randn(11, H, dtype=torch.float64, requires_grad=True),
        "c5": torch.randint(11, (300,)),
    }


def at_once(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, mask: str, score: str, named: dict[str, torch.Tensor],
    sinks: torch.Tensor | None, dead_rows: str, stops: bool,
) -> torch.Tensor:  # fmt: skip
    group = H // k.shape[1]
    k, v = k.repeat_interleave(group, 1), v.repeat_interleave(group, 1)
    raw = q @ k.mT * 0.3
    ranges = tuple((0, size) for size in raw.shape)
    values = TileValues(ranges, named, {"n0": 2}, q.device, raw, raw.dtype)
    scores = values.number(ScoreProgram.parse(score).result)
    live = values.condition(MaskProgram.parse(mask).live).expand(raw.shape)
    lowest = torch.finfo(q.dtype).min
    if dead_rows != "mean":
        scores = scores.masked_fill(~live, -math.inf)
    elif stops:
        scores = scores.masked_fill(~live, lowest)
    else:
        scores = torch.where(live, scores, scores - scores.detach() + lowest)
    if sinks is not None:
        scores = torch.cat([scores, sinks.view(1, -1, 1, 1).expand(*raw.shape[:3], 1)], -1)
    weights = scores.softmax(-1)
    if sinks is not None:
        return weights[..., :-1] @ v
    return (torch.where(live.any(-1, keepdim=True), weights, 0.0) if dead_rows == "zero" else weights) @ v


@pytest.mark.parametrize("factor", [7, 2**15, 2**40, -int(torch.finfo(torch.float32).min)])
def test_factors_of_integers_may_be_of_any_size(factor: int) -> None:
    padding = torch.tensor([[0, 1, 1], [1, 0, 1]])
    scores = torch.randn(2, H, 5, 3)
    values = TileValues(((0, 2), (0, H), (0, 5), (0, 3)), {"c0": padding}, {}, scores.device, scores)
    got = values.number(ScoreProgram.parse(f"s + {factor}*c0[b, k] - {factor}").result)
    assert torch.equal(got, scores + (padding[:, None, None] - 1).float() * float(factor))


def cases() -> Iterator[tuple[Any, ...]]:
    drawn = random.Random(0)
    every = itertools.product(
        MASKS, SCORES, ("zero", "mean", "nan", "sinks"), (False, True), (H, 2), SIZES, (D, 12)
    )
    for case in every:
        if drawn.random() < 0.06 and not ("c1" in case[0] and case[5][0] > case[5][1]):
            yield case


@pytest.mark.parametrize("case", list(cases()), ids=str)
def test_results_and_gradients(case: tuple[Any, ...]) -> None:
    mask, score, dead_rows, stops, groups, (rows, columns), width = case
    torch.manual_seed(0)
    q, k, v = (
        torch.randn(B, count, heads, size, dtype=torch.float64).transpose(1, 2).requires_grad_()
        for count, heads, size in ((rows, H, D), (columns, groups, D), (columns, groups, width))
    )
    named = captures(columns, rows)
    sinks = torch.randn(H, dtype=torch.float64, requires_grad=True) if dead_rows == "sinks" else None
    dead_rows = "zero" if dead_rows == "sinks" else dead_rows
    changed, _, bias = score.partition(" + ")
    got = in_blocks(
        q, k, v, scale=0.3, dead_rows=dead_rows, mask_replaces=stops, sinks=sinks, mask=mask, sizes=[2],
        score="" if changed == "s" else changed, bias=bias, captures=list(named.values()), enable_gqa=True,
    )  # fmt: skip
    wanted = at_once(q, k, v, mask, score, named, sinks, dead_rows, stops)
    torch.testing.assert_close(got, wanted, equal_nan=True, rtol=1e-9, atol=1e-11)
    if wanted.isnan().any():
        return  # a gradient of what is no number is none either
    leaves = [q, k, v, *([] if sinks is None else [sinks])]
    leaves += [named[name] for name in ScoreProgram.parse(score).captures if named[name].requires_grad]
    weight = torch.randn_like(wanted)
    found, right = (torch.autograd.grad(out, leaves, weight) for out in (got, wanted))
    for one, other in zip(found, right, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-8, atol=1e-10)


def test_gradients_by_differences() -> None:
    torch.manual_seed(0)
    q, k, v = (torch.randn(1, 2, 5, 3, dtype=torch.float64, requires_grad=True) for _ in range(3))
    slopes, sinks = (torch.randn(2, dtype=torch.float64, requires_grad=True) for _ in range(2))

    def attend(*given: torch.Tensor) -> torch.Tensor:
        *operands, slope, sink = given
        return in_blocks(
            *operands, score="2*tanh(s/2)", bias="c0[h]*k", mask="k <= q", captures=[slope], sinks=sink
        )

    assert torch.autograd.gradcheck(attend, (q, k, v, slopes, sinks))


@pytest.mark.parametrize("fill", [-math.inf, torch.finfo(torch.float32).min, -1e9])
def test_rows_that_numbers_mask_whole(fill: float) -> None:
    """A mask that is captured as numbers hides which rows have no live key."""
    torch.manual_seed(0)
    length = 40
    q, k, v = (torch.randn(1, 2, length, D, requires_grad=True) for _ in range(3))
    added = torch.where(torch.arange(length) <= torch.arange(length)[:, None], 0.0, fill)
    added[:7] = fill
    dead = "nan" if fill == -math.inf else "none"
    got = in_blocks(q, k, v, scale=0.3, dead_rows=dead, mask="True", bias="c0[q, k]", captures=[added])
    # In float64 -1e9 would not absorb a score.
    kind = torch.float32 if fill == -1e9 else torch.float64
    wide = [each.detach().to(kind).requires_grad_() for each in (q, k, v)]
    wanted = (wide[0] @ wide[1].mT * 0.3 + added).softmax(-1) @ wide[2]
    torch.testing.assert_close(got.to(kind), wanted, equal_nan=True, rtol=1e-5, atol=1e-6)
    weight = torch.randn_like(got)
    found = torch.autograd.grad(got, (q, k, v), weight)
    right = torch.autograd.grad(wanted, wide, weight.to(kind))
    for one, other in zip(found, right, strict=True):
        torch.testing.assert_close(one.to(kind), other, equal_nan=True, rtol=1e-4, atol=1e-5)


def test_dropout_drops_the_same_in_the_backward() -> None:
    """With V = identity the result is the weights: what was dropped is 0, and has no gradient."""
    torch.manual_seed(0)
    size, p = 64, 0.4
    q, k = (torch.randn(B, H, size, D, dtype=torch.float64, requires_grad=True) for _ in range(2))
    v = torch.eye(size, dtype=torch.float64).expand(B, H, size, size).clone().requires_grad_()
    weights = in_blocks(q, k, v, None, p, True)
    plain = in_blocks(q.detach(), k.detach(), v.detach(), None, 0.0, True)
    kept = weights != 0
    live = plain != 0
    assert abs(kept[live].double().mean() - (1 - p)) < 0.01
    torch.testing.assert_close(weights[kept], plain[kept] / (1 - p))
    grad = torch.randn_like(weights)
    found = torch.autograd.grad(weights, (q, k, v), grad)
    scores = (q @ k.mT / math.sqrt(D)).masked_fill(~live, -math.inf)
    again = (scores.softmax(-1) * kept / (1 - p)) @ v
    for one, other in zip(found, torch.autograd.grad(again, (q, k, v), grad), strict=True):
        torch.testing.assert_close(one, other)
    torch.manual_seed(0)
    assert not torch.equal(in_blocks(q, k, v, None, p, True), weights), "another call draws other numbers"


def test_nothing_to_attend_to() -> None:
    q, k, v = torch.randn(1, 2, 3, D), torch.randn(1, 2, 0, D), torch.randn(1, 2, 0, D)
    assert torch.equal(in_blocks(q, k, v, mask="k <= q"), torch.zeros(1, 2, 3, D))
    assert in_blocks(q[:, :, :0], q, q, mask="k <= q").shape == (1, 2, 0, D)
    assert in_blocks(q[:0], q[:0], q[:0], mask="k <= q").shape == (0, 2, 3, D)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("score", ["", "5*tanh(s/5)"], ids=["in one piece", "in tiles"])
def test_the_memory_of_a_result_does_not_follow_the_queries(score: str, dtype: torch.dtype) -> None:
    """Compilers are told how it is laid out; partial rotary embeddings make queries with heads first."""
    query, key = torch.randn(2, H, 13, D, dtype=dtype), torch.randn(2, 2, 13, D, dtype=dtype)
    packed = torch.randn(2, 13, 80, dtype=dtype)[..., 64:].view(2, 13, 2, D).transpose(1, 2)
    attributes = {
        "mask": "k <= q and k > q - 5", "score": score, "scale": 0.3, "dead_rows": "zero", "stops": False,
        "stopped": [], "wide_scores": False, "dropout_p": 0.0,
    }  # fmt: skip
    operands = (query, key, packed, None, None, [], [])
    torch.library.opcheck(
        torch.ops.fxopt.block_attention.default, operands, attributes, test_utils="test_faketensor"
    )
