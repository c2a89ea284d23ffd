"""rewrite-attention: a softmax that is spelled out, with one more term in its divisor as a sink of 0."""

from __future__ import annotations

import math

import pytest
import torch

from support.attention import B, H, S, Site, assert_recovered, assert_refused, inputs

T = torch.Tensor


def low(q: T) -> float:
    return torch.finfo(q.dtype).min


def plain(q: T, k: T, v: T, keep: T) -> T:
    x = q @ k.mT * 0.5
    top = x.amax(-1, keepdim=True)
    e = (x - top).exp()
    return e / (e.sum(-1, keepdim=True) + (-top).exp()) @ v


def detached(q: T, k: T, v: T, keep: T) -> T:
    x = (q @ k.mT).masked_fill(~keep, low(q)).float()
    top = x.max(-1, keepdim=True).values.detach()
    e = torch.exp(x - top)
    return (e / (torch.exp(-top) + e.sum(-1, keepdim=True))).to(q.dtype) @ v


def floored(q: T, k: T, v: T, keep: T) -> T:
    """The shift is at least 0, so rows of -inf give 0, not NaN."""
    x = (q @ k.mT).masked_fill(~keep, -math.inf)
    top = x.amax(-1, keepdim=True).clamp(min=0)
    e = (x - top).exp()
    return e / (e.sum(-1, keepdim=True) + (-top).exp()) @ v


def unshifted(q: T, k: T, v: T, keep: T) -> T:
    e = (q @ k.mT * 0.5).masked_fill(~keep, -math.inf).exp()
    return e / (1 + e.sum(-1, keepdim=True)) @ v


def of_rank_3(q: T, k: T, v: T, keep: T) -> T:
    q, k, v = (t.flatten(0, 1) for t in (q, k, v))
    e = (q @ k.mT * 0.5).exp()
    return torch.bmm(e / (e.sum(-1, keepdim=True) + 1), v).view(B, H, S, -1)


def of_logarithms(q: T, k: T, v: T, keep: T) -> T:
    return (q @ k.mT).masked_fill(~keep, low(q)).log_softmax(-1).exp() @ v


def minus_logsumexp(q: T, k: T, v: T, keep: T) -> T:
    x = (q @ k.mT).masked_fill(~keep, -math.inf)
    return torch.exp(x - x.logsumexp(-1, keepdim=True)) @ v


def rows_put_back(q: T, k: T, v: T, keep: T) -> T:
    x = (q @ k.mT).float() * 0.5
    return (x - torch.logsumexp(x, dim=-1)[..., None]).exp().to(q.dtype) @ v


def shares_of_rows_put_back(q: T, k: T, v: T, keep: T) -> T:
    x = (q @ k.mT).masked_fill(~keep, low(q))
    e = (x - x.max(-1).values[..., None]).exp()
    return e / e.sum(-1).unsqueeze(-1) @ v


def read_twice(q: T, k: T, v: T, keep: T) -> T:
    logs = (q @ k.mT).log_softmax(-1)
    return logs.exp() @ v + logs.sum()


OTHERWISE = [of_logarithms, minus_logsumexp, rows_put_back, shares_of_rows_put_back]


@pytest.mark.parametrize("site", OTHERWISE, ids=lambda f: f.__name__)
def test_spelled_otherwise(site: Site) -> None:
    assert_recovered(site, inputs())


def with_its_logsumexp(q: T, k: T, v: T, keep: T) -> T:
    x = q @ k.mT
    total = x.logsumexp(-1, keepdim=True)
    return torch.exp(x - total) @ v + total


def shares_of_one(q: T, k: T, v: T, keep: T) -> T:
    """A row of nothing but the lowest number has its number of keys absorbed: each key has a share of 1."""
    x = (q @ k.mT).masked_fill(~keep, low(q))
    return (x - x.logsumexp(-1, keepdim=True)).exp() @ v


def along_the_rows(q: T, k: T, v: T, keep: T) -> T:
    x = q @ k.mT
    return torch.exp(x - x.logsumexp(-2, keepdim=True)) @ v


