"""Learned biases under masks, in rows that may have no live key: who gets a gradient there."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch.nn.functional import logsigmoid, softmax
from torch.nn.functional import scaled_dot_product_attention as sdpa

from fxopt.ir.ops import attention_providers
from support.numerics import assert_closer
from support.reference import reference_mode
from support.rewriting import rewriting
from support.rounding import perturbed

pytestmark = pytest.mark.usefixtures("blocks_at_any_size")

PASSES = ("eliminate-noops", "rewrite-attention", "fold-causal-mask", "remove-repeat-kv", "recover-mask")
B, H, S, D = 2, 4, 130, 8
LOWEST = torch.finfo(torch.float32).min
Site = Callable[..., torch.Tensor]


@pytest.fixture(autouse=True)
def _tiles_however_many_scores_are_live(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("DENSE_SHARE", "LEARNED_SHARE"):
        monkeypatch.setattr(attention_providers, name, 1.0)


def parts(q: torch.Tensor, table: torch.Tensor, keep: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The bias by distance, and what takes no part: other keys than the last 20, and padding."""
    i, j = torch.arange(q.shape[2])[:, None], torch.arange(q.shape[2])
    bias = table[(j - i).clamp(-16, 16) + 16].permute(2, 0, 1)[None]
    return bias, ~(keep[:, None, None] & (j <= i) & (j > i - 20))


def replaced_in_the_mask(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, table: torch.Tensor, keep: torch.Tensor
) -> torch.Tensor:
    bias, dead = parts(q, table, keep)
    return sdpa(q, k, v, attn_mask=bias.masked_fill(dead, torch.finfo(q.dtype).min))


def replaced_with_its_score(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, table: torch.Tensor, keep: torch.Tensor
) -> torch.Tensor:
    bias, dead = parts(q, table, keep)
    return softmax((q @ k.mT * 0.3 + bias).masked_fill(dead, torch.finfo(q.dtype).min), -1) @ v


def summed(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, table: torch.Tensor, keep: torch.Tensor
) -> torch.Tensor:
    bias, dead = parts(q, table, keep)
    return softmax(q @ k.mT * 0.3 + bias + torch.where(dead, torch.finfo(q.dtype).min, 0.0), -1) @ v


def added_to_what_replaced_the_score(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, table: torch.Tensor, keep: torch.Tensor
) -> torch.Tensor:
    bias, dead = parts(q, table, keep)
    return softmax((q @ k.mT * 0.3).masked_fill(dead, torch.finfo(q.dtype).min) + bias, -1) @ v


def gradients(call: Site, args: list[torch.Tensor]) -> list[torch.Tensor]:
    leaves = [each.detach().clone().requires_grad_(each.is_floating_point()) for each in args]
    out = call(*leaves)
    (out * torch.linspace(-1, 1, out.numel(), dtype=out.dtype).view(out.shape)).sum().backward()
    return [leaf.grad for leaf in leaves if leaf.grad is not None]


def left_padded() -> list[torch.Tensor]:
    torch.manual_seed(0)
    keep = torch.ones(B, S, dtype=torch.bool)
    keep[0, :30] = False
    return [*(torch.randn(B, H, S, D) for _ in range(3)), torch.randn(33, H), keep]


@pytest.mark.parametrize(
    "attend",
    [replaced_in_the_mask, replaced_with_its_score, summed, added_to_what_replaced_the_score],
)
def test_gradients_of_rows_without_a_live_key(attend: Site) -> None:
    args, found = left_padded(), rewriting(attend, PASSES)
    with reference_mode():
        exact = gradients(attend, [each.double() if each.is_floating_point() else each for each in args])
    assert_closer(exact, gradients(found.call, args), gradients(attend, args))
    assert "'blocks'" in found.providers[0], found.providers
    assert "c1[c2[k - q + 129], h]" in found.reasons("recover-mask")


