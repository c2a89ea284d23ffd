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


def read_twice(q: T, k: T, v: T, keep: T) -> T:
    logs = (q @ k.mT).log_softmax(-1)
    return logs.exp() @ v + logs.sum()


def test_the_exponential_of_logarithms() -> None:
    assert_recovered(of_logarithms, inputs())


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
}


@pytest.mark.parametrize("site", NEAR_MISSES, ids=lambda f: f.__name__)
def test_near_miss_says_so(site: Site) -> None:
    assert_refused(site, inputs(), NEAR_MISSES[site])
