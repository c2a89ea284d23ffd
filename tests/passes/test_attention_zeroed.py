"""rewrite-attention: probabilities that are set to 0, scores that are raised to the lowest number."""

from __future__ import annotations

import math

import pytest
import torch
from torch.nn.functional import dropout, softmax

from support.attention import NAME, PASSES, B, S, Site, assert_recovered, assert_refused, inputs
from support.rewriting import rewriting

T = torch.Tensor


def low(q: T) -> float:
    return torch.finfo(q.dtype).min


def cpmant(q: T, k: T, v: T, keep: T) -> T:
    """The same condition, computed twice."""
    w = torch.matmul(q, k.mT) / 2.0 + torch.arange(S, dtype=q.dtype) * 0.1
    minus = torch.scalar_tensor(-math.inf, dtype=w.dtype)
    w = torch.masked_fill(w, keep.view(B, 1, S, S) == torch.tensor(False), minus)
    w = softmax(w, -1)
    nothing = torch.scalar_tensor(0, dtype=w.dtype)
    w = torch.masked_fill(w, keep.view(B, 1, S, S) == torch.tensor(False), nothing)
    return torch.matmul(dropout(w, 0.1, False), v)


def sew_d(q: T, k: T, v: T, keep: T) -> T:
    rmask = ~keep
    w = softmax((q @ k.mT * 0.5).masked_fill(rmask, torch.tensor(low(q))), -1)
    return w.masked_fill(rmask, 0) @ v


def chosen(q: T, k: T, v: T, keep: T) -> T:
    w = softmax(torch.where(keep, q @ k.mT * 0.5, low(q)), -1)
    return torch.where(keep, w, 0.0) @ v


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("site", [cpmant, sew_d, chosen], ids=lambda f: f.__name__)
def test_rows_whose_probabilities_are_set_to_0_give_nothing(site: Site, dtype: torch.dtype) -> None:
    args = inputs(dtype)
    found = assert_recovered(site, args)
    assert found.call(*args)[0, :, :3].eq(0).all()
    assert "dead_rows=zero" in found.after[0]


def xglm(q: T, k: T, v: T, keep: T) -> T:
    w = torch.bmm(q.flatten(0, 1), k.flatten(0, 1).mT).view(B, -1, S, S)
    w = w + torch.where(keep, torch.zeros((), dtype=q.dtype), low(q))
    w = torch.max(w, torch.full((), low(q), dtype=q.dtype))
    return torch.bmm(softmax(w.view(-1, S, S), -1), v.flatten(0, 1))


def clamped(q: T, k: T, v: T, keep: T) -> T:
    return softmax((q @ k.mT).masked_fill(~keep, low(q)).clamp(min=low(q)), -1) @ v


@pytest.mark.parametrize("site", [xglm, clamped], ids=lambda f: f.__name__)
def test_a_floor_under_scores_that_are_above_it_changes_nothing(site: Site) -> None:
    with torch.no_grad():
        assert_recovered(site, inputs(), gradients=False)


def other_condition(q: T, k: T, v: T, keep: T) -> T:
    w = softmax((q @ k.mT).masked_fill(~keep, low(q)), -1)
    return w.masked_fill(~keep.roll(1, -1), 0) @ v


def other_way_around(q: T, k: T, v: T, keep: T) -> T:
    w = softmax((q @ k.mT).masked_fill(~keep, low(q)), -1)
    return w.masked_fill(keep, 0) @ v


def not_zero(q: T, k: T, v: T, keep: T) -> T:
    w = softmax((q @ k.mT).masked_fill(~keep, low(q)), -1)
    return w.masked_fill(~keep, 0.5) @ v


def without_a_fill(q: T, k: T, v: T, keep: T) -> T:
    return softmax(q @ k.mT, -1).masked_fill(~keep, 0) @ v


def small_fill(q: T, k: T, v: T, keep: T) -> T:
    return softmax((q @ k.mT).masked_fill(~keep, -4.0), -1).masked_fill(~keep, 0) @ v


def another_mask(q: T, k: T, v: T, keep: T) -> T:
    causal = torch.where(torch.ones(S, S, dtype=torch.bool).tril(), 0.0, low(q))
    return softmax((q @ k.mT + causal).masked_fill(~keep, low(q)), -1).masked_fill(~keep, 0) @ v


def written_in_between(q: T, k: T, v: T, keep: T) -> T:
    keep = keep.clone()
    w = softmax((q @ k.mT).masked_fill(keep == torch.tensor(False), low(q)), -1)
    keep[0, 0, :, 4] = False
    return w.masked_fill(keep == torch.tensor(False), 0) @ v


def random_condition(q: T, k: T, v: T, keep: T) -> T:
    w = softmax((q @ k.mT).masked_fill(torch.rand(S, S) > 0.5, low(q)), -1)
    return w.masked_fill(torch.rand(S, S) > 0.5, 0) @ v


def floor_over_infinity(q: T, k: T, v: T, keep: T) -> T:
    return softmax((q @ k.mT).masked_fill(~keep, -math.inf).clamp(min=low(q)), -1) @ v


def floor_that_scores_reach(q: T, k: T, v: T, keep: T) -> T:
    return softmax((q @ k.mT).clamp(min=-1.0), -1) @ v


NEAR_MISSES: dict[Site, str] = {
    other_condition: "wanted probabilities set to 0 by",
    other_way_around: "wanted probabilities set to 0 by",
    not_zero: "aten.masked_fill.Scalar",
    without_a_fill: "saw them set elsewhere",
    small_fill: "saw them set elsewhere",
    another_mask: "wanted one mask",
    written_in_between: "is written by",
    floor_over_infinity: "above the lowest number",
    floor_that_scores_reach: "aten.clamp.default",
}


@pytest.mark.parametrize("site", NEAR_MISSES, ids=lambda f: f.__name__)
def test_near_miss(site: Site) -> None:
    assert_refused(site, inputs(), NEAR_MISSES[site])


def test_not_by_two_random_conditions() -> None:
    found = rewriting(random_condition, PASSES)
    args = inputs()
    torch.manual_seed(3)
    wanted = random_condition(*args)
    torch.manual_seed(3)
    assert torch.equal(found.call(*args), wanted)
    assert "wanted probabilities set to 0 by" in found.reasons(NAME)


def test_no_floor_where_a_gradient_is_wanted() -> None:
    """`max` halves the gradient of a score that is as low as the floor."""
    args = [t.requires_grad_() if t.is_floating_point() else t for t in inputs()]
    assert_refused(xglm, args, "or its gradient")