def test_not_a_bias_that_one_number_replaces_and_another_one_is_added_to() -> None:
    """A row of padding: some of its numbers were added to the bias, others stand in its place."""

    def attend(
        q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, table: torch.Tensor, keep: torch.Tensor
    ) -> torch.Tensor:
        bias, dead = parts(q, table, keep)
        lowest = torch.finfo(q.dtype).min
        added = bias + torch.where(keep[:, None, None], 0.0, lowest)
        return sdpa(q, k, v, attn_mask=torch.where(dead & keep[:, None, None], lowest, added))

    args, found = left_padded(), rewriting(attend, PASSES)
    with reference_mode():
        exact = gradients(attend, [each.double() if each.is_floating_point() else each for each in args])
    assert_closer(exact, gradients(found.call, args), gradients(attend, args))
    assert "a learned bias is replaced in some rows" in found.providers[0]


FILLS = (LOWEST, float("-inf"))


@pytest.mark.parametrize("fill", FILLS)
@pytest.mark.parametrize("kind", ["slopes", "matrix", "forgetting"])
def test_no_factor_of_queries_by_keys_under_a_learned_bias(kind: str, fill: float) -> None:
    """``masked_fill`` over the sum of score and bias stops the gradient; causal rows are never dead."""

    def attend(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, learned: torch.Tensor) -> torch.Tensor:
        i, j = torch.arange(q.shape[2])[:, None], torch.arange(q.shape[2])
        if kind == "slopes":
            learned = (j - i) * learned[:, None, None]
        elif kind == "forgetting":
            gates = logsigmoid(learned).cumsum(-1)
            learned = gates[..., :, None] - gates[..., None, :]
        return softmax((q @ k.mT * 0.3 + learned).masked_fill(j > i, fill), -1) @ v

    shape = {"slopes": (H,), "matrix": (B, H, S, S), "forgetting": (B, H, S)}[kind]
    args, found = [*left_padded()[:3], torch.rand(shape)], rewriting(attend, PASSES)
    with reference_mode():
        exact = gradients(attend, [each.double() for each in args])
    others = perturbed(lambda: gradients(attend, args))
    assert_closer(exact, gradients(found.call, args), gradients(attend, args), roundings=others)
    words = found.reasons("recover-mask")
    assert 'mask="k <= q" score="s + ' in words
    assert "s*" not in words


@pytest.mark.parametrize("fill", FILLS)
def test_no_gradient_of_filled_scores_under_a_mask_that_is_captured_whole(fill: float) -> None:
    """The first row has no live key, which no formula says: the bias added to the others has two forms."""

    def attend(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        i, j = torch.arange(q.shape[2])[:, None], torch.arange(q.shape[2])
        scores = 5 * torch.tanh(q @ k.mT * 0.06)
        added = torch.where((j - i).abs() < 9, (j - i) * 0.1, 0.5)
        return softmax(scores.masked_fill(j >= i, fill) + added.to(q.dtype), -1) @ v

    args, found = left_padded()[:3], rewriting(attend, PASSES)
    with reference_mode():
        exact = gradients(attend, [each.double() for each in args])
    got, wanted = gradients(found.call, args), gradients(attend, args)
    assert_closer(exact[:2], got[:2], wanted[:2])
    assert torch.equal(got[2].isnan(), wanted[2].isnan())
    assert "'blocks'" in found.providers[0], found.providers


def test_captures_of_score_and_mask_have_names_of_their_own() -> None:
    def attend(
        q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, gain: torch.Tensor, keep: torch.Tensor
    ) -> torch.Tensor:
        scores = q @ k.mT * gain[:, None, :]
        return softmax(scores.masked_fill(~keep[:, None, None], torch.finfo(q.dtype).min), -1) @ v

    args, found = left_padded(), rewriting(attend, PASSES)
    with torch.no_grad():
        found.call(*args[:3], torch.rand(H, S), args[4])
    words = found.reasons("recover-mask")
    assert 'mask="c1[b, k]" score="s*c0[0, h, 0, k]"; c1 is l_keep_; c0 is ' in words
