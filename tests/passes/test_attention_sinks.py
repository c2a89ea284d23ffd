"""rewrite-attention: one more key for each head, with a learned score and no value."""

from __future__ import annotations

import math

import pytest
import torch
from torch.nn.functional import dropout, softmax

from support.attention import B, H, S, Site, assert_recovered, assert_refused, inputs
from support.golden import assert_golden

T = torch.Tensor


def masked(q: T, k: T, keep: T) -> T:
    low = torch.where(keep, torch.zeros((), dtype=q.dtype), torch.finfo(q.dtype).min)
    return torch.matmul(q, k.transpose(2, 3)) * 0.5 + low


def gpt_oss(q: T, k: T, v: T, keep: T, sinks: T) -> T:
    column = sinks.reshape(1, -1, 1, 1).expand(q.shape[0], -1, q.shape[-2], -1)
    combined = torch.cat([masked(q, k, keep), column], dim=-1)
    combined = combined - combined.max(dim=-1, keepdim=True).values
    probs = softmax(combined, dim=-1, dtype=combined.dtype)
    return torch.matmul(dropout(probs[..., :-1], 0.1, False).to(v.dtype), v)


def privacy_filter(q: T, k: T, v: T, keep: T, sinks: T) -> T:
    combined = torch.cat([masked(q, k, keep), sinks.view(1, -1, 1, 1).expand(B, H, S, 1)], -1)
    combined = combined - combined.amax(dim=-1, keepdim=True)
    return softmax(combined, dim=-1, dtype=torch.float32)[..., :-1].to(v.dtype) @ v


def flint(q: T, k: T, v: T, keep: T, sinks: T) -> T:
    w = masked(q, k, keep)
    column = sinks.reshape(1, -1, 1, 1).expand(*w.shape[:-1], 1)
    return softmax(torch.cat([w, column], dim=-1), dim=-1)[..., :-1].to(v.dtype) @ v


def widened(q: T, k: T, v: T, keep: T, sinks: T) -> T:
    column = sinks[None, :, None, None].expand(B, H, S, 1)
    combined = torch.cat([masked(q, k, keep), column], dim=-1).float()
    return softmax(combined, -1)[..., :-1].to(q.dtype) @ v


def infinite(q: T, k: T, v: T, keep: T, sinks: T) -> T:
    """A row without a live key has the sink alone, and gives 0."""
    w = (q @ k.mT).masked_fill(~keep, -math.inf)
    return softmax(torch.cat([w, sinks.view(1, -1, 1, 1).expand(B, H, S, 1)], -1), -1)[..., :-1] @ v


def granite(q: T, k: T, v: T, keep: T, sinks: T) -> T:
    w = masked(q, k, keep)
    share = (torch.logsumexp(w, dim=-1) - sinks.view(1, -1, 1)).to(torch.float32).sigmoid()
    w = dropout(softmax(w, dim=-1, dtype=torch.float32).to(q.dtype), 0.1, False)
    return (torch.matmul(w, v) * share.unsqueeze(-1).to(q.dtype)).transpose(1, 2)


def granite_kept_dims(q: T, k: T, v: T, keep: T, sinks: T) -> T:
    w = masked(q, k, keep)
    share = torch.sigmoid(torch.logsumexp(w, -1, keepdim=True) - sinks.view(1, -1, 1, 1))
    return share * (softmax(w, dim=-1) @ v)


SITES = [gpt_oss, privacy_filter, flint, widened, infinite, granite, granite_kept_dims]


