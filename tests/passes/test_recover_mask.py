"""recover-mask: a mask tensor gets its formulas, and attention under them has the answer of the whole."""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch.nn.functional import scaled_dot_product_attention as sdpa
from torch.nn.functional import softmax
from torch.utils.checkpoint import checkpoint

from support.golden import assert_golden
from support.numerics import assert_closer
from support.reference import reference_mode
from support.rewriting import Rewritten, rewriting

NAME = "recover-mask"
PASSES = ("eliminate-noops", "rewrite-attention", "fold-causal-mask", "remove-repeat-kv", NAME)
B, H, S, D = 2, 3, 160, 8
Site = Callable[..., torch.Tensor]


pytestmark = pytest.mark.usefixtures("blocks_at_any_size")


def places(q: torch.Tensor, k: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    return torch.arange(q.shape[2])[:, None], torch.arange(k.shape[2])[None, :]


def causal(q: torch.Tensor, k: torch.Tensor, keep: torch.Tensor) -> torch.Tensor:
    i, j = places(q, k)
    return (j <= i) & keep.bool()[:, None, None, :]


def window(q: torch.Tensor, k: torch.Tensor, keep: torch.Tensor) -> torch.Tensor:
    i, j = places(q, k)
    return causal(q, k, keep) & (j > i - 20)


def both_ways(q: torch.Tensor, k: torch.Tensor, keep: torch.Tensor) -> torch.Tensor:
    i, j = places(q, k)
    return ((i - j).abs() <= 9) & (keep[:, None, None] != 0)


def lower_right(q: torch.Tensor, k: torch.Tensor, keep: torch.Tensor) -> torch.Tensor:
    i, j = places(q, k)
    return (j <= i + (k.shape[2] - q.shape[2])) & keep.bool()[:, None, None, :]


def later_only(q: torch.Tensor, k: torch.Tensor, keep: torch.Tensor) -> torch.Tensor:
    """The last queries see no key at all."""
    i, j = places(q, k)
    return (j >= i + 40) & keep.bool()[:, None, None, :]


def documents(q: torch.Tensor, k: torch.Tensor, keep: torch.Tensor) -> torch.Tensor:
    i, j = places(q, k)
    return (j <= i) & (keep[:, None, : q.shape[2], None] == keep[:, None, None, :])


MASKS = (causal, window, both_ways, lower_right, later_only, documents)


def given(mask: Callable[..., torch.Tensor]) -> Site:
    """The mask as SDPA takes it."""
    return lambda q, k, v, keep: sdpa(q, k, v, attn_mask=mask(q, k, keep))


def spelled(mask: Callable[..., torch.Tensor], fill: float | None = None) -> Site:
    def attend(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, keep: torch.Tensor) -> torch.Tensor:
        low = torch.finfo(q.dtype).min if fill is None else fill
        added = torch.where(mask(q, k, keep), torch.zeros((), dtype=q.dtype), low)
        scores = q @ k.transpose(2, 3) * 0.4 + added
        return softmax(scores, -1, dtype=torch.float32).to(q.dtype) @ v

    return attend


def exactly(mask: Callable[..., torch.Tensor], fill: float | None = None) -> Site:
    """`spelled` without its cast to float32, as reference in float64."""

    def attend(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, keep: torch.Tensor) -> torch.Tensor:
        low = torch.finfo(q.dtype).min if fill is None else fill
        added = torch.where(mask(q, k, keep), torch.zeros((), dtype=q.dtype), low)
        return softmax(q @ k.transpose(2, 3) * 0.4 + added, -1) @ v

    return attend


def inputs(dtype: torch.dtype = torch.float32, rows: int = S, left: bool = False) -> list[torch.Tensor]:
    q, k, v = (torch.randn(B, H, n, D).to(dtype) for n in (rows, S, S))
    keep = torch.ones(B, S, dtype=torch.int64)
    keep[0, : 11 if left else 0] = 0
    keep[1, S - 7 :] = 0
    return [q, k, v, keep]


def check(found: Rewritten, plain: Site, args: list[torch.Tensor], reference: Site | None = None) -> None:
    got, eager = found.call(*args), plain(*args)
    with reference_mode():
        exact = (reference or plain)(*(t.double() if t.is_floating_point() else t for t in args))
    assert torch.equal(got.isnan(), eager.isnan())
    assert_closer(exact, got, eager, strides=False)


def whole_masks(found: Rewritten) -> list[str]:
    """The values of the rewritten graph that hold an entry for each query and key."""
    return re.findall(rf".*\b{S}, {S}\]$", found.lowered[-1], re.MULTILINE)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("mask", MASKS, ids=lambda f: f.__name__)
def test_fires_on_a_mask_given_to_sdpa(mask: Callable[..., torch.Tensor], dtype: torch.dtype) -> None:
    rows = 100 if mask is lower_right else S
    found = rewriting(given(mask), PASSES)
    check(found, given(mask), inputs(dtype, rows, left=True))
    assert found.applied(NAME) == 1, found.reasons(NAME)
    assert "('attention', 'blocks', '')" in found.providers
    assert not whole_masks(found)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("fill", [None, -math.inf])
@pytest.mark.parametrize("mask", MASKS, ids=lambda f: f.__name__)
def test_fires_on_softmax_and_keeps_dead_rows(mask: Any, fill: float | None, dtype: torch.dtype) -> None:
    """Rows without a live key: the mean of V after a finite fill, NaN after -inf."""
    rows = 100 if mask is lower_right else S
    found = rewriting(spelled(mask, fill), PASSES)
    check(found, spelled(mask, fill), inputs(dtype, rows, left=True), exactly(mask, fill))
    assert found.applied(NAME) == 1, found.reasons(NAME)
    assert not whole_masks(found)


def gradients(call: Site, *args: torch.Tensor) -> list[torch.Tensor]:
    leaves = [t.detach().clone().requires_grad_() for t in args[:3]]
    out = call(*leaves, args[3])
    (out * torch.linspace(-1, 1, out.numel(), dtype=out.dtype).view(out.shape)).sum().backward()
    return [leaf.grad for leaf in leaves if leaf.grad is not None]


def only_sizes(q: torch.Tensor, k: torch.Tensor, keep: torch.Tensor) -> torch.Tensor:
    i, j = places(q, k)
    return (j <= i) & (j > i - 20)


def filled(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, keep: torch.Tensor) -> torch.Tensor:
    """A score that is replaced gets no gradient, in rows without a live key either."""
    scores = (q @ k.mT).masked_fill(~causal(q, k, keep), torch.finfo(q.dtype).min)
    return softmax(scores, -1) @ v


TRAINED: dict[str, tuple[Site, Site]] = {
    **{f"given_{mask.__name__}": (given(mask), given(mask)) for mask in (causal, window, later_only)},
    "window_without_data": (spelled(only_sizes), exactly(only_sizes)),
    "filled": (filled, filled),
    "dead_rows_with_a_gradient": (spelled(causal), exactly(causal)),
}


@pytest.mark.parametrize("name", TRAINED)
def test_fires_with_eagers_gradients(name: str) -> None:
    plain, reference = TRAINED[name]
    found = rewriting(plain, PASSES)
    args = inputs(left=True)
    with reference_mode():
        exact = gradients(reference, *(t.double() if t.is_floating_point() else t for t in args))
    assert_closer(exact, gradients(found.call, *args), gradients(plain, *args), strides=False)
    assert found.applied(NAME) == 1, found.reasons(NAME)


def test_fires_with_grouped_heads() -> None:
    def attend(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, keep: torch.Tensor) -> torch.Tensor:
        k, v = (t[:, :, None].expand(B, 2, 3, S, D).reshape(B, 6, S, D) for t in (k, v))
        return spelled(causal)(q, k, v, keep)

    def wide(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, keep: torch.Tensor) -> torch.Tensor:
        k, v = (t[:, :, None].expand(B, 2, 3, S, D).reshape(B, 6, S, D) for t in (k, v))
        return exactly(causal)(q, k, v, keep)

    args = inputs(left=True)
    args[:3] = torch.randn(B, 6, S, D), torch.randn(B, 2, S, D), torch.randn(B, 2, S, D)
    found = rewriting(attend, PASSES)
    check(found, attend, args, wide)
    assert found.applied("remove-repeat-kv") == 1
    assert found.applied(NAME) == 1, found.reasons(NAME)


def test_fires_golden() -> None:
    found = rewriting(given(window), PASSES)
    found.call(*inputs())
    assert_golden(found.before[0] + "->\n" + found.after[0], "recover_mask", "window")


def padding_only(q: torch.Tensor, k: torch.Tensor, keep: torch.Tensor) -> torch.Tensor:
    return keep.bool()[:, None, None, :]


def prefix(q: torch.Tensor, k: torch.Tensor, keep: torch.Tensor) -> torch.Tensor:
    i, j = places(q, k)
    return ((j <= i) | (j < 30)) & keep.bool()[:, None, None, :]


def chunked(q: torch.Tensor, k: torch.Tensor, keep: torch.Tensor) -> torch.Tensor:
    i, j = places(q, k)
    return (j <= i) & (j // 40 == i // 40)


def biased(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, keep: torch.Tensor) -> torch.Tensor:
    i, j = places(q, k)
    return sdpa(q, k, v, attn_mask=torch.where(j <= i, (j - i) * 0.1, -math.inf))


IN_WORDS: dict[str, tuple[Site, str, str]] = {
    "padding_only": (given(padding_only), 'mask="c0[b, k]"', "'blocks'"),
    "prefix": (given(prefix), 'mask="(k < 30 or k <= q) and c0[b, k]"', "'blocks'"),
    "chunked": (given(chunked), 'mask="(k)//40 == (q)//40 and k <= q"', "'blocks'"),
    "biased": (biased, 'mask="k <= q" score="s + 0.1*k - 0.1*q"', "'blocks'"),
}


@pytest.mark.parametrize("name", IN_WORDS)
def test_evidence_has_the_formula_and_says_who_computes(name: str) -> None:
    plain, words, provider = IN_WORDS[name]
    found = rewriting(plain, PASSES)
    check(found, plain, inputs())
    assert words in found.reasons(NAME)
    assert provider in found.providers[0]


def some_replaced(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, keep: torch.Tensor) -> torch.Tensor:
    """A fill that excludes nothing is part of the score; the mask comes after it."""
    i, j = places(q, k)
    scores = (q @ k.mT * 0.4).masked_fill((i - j) % 5 == 3, -2.0)
    added = torch.where(causal(q, k, keep), 0.0, torch.finfo(q.dtype).min).to(q.dtype)
    return softmax(scores + added, -1) @ v


def test_captures_of_score_and_mask_go_together() -> None:
    found = rewriting(some_replaced, PASSES)
    check(found, some_replaced, inputs(left=True))
    assert found.applied(NAME) == 1, found.reasons(NAME)
    assert "score=s*c0[0, 0, q, k]" in found.after[0]
    assert "bias=c1[b, 0, q, k]" in found.after[0]


def test_sizes_may_be_symbols() -> None:
    found = rewriting(given(lower_right), PASSES, dynamic=True)
    for rows in (100, 120, S):
        check(found, given(lower_right), inputs(rows=rows))
    assert found.graphs == 1
    assert re.search(r'mask="c0\[b, k\] and k <= q \+ n(0 - n1|1 - n0)"', found.reasons(NAME))
    assert "'blocks'" in found.providers[0]


def two_fills(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, keep: torch.Tensor) -> torch.Tensor:
    i, j = places(q, k)
    mask = torch.where(j <= i, 0.0, -math.inf).masked_fill(keep[:, None, None] == 0, torch.finfo(q.dtype).min)
    return sdpa(q, k, v, attn_mask=mask)


def written_later(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, keep: torch.Tensor) -> torch.Tensor:
    mask = causal(q, k, keep)
    keep.zero_()
    return sdpa(q, k, v, attn_mask=mask)


def written_before(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, keep: torch.Tensor) -> torch.Tensor:
    """The buffer is not the triangle that it was made as."""
    triangle = torch.ones(S, S, dtype=torch.bool).tril()
    triangle[3, 5:9] = True
    return sdpa(q, k, v, attn_mask=triangle)


NEAR_MISSES: dict[str, tuple[Site, str]] = {
    "two_fills": (two_fills, "one number that excludes keys"),
    "written_later": (written_later, "is written by"),
    "written_before": (written_before, "is written by"),
}


@pytest.mark.parametrize("name", NEAR_MISSES)
def test_near_miss(name: str) -> None:
    plain, reason = NEAR_MISSES[name]
    found = rewriting(plain, PASSES)
    args, again = inputs(), inputs()
    again[:3] = args[:3]
    got, eager = found.call(*args), plain(*again)
    assert torch.equal(args[3], again[3])
    with reference_mode():
        exact = plain(*(t.double() for t in args[:3]), inputs()[3])
    assert_closer(exact, got, eager, strides=False)
    assert found.applied(NAME) == 0
    assert reason in found.reasons(NAME)


def test_blocks_not_with_fewer_heads_than_threads(monkeypatch: pytest.MonkeyPatch) -> None:
    """One block after the other keeps no more threads busy than there are heads."""
    monkeypatch.setattr(torch, "get_num_threads", lambda: B * H + 1)
    found = rewriting(given(causal), PASSES)
    check(found, given(causal), inputs())
    assert "of 7 threads" in found.providers[0]


def checkpointed(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, keep: torch.Tensor) -> torch.Tensor:
    """Two layers that share a mask made outside of them, as gradient checkpointing has it."""
    mask = causal(q, k, keep)
    for _ in range(2):
        q = checkpoint(given(lambda *_: mask), q, k, v, keep, use_reentrant=False)
    return q


def test_fires_inside_of_checkpoints() -> None:
    """The padding is passed into the sub-graphs, whose mask is not computed any more."""
    found = rewriting(checkpointed, PASSES)
    args = inputs(left=True)
    check(found, checkpointed, args)
    with reference_mode():
        exact = gradients(checkpointed, *(t.double() if t.is_floating_point() else t for t in args))
    assert_closer(exact, gradients(found.call, *args), gradients(checkpointed, *args), strides=False)
    assert found.applied(NAME) == 2 * found.graphs, found.reasons(NAME)
    assert "('attention', 'blocks', '')" in found.providers


def test_not_float16_filled_with_its_lowest_number() -> None:
    found = rewriting(spelled(causal), PASSES)
    check(found, spelled(causal), inputs(torch.float16, left=True), exactly(causal))
    assert found.applied(NAME) == 0
    assert "float16" in found.reasons(NAME)


def test_not_float16_numbers_that_may_hold_its_lowest_one() -> None:
    """Two masks in one sum are no formula; captured as numbers they would be added in float32."""

    def twice(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, keep: torch.Tensor) -> torch.Tensor:
        i, j = places(q, k)
        masks = [torch.where(m, 0.0, torch.finfo(q.dtype).min).to(q.dtype) for m in (j <= i, j > i - 9)]
        padding = torch.where(keep.bool(), 0.0, -1e4).to(q.dtype)[:, None, None]
        return softmax((q @ k.mT) * 0.4 + masks[0] + masks[1] + padding, -1) @ v

    found = rewriting(twice, PASSES)
    args = inputs(torch.float16, left=True)
    torch.testing.assert_close(found.call(*args), twice(*args), rtol=1e-2, atol=1e-2)
    assert found.applied(NAME) == 0
    assert "saw float16 in" in found.reasons(NAME)


def test_a_number_that_is_none_is_no_formula() -> None:
    """0 * -inf."""

    def attend(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, keep: torch.Tensor) -> torch.Tensor:
        i, j = places(q, k)
        return softmax(q @ k.mT + (1.0 - (j <= i).to(q.dtype)) * -math.inf, -1) @ v

    found = rewriting(attend, PASSES)
    out = found.call(*inputs())
    assert out.isnan().all()
    assert "c0[0, 0, q, k]" in found.reasons(NAME)
