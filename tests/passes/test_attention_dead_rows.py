"""rewrite-attention: rows without a live key keep the model's own answer, NaN or mean, and its gradient."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from torch.nn.functional import softmax

from support.attention import B, S, inputs
from support.numerics import assert_closer
from support.reference import reference_mode
from support.rewriting import rewriting

NAME = "rewrite-attention"
PASSES = ("functionalize-writes", "eliminate-noops", NAME)
Site = Callable[..., torch.Tensor]


def low(x: torch.Tensor) -> float:
    return torch.finfo(x.dtype).min


def added(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, keep: torch.Tensor) -> torch.Tensor:
    """A row of -inf is NaN."""
    return softmax(q @ k.mT + torch.where(keep, 0.0, -math.inf).to(q.dtype), dim=-1) @ v


def filled(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, keep: torch.Tensor) -> torch.Tensor:
    return softmax((q @ k.mT * 0.5).masked_fill(~keep, -math.inf), dim=-1) @ v


def filled_in_place(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, keep: torch.Tensor) -> torch.Tensor:
    scores = q @ k.mT
    scores *= 0.5
    scores.masked_fill_(~keep, -math.inf)
    return softmax(scores, dim=-1) @ v


def where_swapped(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, keep: torch.Tensor) -> torch.Tensor:
    return softmax(torch.where(~keep, -math.inf, q @ k.mT), dim=-1) @ v


def sum_of_two(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, keep: torch.Tensor) -> torch.Tensor:
    """Where both exclude, the sum overflows to -inf, and elsewhere it stays finite."""
    causal, padding = (torch.where(m, torch.zeros((), dtype=q.dtype), low(q)) for m in split(keep))
    return softmax((q @ k.mT) * 0.5 + causal + padding, dim=-1) @ v


def fill_then_sum(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, keep: torch.Tensor) -> torch.Tensor:
    """GPT-Neo."""
    causal, padding = split(keep)
    lowest = torch.tensor(low(q), dtype=q.dtype)
    scores = torch.where(causal, q @ k.mT, lowest)
    return softmax(scores + torch.where(padding, torch.zeros((), dtype=q.dtype), low(q)), dim=-1) @ v


def sum_then_fill(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, keep: torch.Tensor) -> torch.Tensor:
    """The fill replaces the sum: nothing overflows."""
    causal, padding = split(keep)
    scores = q @ k.mT + torch.where(padding, torch.zeros((), dtype=q.dtype), low(q))
    return softmax(scores.masked_fill(~causal, low(q)), dim=-1) @ v


def two_fills(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, keep: torch.Tensor) -> torch.Tensor:
    causal, padding = split(keep)
    scores = (q @ k.mT).masked_fill(~padding, low(q))
    return softmax(torch.where(causal, scores, -math.inf), dim=-1) @ v


def split(keep: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """(causal, padding): the two conditions that `keep` is made of."""
    return torch.ones(S, S, dtype=torch.bool).tril(), keep[:, :, -1:, :]


SITES: dict[str, Site] = {
    f.__name__: f
    for f in (added, filled, filled_in_place, where_swapped, sum_of_two, fill_then_sum, sum_then_fill,
              two_fills)
}  # fmt: skip


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", SITES)
def test_fires(name: str, dtype: torch.dtype) -> None:
    site = SITES[name]
    found = rewriting(site, PASSES)
    q, k, v, keep = inputs(dtype)
    out, eager = found.call(q, k, v, keep), site(q, k, v, keep)
    assert found.applied(NAME) == 1, found.reasons(NAME)
    assert torch.equal(out.isnan(), eager.isnan())
    with reference_mode():
        exact = site(q.double(), k.double(), v.double(), keep)
    assert_closer(exact, out, eager, strides=False)


def gradients(call: Site, keep: torch.Tensor, *tensors: torch.Tensor) -> list[torch.Tensor]:
    leaves = [t.detach().clone().requires_grad_() for t in tensors]
    out = call(*leaves, keep)
    (out * torch.linspace(-1, 1, out.numel(), dtype=out.dtype).view(out.shape)).sum().backward()
    return [leaf.grad for leaf in leaves if leaf.grad is not None]


@pytest.mark.parametrize("name", SITES)
def test_fires_with_eagers_gradients(name: str) -> None:
    """Of rows without a live key too: what is filled gets none, what is masked by a sum does."""
    site = SITES[name]
    found = rewriting(site, PASSES)
    q, k, v, keep = inputs()
    with reference_mode():
        exact = gradients(site, keep, q.double(), k.double(), v.double())
    got, eager = (gradients(call, keep, q, k, v) for call in (found.call, site))
    assert_closer(exact, got, eager, strides=False)
    assert found.applied(NAME) == 1, found.reasons(NAME)


@pytest.mark.parametrize("name", ["fill_then_sum", "sum_then_fill"])
def test_what_is_half_filled_and_half_added_is_filled_by_a_factor_in_training(name: str) -> None:
    site = SITES[name]
    for trains in (False, True):
        found = rewriting(site, PASSES)
        q, k, v, keep = inputs()
        found.call(q.requires_grad_(trains), k, v, keep)
        assert ("score=s*c0[" in found.after[0]) is trains


def test_fires_with_a_float_mask_given_from_outside() -> None:
    def site(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        return softmax(q @ k.mT + mask, dim=-1) @ v

    found = rewriting(site, PASSES)
    q, k, v, keep = inputs()
    mask = torch.zeros(B, 1, S, S).masked_fill(~keep, -math.inf)
    out, eager = found.call(q, k, v, mask), site(q, k, v, mask)
    assert torch.equal(out.isnan(), eager.isnan())
    assert eager.isnan().any()
    assert_closer(site(q.double(), k.double(), v.double(), mask.double()), out, eager, strides=False)
    assert found.applied(NAME) == 1, found.reasons(NAME)
    assert "'decomposed'" in found.providers[0]


def test_a_large_site_that_may_have_such_rows_is_not_given_to_a_kernel() -> None:
    """Kernels give 0 for them."""
    rows = 80
    found = rewriting(added, PASSES)
    q, k, v = (torch.randn(1, 2, rows, 4) for _ in range(3))
    keep = torch.ones(rows, rows, dtype=torch.bool).tril()
    keep[5] = False
    out = found.call(q, k, v, keep)
    assert out[:, :, 5].isnan().all()
    assert not out[:, :, 6:].isnan().any()


def test_gradients_of_rows_that_a_number_masks_whole_are_not_left_to_a_kernel() -> None:
    """The kernel's backward has exp(score - lse), and the lowest number absorbs the logarithm in lse."""

    def site(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, keep: torch.Tensor) -> torch.Tensor:
        return softmax(q @ k.mT + torch.where(keep, 0.0, low(q)), dim=-1) @ v

    found = rewriting(site, (*PASSES, "recover-mask"))
    tensors = [torch.randn(1, 2, 264, 4) for _ in range(3)]
    keep = (torch.arange(264)[:, None] >= torch.arange(264)) & (torch.arange(264) > 5)
    with reference_mode():
        exact = gradients(site, keep, *(t.double() for t in tensors))
    got, eager = (gradients(call, keep, *tensors) for call in (found.call, site))
    assert_closer(exact, got, eager, strides=False)
    assert "wrong gradient" in found.providers[0] or "'decomposed'" in found.providers[0]