def with_sinks(dtype: torch.dtype = torch.float32) -> list[T]:
    return [*inputs(dtype), torch.randn(H).to(dtype)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("site", SITES, ids=lambda f: f.__name__)
def test_fires(site: Site, dtype: torch.dtype) -> None:
    found = assert_recovered(site, with_sinks(dtype))
    assert "sinks=l_sinks_" in found.after[0]
    assert "softmax" not in found.after[0]
    assert "logsumexp" not in found.after[0]


def test_fires_golden() -> None:
    found = assert_recovered(gpt_oss, with_sinks())
    assert_golden(found.before[0], "rewrite_attention", "gpt_oss_before")
    assert_golden(found.after[0], "rewrite_attention", "gpt_oss_after")


def test_rows_without_a_live_key_give_nothing() -> None:
    found = assert_recovered(gpt_oss, args := with_sinks())
    assert found.call(*args)[0, :, :3].eq(0).all()
    found = assert_recovered(infinite, args)
    assert found.call(*args)[0, :, :3].eq(0).all()


def test_a_maximum_that_is_subtracted_changes_nothing() -> None:
    def site(q: T, k: T, v: T, keep: T) -> T:
        w = masked(q, k, keep)
        w = w - w.max(dim=-1, keepdim=True).values
        return softmax(w, dim=-1, dtype=w.dtype) @ v

    assert_recovered(site, inputs())


def per_query(q: T, k: T, v: T, keep: T, sinks: T) -> T:
    column = q.mean(-1, keepdim=True) + sinks.view(1, -1, 1, 1)
    return softmax(torch.cat([masked(q, k, keep), column], -1), -1)[..., :-1] @ v


def kept_column(q: T, k: T, v: T, keep: T, sinks: T) -> T:
    column = sinks.view(1, -1, 1, 1).expand(B, H, S, 1)
    return softmax(torch.cat([masked(q, k, keep), column], -1), -1) @ torch.cat([v, v[:, :, :1]], 2)


def first_column(q: T, k: T, v: T, keep: T, sinks: T) -> T:
    column = sinks.view(1, -1, 1, 1).expand(B, H, S, 1)
    return softmax(torch.cat([column, masked(q, k, keep)], -1), -1)[..., 1:] @ v


def dropped_first(q: T, k: T, v: T, keep: T, sinks: T) -> T:
    """The sink is at the end, the first key is dropped."""
    column = sinks.view(1, -1, 1, 1).expand(B, H, S, 1)
    return softmax(torch.cat([masked(q, k, keep), column], -1), -1)[..., 1:] @ v


def no_sink(q: T, k: T, v: T, keep: T, sinks: T) -> T:
    return softmax(masked(q, k, keep), -1)[..., :-1] @ v[:, :, :-1]


def two_columns(q: T, k: T, v: T, keep: T, sinks: T) -> T:
    column = sinks.view(1, -1, 1, 1).expand(B, H, S, 2)
    return softmax(torch.cat([masked(q, k, keep), column], -1), -1)[..., :-2] @ v


def other_maximum(q: T, k: T, v: T, keep: T, sinks: T) -> T:
    w = masked(q, k, keep)
    return softmax(w - w.amax(dim=-2, keepdim=True), -1) @ v


def other_total(q: T, k: T, v: T, keep: T, sinks: T) -> T:
    w = masked(q, k, keep)
    share = torch.sigmoid(torch.logsumexp(w, -2).unsqueeze(-1) - sinks.view(1, -1, 1, 1))
    return share * (softmax(w, dim=-1) @ v)


def other_sign(q: T, k: T, v: T, keep: T, sinks: T) -> T:
    w = masked(q, k, keep)
    share = torch.sigmoid(sinks.view(1, -1, 1, 1) - torch.logsumexp(w, -1, keepdim=True))
    return share * (softmax(w, dim=-1) @ v)


def infinite_gate(q: T, k: T, v: T, keep: T, sinks: T) -> T:
    w = (q @ k.mT).masked_fill(~keep, -math.inf)
    share = torch.sigmoid(torch.logsumexp(w, -1, keepdim=True) - sinks.view(1, -1, 1, 1))
    return share * (softmax(w, dim=-1) @ v)


NEAR_MISSES: dict[Site, str] = {
    per_query: "one number for each head",
    kept_column: "is dropped, and is one of sinks",
    first_column: "one column of sinks",
    dropped_first: "aten.slice.Tensor",
    no_sink: "is dropped, and is one of sinks",
    two_columns: "one column of sinks",
    other_maximum: "read by amax, sub",
    other_total: "sigmoid(logsumexp(scores) - sinks)",
    other_sign: "sigmoid(logsumexp(scores) - sinks)",
    infinite_gate: "keep the NaN",
}


@pytest.mark.parametrize("site", NEAR_MISSES, ids=lambda f: f.__name__)
def test_near_miss(site: Site) -> None:
    assert_refused(site, with_sinks(), NEAR_MISSES[site])
