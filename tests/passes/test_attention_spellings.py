"""rewrite-attention: scales, masks and softmaxes as models spell them."""

from __future__ import annotations

import math

import pytest
import torch
from torch.nn.functional import dropout, softmax

from support.attention import PASSES, B, D, H, S, Site, assert_recovered, assert_refused, inputs
from support.rewriting import rewriting

T = torch.Tensor


def added(keep: T, dtype: torch.dtype) -> T:
    return torch.where(keep, torch.zeros((), dtype=dtype), torch.finfo(dtype).min)


def spelled_out(q: T, k: T, v: T, keep: T) -> T:
    w = (q @ k.mT * 0.5).float() + added(keep, torch.float32)
    shares = torch.exp(w - w.max(dim=-1, keepdim=True)[0])
    return (shares / shares.sum(dim=-1, keepdim=True)).to(q.dtype) @ v


def swinv2(q: T, k: T, v: T, keep: T) -> T:
    """A learned scale of each head."""
    scale = torch.clamp(v[0, :, :1, :1], max=math.log(100.0)).exp()
    return softmax(q @ k.mT * scale + added(keep, q.dtype), -1) @ v


def temperature(q: T, k: T, v: T, keep: T) -> T:
    return softmax((q @ k.mT) / (v.mean() ** 2 + 1.0) + added(keep, q.dtype), -1) @ v


def scaled_with_bias(q: T, k: T, v: T, keep: T) -> T:
    """The scale of a head is that of the bias too."""
    scale = v[0, :, :1, :1].exp()
    bias = torch.arange(S, dtype=q.dtype) * 0.3
    return softmax((q @ k.mT + bias) * scale, -1) @ v


def literal_scale(q: T, k: T, v: T, keep: T) -> T:
    w = torch.matmul(q, k.mT) / torch.full([], 2.0, dtype=q.dtype)
    return softmax(torch.where(keep, w, torch.full([], torch.finfo(q.dtype).min, dtype=q.dtype)), -1) @ v


def openai_gpt(q: T, k: T, v: T, keep: T) -> T:
    """The causal triangle as a factor, and what is left of -1e4."""
    b = torch.ones(S, S, dtype=q.dtype).tril().view(1, 1, S, S)
    w = torch.matmul(q, k.mT) / 2.0
    w = w * b + -1e4 * (1 - b)
    return softmax(w, -1) @ v


def subtracted(q: T, k: T, v: T, keep: T) -> T:
    """XLNet: the mask is a factor of a large number."""
    return softmax((q @ k.mT + 0) * 0.5 - 1e30 * (~keep).to(q.dtype), 3) @ v


def mask_minus_scores(q: T, k: T, v: T, keep: T) -> T:
    return softmax(added(keep, q.dtype) - q @ k.mT, -1) @ v


def with_alpha(q: T, k: T, v: T, keep: T) -> T:
    bias = torch.arange(S, dtype=q.dtype)
    return softmax(torch.add(q @ k.mT, bias, alpha=0.3).sub(bias, alpha=0.1), -1) @ v


def small_fill(q: T, k: T, v: T, keep: T) -> T:
    return softmax((q @ k.mT).masked_fill(~keep, -10.0), dim=-1) @ v


def small_fill_under_a_bias(q: T, k: T, v: T, keep: T) -> T:
    w = (q @ k.mT * 0.5 + torch.arange(S, dtype=q.dtype) * 0.3).masked_fill(~keep[:, :, :, :], -2.0)
    return softmax(w * 2.0 + added(keep[:, :, -1:], q.dtype), dim=-1) @ v


def fill_of_openai(q: T, k: T, v: T, keep: T) -> T:
    return softmax(torch.where(keep, q @ k.mT, torch.tensor(-1e4, dtype=q.dtype)), -1) @ v


def two_small_fills(q: T, k: T, v: T, keep: T) -> T:
    w = (q @ k.mT).masked_fill(~keep, -5.0)
    return softmax(w.masked_fill(keep[:, :, -1:, :], 1.0), dim=-1) @ v


def positive_fill(q: T, k: T, v: T, keep: T) -> T:
    return softmax((q @ k.mT).masked_fill(keep, 3.0), dim=-1) @ v


def capped_and_filled(q: T, k: T, v: T, keep: T) -> T:
    return softmax((torch.tanh(q @ k.mT / 5) * 5).masked_fill(~keep, -10.0), dim=-1) @ v


def large_bias(q: T, k: T, v: T, keep: T) -> T:
    """Swin's -100 and BERT's old -1e4 are added, and may be outweighed."""
    return softmax(q @ k.mT + (1.0 - keep.to(q.dtype)) * -100.0, -1) @ v