def two_blocks(q: T, k: T, v: T, keep: T) -> T:
    """A softmax that is put together of two parts of the keys."""
    first, second = (q @ part.mT for part in k.split([5, S - 5], -2))
    top = torch.maximum(first.amax(-1, keepdim=True), second.amax(-1, keepdim=True))
    shares = (first - top).exp(), (second - top).exp()
    weighted = sum(share @ part for share, part in zip(shares, v.split([5, S - 5], -2), strict=True))
    return weighted / (shares[0].sum(-1, keepdim=True) + shares[1].sum(-1, keepdim=True))


def in_place_of_what_is_read(q: T, k: T, v: T, keep: T) -> T:
    x = q @ k.mT
    rows = x.view(-1, S)
    x.exp_()
    x.div_(x.sum(-1, keepdim=True))
    return x @ v + rows.sum()


SITES = [plain, detached, floored, unshifted, of_rank_3]


@pytest.mark.parametrize("site", SITES, ids=lambda f: f.__name__)
def test_becomes_a_sink(site: Site) -> None:
    found = assert_recovered(site, inputs())
    assert "sinks=" in found.after[0]
    assert "dead_rows=zero" in found.after[0]


def test_becomes_a_sink_in_bfloat16() -> None:
    assert_recovered(detached, inputs(torch.bfloat16))


def without_its_floor(q: T, k: T, v: T, keep: T) -> T:
    x = (q @ k.mT).masked_fill(~keep, -math.inf)
    top = x.amax(-1, keepdim=True)
    e = (x - top).exp()
    return e / (e.sum(-1, keepdim=True) + (-top).exp()) @ v


def another_number(q: T, k: T, v: T, keep: T) -> T:
    e = (q @ k.mT).exp()
    return e / (e.sum(-1, keepdim=True) + 1e-6) @ v


def another_shift(q: T, k: T, v: T, keep: T) -> T:
    x = q @ k.mT
    e = (x - x.amax(-1, keepdim=True)).exp()
    return e / (e.sum(-1, keepdim=True) + (-x.amin(-1, keepdim=True)).exp()) @ v


def not_shifted(q: T, k: T, v: T, keep: T) -> T:
    """Rows without a live key would be 0/0."""
    e = (q @ k.mT).masked_fill(~keep, low(q)).exp()
    return e / e.sum(-1, keepdim=True) @ v


def of_columns(q: T, k: T, v: T, keep: T) -> T:
    e = (q @ k.mT).exp()
    return e / e.sum(-2, keepdim=True) @ v


def masked_shares(q: T, k: T, v: T, keep: T) -> T:
    e = (q @ k.mT).exp()
    return (e / (e.sum(-1, keepdim=True).clamp(min=1e-9))).to(v.dtype).contiguous() @ v


NEAR_MISSES: dict[Site, str] = {
    without_its_floor: "wanted finite masks",
    another_number: "wanted a softmax as exp(x - max(x)) over its sum",
    another_shift: "wanted a softmax as exp(x - max(x)) over its sum",
    not_shifted: "wanted a softmax as exp(x - max(x)) over its sum",
    of_columns: "wanted a softmax as exp(x - max(x)) over its sum",
    read_twice: "wanted the exponential of a softmax's logarithm alone",
    masked_shares: "wanted a softmax as exp(x - max(x)) over its sum",
    with_its_logsumexp: "wanted scores that only the softmax reads, saw matmul is read by logsumexp, sub",
    shares_of_one: "wanted -inf where scores are masked that their logsumexp is subtracted from",
    two_blocks: "wanted a softmax, which is divided by its sum before the product with V",
    in_place_of_what_is_read: "wanted a softmax that nothing writes into",
}


@pytest.mark.parametrize("site", NEAR_MISSES, ids=lambda f: f.__name__)
def test_near_miss_says_so(site: Site) -> None:
    assert_refused(site, inputs(), NEAR_MISSES[site])
