"""Numbers that Dynamo made symbols, as ``dynamic=True`` does with a module's floats: norms and attention."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from support.numerics import assert_closer
from support.rewriting import rewriting

F = Callable[..., torch.Tensor]


def rms_norm(x: torch.Tensor, w: torch.Tensor, eps: float) -> torch.Tensor:
    return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + eps) * w


def layer_norm(x: torch.Tensor, w: torch.Tensor, eps: float) -> torch.Tensor:
    centred = x - x.mean(-1, keepdim=True)
    return w * (centred / torch.sqrt(centred.pow(2).mean(-1, keepdim=True) + eps)) + 1


def offset_weight(x: torch.Tensor, w: torch.Tensor, offset: float) -> torch.Tensor:
    return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-5) * (offset + w)


@pytest.mark.parametrize(("norm", "rewrite"), [(rms_norm, "fuse-rms-norm"), (layer_norm, "fuse-layer-norm")])
def test_fires_with_an_eps_that_is_a_symbol(norm: F, rewrite: str) -> None:
    found = rewriting(norm, (rewrite,), dynamic=True)
    x, w = torch.randn(3, 5, 8) * 0.01, torch.rand(8)
    for eps in (1e-5, 1e-2, 0.5):
        exact = norm(x.double(), w.double(), eps)
        assert_closer(exact, found.call(x, w, eps), norm(x, w, eps))
    assert found.graphs == 1, "the number is a guard"
    assert found.applied(rewrite) == 1, found.reasons()


def test_an_offset_that_is_a_symbol_stays_in_the_weight() -> None:
    found = rewriting(offset_weight, ("fuse-rms-norm",), dynamic=True)
    x, w = torch.randn(3, 5, 8), torch.rand(8)
    for offset in (1.5, 0.25):
        exact = offset_weight(x.double(), w.double(), offset)
        assert_closer(exact, found.call(x, w, offset), offset_weight(x, w, offset))
    assert found.graphs == 1


def after(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, scale: float) -> torch.Tensor:
    return torch.softmax(q @ k.mT * scale, -1) @ v


def before(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, scale: float) -> torch.Tensor:
    return torch.softmax((q * scale) @ k.mT, -1) @ v


def divided(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, scale: float) -> torch.Tensor:
    return torch.softmax(q @ k.mT / scale, -1) @ v


def both_sides(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, scale: float) -> torch.Tensor:
    return torch.softmax((q * scale) @ (k * scale).mT / 2.0, -1) @ v


def after_a_mask(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, scale: float) -> torch.Tensor:
    bias = torch.arange(k.shape[-2], dtype=q.dtype) * -0.5
    return torch.softmax((q @ k.mT + bias) * scale, -1) @ v


def product_with_bias(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, scale: float) -> torch.Tensor:
    q, k, v = (t.flatten(0, 1) for t in (q, k, v))
    bias = torch.arange(k.shape[-2], dtype=q.dtype) * -0.5
    scores = torch.baddbmm(bias[None, None, :], q, k.mT, beta=1.0, alpha=scale)
    return torch.softmax(scores, -1) @ v


ATTENTION = [after, before, divided, both_sides, after_a_mask, product_with_bias]


@pytest.mark.parametrize("rows", [7, 96])
@pytest.mark.parametrize("attention", ATTENTION, ids=lambda f: f.__name__)
def test_fires_with_a_scale_that_is_a_symbol(attention: F, rows: int) -> None:
    """With few rows it is computed as written, with more by the kernel."""
    found = rewriting(attention, ("rewrite-attention",), dynamic=True)
    q, k, v = (torch.randn(2, 3, rows, 8) for _ in range(3))
    for scale in (0.3, 2.5, -0.7):
        exact = attention(q.double(), k.double(), v.double(), scale)
        assert_closer(exact, found.call(q, k, v, scale), attention(q, k, v, scale))
    assert found.graphs == 1, "the number is a guard"
    assert found.applied("rewrite-attention") == 1, found.reasons()


@pytest.mark.parametrize("scale", [0.2, -3.0])
def test_adopts_a_kernel_call_with_a_scale_that_is_a_symbol(scale: float) -> None:
    def call(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, scale: float) -> torch.Tensor:
        return torch.nn.functional.scaled_dot_product_attention(q, k, v, scale=scale)

    found = rewriting(call, ("rewrite-attention",), dynamic=True)
    q, k, v = (torch.randn(2, 3, 7, 8) for _ in range(3))
    assert_closer(
        call(q.double(), k.double(), v.double(), scale), found.call(q, k, v, scale), call(q, k, v, scale)
    )
    assert found.applied("rewrite-attention") == 1, found.reasons()


def test_not_a_fill_under_a_scale_of_unknown_sign() -> None:
    """A negative scale would turn the lowest score into the highest."""

    def call(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, m: torch.Tensor, s: float) -> torch.Tensor:
        low = torch.finfo(q.dtype).min / 4
        return torch.softmax((q @ k.mT).masked_fill(m, low) * s, -1) @ v

    found = rewriting(call, ("rewrite-attention",), dynamic=True)
    q, k, v = (torch.randn(2, 3, 7, 8) for _ in range(3))
    mask = torch.rand(7, 7) > 0.7
    for scale in (0.5, -0.5):
        assert torch.equal(found.call(q, k, v, mask, scale), call(q, k, v, mask, scale))
    assert found.applied() == 0