def dropped_by_flag(q: T, k: T, v: T, keep: T) -> T:
    w = softmax((q @ k.mT).float() + added(keep, torch.float32), dim=-1).type_as(v)
    w = dropout(w, p=0.5, training=False).view(B * H, S, S)
    return torch.bmm(w, v.reshape(B * H, S, D)).view(B, H, S, D)


def negated(q: T, k: T, v: T, keep: T) -> T:
    return softmax(-(q @ k.mT) + added(keep, q.dtype), -1) @ v


SITES = [
    spelled_out, swinv2, temperature, scaled_with_bias, literal_scale, openai_gpt, subtracted,
    mask_minus_scores, with_alpha, small_fill, small_fill_under_a_bias, fill_of_openai, two_small_fills,
    positive_fill, capped_and_filled, large_bias, dropped_by_flag, negated,
]  # fmt: skip


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("site", SITES, ids=lambda f: f.__name__)
def test_fires(site: Site, dtype: torch.dtype) -> None:
    found = assert_recovered(site, inputs(dtype))
    assert "softmax" not in found.after[0]
    assert "exp.default(w" not in found.after[0]


def test_what_is_emitted() -> None:
    """Factors of a head go to Q, those of single scores and small fills to the score program."""
    wanted = {
        swinv2: "scale=1, dead_rows=none)",
        openai_gpt: "score=s*c0[q, k]",
        small_fill: "score=s*c0[b, 0, q, k]",
        fill_of_openai: "score=s*c0[b, 0, q, k]",
        two_small_fills: "score=s*c0[b, 0, q, k]*c1[b, 0, 0, k]",
        capped_and_filled: "score=5*c0[b, 0, q, k]*tanh(s/5)",
    }
    for site, text in wanted.items():
        found = assert_recovered(site, inputs())
        assert text in found.after[0].replace("c0[0, 0, q, k]", "c0[q, k]"), found.after[0]


def test_a_fill_that_no_score_outweighs_excludes_its_keys() -> None:
    def site(q: T, k: T, v: T, keep: T) -> T:
        return softmax((q @ k.mT + torch.arange(S) * 0.1).masked_fill(~keep, -1e9), -1) @ v

    found = assert_recovered(site, inputs())
    assert "score" not in found.after[0]
    assert "-3.40282e+38" in found.after[0]


def in_place_on_an_input(q: T, k: T, v: T, keep: T) -> T:
    w = q @ k.mT
    keep.logical_not_()
    return softmax(w.masked_fill(keep, -1.0), -1) @ v


def scaled_by_scores(q: T, k: T, v: T, keep: T) -> T:
    w = q @ k.mT
    return softmax(w * w.sigmoid(), -1) @ v


def tensor_fill(q: T, k: T, v: T, keep: T) -> T:
    return softmax(torch.where(keep, q @ k.mT, v.mean(-1).unsqueeze(-2)), -1) @ v


def nan_fill(q: T, k: T, v: T, keep: T) -> T:
    return softmax((q @ k.mT).masked_fill(~keep, math.nan), -1) @ v


def unshifted(q: T, k: T, v: T, keep: T) -> T:
    """Rows without a live key are 0 / 0 here."""
    shares = torch.exp(q @ k.mT + added(keep, q.dtype))
    return (shares / shares.sum(dim=-1, keepdim=True)) @ v


def other_sum(q: T, k: T, v: T, keep: T) -> T:
    w = q @ k.mT
    shares = torch.exp(w - w.amax(dim=-1, keepdim=True))
    return (shares / shares.sum(dim=-2, keepdim=True)) @ v


def larger_scale(q: T, k: T, v: T, keep: T) -> T:
    """The factor makes scores of its own batch."""
    return softmax(q[:1] @ k[:1].mT * v[:, :, :1, :1], -1) @ v


NEAR_MISSES: dict[Site, str] = {
    scaled_by_scores: "read by sigmoid, mul",
    tensor_fill: "aten.where.self",
    nan_fill: "aten.masked_fill",
    other_sum: "",
    unshifted: "",
    larger_scale: "aten.mul.Tensor",
}


@pytest.mark.parametrize("site", NEAR_MISSES, ids=lambda f: f.__name__)
def test_near_miss(site: Site) -> None:
    assert_refused(site, inputs(), NEAR_MISSES[site])


def test_not_over_a_write() -> None:
    found = rewriting(in_place_on_an_input, PASSES)
    q, k, v, keep = inputs()
    other = keep.clone()
    assert torch.allclose(found.call(q, k, v, keep), in_place_on_an_input(q, k, v, other), atol=1e-6)
    assert torch.equal(keep, other)