def test_a_fill_that_a_score_outweighs_does_not_exclude_its_key() -> None:
    """Scores of -1e5 lose against a fill of -1e4, whose keys then have all the weight."""

    def site(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, keep: torch.Tensor) -> torch.Tensor:
        return softmax((q @ k.mT).masked_fill(~keep, -1e4), dim=-1) @ v

    found = rewriting(site, PASSES)
    q, k, v, keep = inputs()
    q, k = torch.full_like(q, -250.0), torch.full_like(k, 100.0)
    out = found.call(q, k, v, keep)
    assert torch.allclose(out, site(q, k, v, keep), atol=1e-6)
    assert torch.allclose(out[1, :, 4], v[1, :, 5:].mean(1), atol=1e-6)
    assert found.applied(NAME) == 1


def bias_under_a_fill(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, bias: torch.Tensor) -> torch.Tensor:
    """A fill over whole rows: what was added before it gets no gradient there."""
    dead = torch.arange(q.shape[2])[:, None] < 2
    scores = (q @ k.mT * 0.4 + bias @ bias.mT).masked_fill(dead, torch.finfo(q.dtype).min)
    return softmax(scores, -1) @ v


def test_a_bias_under_a_fill_keeps_its_gradient() -> None:
    found = rewriting(bias_under_a_fill, ("eliminate-noops", "rewrite-attention", "recover-mask"))
    torch.manual_seed(0)
    args = [torch.randn(2, 3, 6, 4, requires_grad=True) for _ in range(3)]
    args.append(torch.randn(1, 3, 6, 6, requires_grad=True))
    weight = torch.randn(2, 3, 6, 4)
    got = torch.autograd.grad(found.call(*args), args, weight)
    wanted = torch.autograd.grad(bias_under_a_fill(*args), args, weight)
    assert found.applied("rewrite-attention") == 1, found.reasons()
    for one, other in zip(got, wanted, strict=True):
        torch.testing.assert_close(one, other)
