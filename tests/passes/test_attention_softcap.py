"""rewrite-attention: ``c * tanh(s / c)`` between product and masks becomes the op's score program."""

from __future__ import annotations

import pytest
import torch
from torch.nn.functional import softmax

from support.attention import Site, assert_recovered, assert_refused, inputs
from support.golden import assert_golden

T = torch.Tensor


def added(keep: T, dtype: torch.dtype) -> T:
    return torch.where(keep, torch.zeros((), dtype=dtype), torch.finfo(dtype).min)


def gemma2(q: T, k: T, v: T, keep: T) -> T:
    w = torch.matmul(q, k.transpose(2, 3)) * 0.5
    w = w / 3.0
    w = torch.tanh(w)
    w = w * 3.0
    w = softmax(w + added(keep, q.dtype), dim=-1, dtype=torch.float32).to(q.dtype)
    return torch.matmul(w, v)


def commuted(q: T, k: T, v: T, keep: T) -> T:
    w = 3.0 * torch.tanh((1 / 3.0) * (0.5 * (q @ k.mT)))
    return softmax(w.masked_fill(~keep, torch.finfo(w.dtype).min), -1) @ v


def widened(q: T, k: T, v: T, keep: T) -> T:
    w = (torch.tanh((q @ k.mT).float() / 6) * 3).to(q.dtype)
    return softmax(torch.where(keep, w, torch.finfo(w.dtype).min), -1) @ v


def unequal(q: T, k: T, v: T, keep: T) -> T:
    return softmax(torch.tanh(q @ k.mT * 0.7) * 2.5 + added(keep, q.dtype), -1) @ v


def negative(q: T, k: T, v: T, keep: T) -> T:
    return softmax(torch.tanh(q @ k.mT * 0.5) * -3.0 + added(keep, q.dtype), -1) @ v


def bare(q: T, k: T, v: T, keep: T) -> T:
    return softmax(torch.tanh(q @ k.mT) + added(keep, q.dtype), -1) @ v


def in_place(q: T, k: T, v: T, keep: T) -> T:
    w = q @ k.mT
    w.div_(6.0).tanh_()
    return softmax(w * 3.0 + added(keep, q.dtype), -1) @ v


def scaled_query(q: T, k: T, v: T, keep: T) -> T:
    w = torch.tanh((q * 0.5) @ (k * 0.5).mT) * 3.0
    return softmax((w + added(keep, q.dtype)) * 0.5, -1) @ v


PROGRAMS: dict[Site, tuple[str, str]] = {
    gemma2: ("3*tanh(s/3)", "scale=0.5"),
    commuted: ("3*tanh(s/3)", "scale=0.5"),
    widened: ("3*tanh(s/3)", "scale=0.5"),
    unequal: ("2.5*tanh(0.4*s)", "scale=1.75"),
    negative: ("3*tanh(s/3)", "scale=-1.5"),
    bare: ("tanh(s)", "scale=1"),
    in_place: ("3*tanh(s/3)", "scale=0.5"),
    scaled_query: ("1.5*tanh(0.666667*s)", "scale=0.75"),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("site", PROGRAMS, ids=lambda f: f.__name__)
def test_fires(site: Site, dtype: torch.dtype) -> None:
    found = assert_recovered(site, inputs(dtype))
    program, scale = PROGRAMS[site]
    assert f"score={program}" in found.after[0].replace("0.6666666666666666", "0.666667")
    assert scale in found.after[0]
    assert "tanh.default" not in found.after[0]


def test_fires_with_dynamic_shapes() -> None:
    assert_recovered(gemma2, inputs(), dynamic=True)


def test_fires_golden() -> None:
    found = assert_recovered(gemma2, inputs())
    assert_golden(found.before[0], "rewrite_attention", "gemma2_before")
    assert_golden(found.after[0], "rewrite_attention", "gemma2_after")


def over_a_mask(q: T, k: T, v: T, keep: T) -> T:
    return softmax(torch.tanh((q @ k.mT + added(keep, q.dtype)) / 3) * 3, -1) @ v


def over_a_fill(q: T, k: T, v: T, keep: T) -> T:
    return softmax(torch.tanh((q @ k.mT).masked_fill(~keep, torch.finfo(q.dtype).min) / 3) * 3, -1) @ v


def twice(q: T, k: T, v: T, keep: T) -> T:
    return softmax(torch.tanh(torch.tanh(q @ k.mT) * 2) * 3, -1) @ v


def of_a_tensor(q: T, k: T, v: T, keep: T) -> T:
    return softmax(torch.tanh(q @ k.mT) * v.mean(), -1) @ v


def read_elsewhere(q: T, k: T, v: T, keep: T) -> T:
    w = torch.tanh(q @ k.mT)
    return softmax(w * 3, -1) @ v + w.sum()


def another_function(q: T, k: T, v: T, keep: T) -> T:
    return softmax(torch.sigmoid(q @ k.mT) * 3, -1) @ v


NEAR_MISSES: dict[Site, str] = {
    over_a_mask: "a softcap of scores without a mask",
    over_a_fill: "a softcap of scores without a mask",
    twice: "one softcap",
    of_a_tensor: "a softcap of numbers",
    read_elsewhere: "only the softmax reads",
    another_function: "aten.sigmoid.default",
}


@pytest.mark.parametrize("site", NEAR_MISSES, ids=lambda f: f.__name__)
def test_near_miss(site: Site) -> None:
    assert_refused(site, inputs(), NEAR_MISSES[site])
