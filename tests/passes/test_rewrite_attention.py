"""rewrite-attention: spellings of real models fire, look-alikes do not, the answer is eager's."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch.nn.functional import dropout, softmax

from support.attention import B, D, H, S, inputs
from support.golden import assert_golden
from support.numerics import assert_closer
from support.reference import reference_mode
from support.rewriting import rewriting

NAME = "rewrite-attention"
PASSES = ("eliminate-noops", NAME)
Site = Callable[..., Any]


def additive(keep: torch.Tensor, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.where(keep, torch.zeros((), dtype=dtype), torch.finfo(dtype).min)


def llama(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, keep: torch.Tensor) -> torch.Tensor:
    w = torch.matmul(q, k.transpose(2, 3)) * 0.5
    w = w + additive(keep, q.dtype)
    w = softmax(w, dim=-1, dtype=torch.float32).to(q.dtype)
    w = dropout(w, p=0.0, training=False)
    return torch.matmul(w, v).transpose(1, 2).contiguous()


def bert(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, keep: torch.Tensor) -> torch.Tensor:
    w = q @ k.transpose(-1, -2) / 2.0
    return softmax(additive(keep, q.dtype) + w, dim=-1) @ v


def opt(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, keep: torch.Tensor) -> torch.Tensor:
    q, k, v = ((t * f).reshape(B * H, -1, D) for t, f in ((q, 0.5), (k, 1.0), (v, 1.0)))
    w = torch.bmm(q, k.mT).view(B, H, S, S) + additive(keep, q.dtype)
    return torch.bmm(softmax(w.view(B * H, S, S), dim=-1), v).view(B, H, S, D)


def t5(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, keep: torch.Tensor) -> torch.Tensor:
    scores = torch.matmul(q, k.transpose(3, 2)) * 1.0
    scores = scores + additive(keep, q.dtype)
    w = softmax(scores.float(), dim=-1).type_as(scores)
    return torch.matmul(w, v)


def filled(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, keep: torch.Tensor) -> torch.Tensor:
    w = (q @ k.permute(0, 1, 3, 2)) * 0.5
    return softmax(w.masked_fill(~keep, torch.finfo(q.dtype).min), dim=-1) @ v


def where(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, keep: torch.Tensor) -> torch.Tensor:
    w = torch.where(keep, (q * 0.5) @ k.mT, torch.finfo(q.dtype).min)
    return softmax(w, dim=3) @ v


def bloom(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, keep: torch.Tensor) -> torch.Tensor:
    slopes = torch.arange(S, dtype=q.dtype).mul(0.1).view(1, 1, S).expand(B * H, 1, S)
    flat = [t.reshape(B * H, S, D) for t in (q, k, v)]
    w = slopes.baddbmm(flat[0], flat[1].transpose(1, 2), beta=1.0, alpha=0.5).view(B, H, S, S)
    w = softmax(w + additive(keep, q.dtype), dim=-1, dtype=torch.float32).to(q.dtype)
    return torch.bmm(w.view(B * H, S, S), flat[2]).view(B, H, S, D)


def scaled_after_mask(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, keep: torch.Tensor) -> torch.Tensor:
    bias = torch.arange(S, dtype=q.dtype) * 0.3
    return softmax((q @ k.mT + bias) / 2.0, dim=-1) @ v


def unmasked(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, keep: torch.Tensor) -> torch.Tensor:
    return softmax(q @ k.mT, -1) @ v


SPELLINGS: dict[str, Site] = {
    f.__name__: f for f in (llama, bert, opt, t5, filled, where, bloom, scaled_after_mask, unmasked)
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", SPELLINGS)
def test_fires(name: str, dtype: torch.dtype) -> None:
    site = SPELLINGS[name]
    found = rewriting(site, PASSES)
    q, k, v, keep = inputs(dtype)
    out = found.call(q, k, v, keep)
    assert found.applied(NAME) == 1, found.reasons(NAME)
    assert "softmax" not in found.after[0]
    with reference_mode():
        exact = site(q.double(), k.double(), v.double(), keep)
    assert_closer(exact, out, site(q, k, v, keep), strides=False)


@pytest.mark.parametrize("name", SPELLINGS)
def test_fires_with_eagers_gradients(name: str) -> None:
    site = SPELLINGS[name]
    found = rewriting(site, PASSES)
    q, k, v, keep = inputs()

    def gradients(call: Site, *tensors: torch.Tensor) -> list[torch.Tensor]:
        leaves = [t.detach().clone().requires_grad_() for t in tensors]
        out = call(*leaves, keep)
        (out * torch.linspace(-1, 1, out.numel(), dtype=out.dtype).view(out.shape)).sum().backward()
        return [leaf.grad for leaf in leaves if leaf.grad is not None]

    with reference_mode():
        exact = gradients(site, q.double(), k.double(), v.double())
    assert_closer(exact, gradients(found.call, q, k, v), gradients(site, q, k, v), strides=False)
    assert found.applied(NAME) == 1, found.reasons(NAME)


@pytest.mark.parametrize(("rows", "columns", "depth"), [(9, 9, 4), (1, 17, 8), (80, 90, 24), (70, 64, 5)])
def test_fires_for_small_and_large_sizes(rows: int, columns: int, depth: int) -> None:
    """Both providers: product-softmax-product below the threshold, the flash kernel above."""
    found = rewriting(llama, PASSES)
    q, k, v = (
        torch.randn(2, 3, rows, depth),
        torch.randn(2, 3, columns, depth),
        torch.randn(2, 3, columns, depth),
    )
    keep = torch.rand(2, 1, rows, columns) > 0.3
    out = found.call(q, k, v, keep)
    with reference_mode():
        exact = llama(q.double(), k.double(), v.double(), keep)
    assert_closer(exact, out, llama(q, k, v, keep), strides=False)
    wanted = "sdpa" if rows * columns >= 64 * 64 else "decomposed"
    assert all(wanted in provider for provider in found.providers), found.providers


def test_fires_with_dynamic_shapes() -> None:
    def site(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, keep: torch.Tensor) -> torch.Tensor:
        w = torch.matmul(q, k.transpose(2, 3)) * 0.5 + torch.where(keep, 0.0, -3e38)
        return torch.matmul(softmax(w, dim=-1), v)

    found = rewriting(site, PASSES, dynamic=True)
    for size in (5, 8, 13):
        q, k, v = (torch.randn(2, 3, size, 4) for _ in range(3))
        keep = torch.ones(size, size, dtype=torch.bool).tril()
        assert_closer(
            site(q.double(), k.double(), v.double(), keep), found.call(q, k, v, keep), site(q, k, v, keep)
        )
    assert found.graphs == 1
    assert found.applied(NAME) == 1, found.reasons(NAME)


def test_fires_in_autocast() -> None:
    def site(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, keep: torch.Tensor) -> torch.Tensor:
        with torch.autocast("cpu", dtype=torch.bfloat16):
            w = torch.matmul(q, k.mT) * 0.5 + additive(keep)
            return torch.matmul(softmax(w, dim=-1), v)

    found = rewriting(site, PASSES)
    q, k, v, keep = inputs()
    out = found.call(q, k, v, keep)
    assert found.applied(NAME) == 1, found.reasons(NAME)
    assert_closer(bert(q.double(), k.double(), v.double(), keep), out, site(q, k, v, keep), strides=False)


def test_fires_with_dropout_of_the_same_random_numbers() -> None:
    def site(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, keep: torch.Tensor) -> torch.Tensor:
        w = softmax(torch.matmul(q, k.mT) * 0.5 + additive(keep), dim=-1)
        return torch.matmul(dropout(w, 0.3, True), v)

    found = rewriting(site, PASSES)
    args = inputs()
    torch.manual_seed(5)
    wanted = site(*args)
    torch.manual_seed(5)
    assert torch.allclose(found.call(*args), wanted)
    assert found.applied(NAME) == 1
    assert found.after[0].count("dropout") == 0


def test_a_learned_bias_keeps_its_gradient() -> None:
    table = torch.nn.Parameter(torch.randn(1, H, S, S))

    def site(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        return torch.matmul(softmax(torch.matmul(q, k.mT) + table * 1.5, dim=-1), v)

    found = rewriting(site, PASSES)
    q, k, v, _ = inputs()
    found.call(q, k, v).pow(2).sum().backward()
    mine, table.grad = table.grad, None
    site(q, k, v).pow(2).sum().backward()
    assert found.applied(NAME) == 1, found.reasons(NAME)
    assert torch.allclose(mine, table.grad, atol=1e-6)  # type: ignore[arg-type]


def test_adopts_scaled_dot_product_attention() -> None:
    def site(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, keep: torch.Tensor) -> torch.Tensor:
        return torch.nn.functional.scaled_dot_product_attention(q, k, v, keep, scale=0.5)

    found = rewriting(site, PASSES)
    args = inputs()
    assert torch.equal(found.call(*args), site(*args))
    assert found.applied(NAME) == 1


def test_fires_golden() -> None:
    found = rewriting(llama, PASSES)
    found.call(*inputs())
    assert_golden(found.before[0], "rewrite_attention", "llama_before")
    assert_golden(found.after[0], "rewrite_attention", "llama_after")


def other_dim(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, keep: torch.Tensor) -> torch.Tensor:
    return softmax(q @ k.mT, dim=-2) @ v


def escaping(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, keep: torch.Tensor) -> Any:
    w = softmax(q @ k.mT, dim=-1)
    return w @ v, w


def scores_read_twice(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, keep: torch.Tensor) -> Any:
    s = q @ k.mT
    return softmax(s * 0.5, dim=-1) @ v, s.sum()


def two_values(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, keep: torch.Tensor) -> torch.Tensor:
    w = softmax(q @ k.mT, dim=-1)
    return w @ v + w @ (v * 2)


def infinite_fill(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, keep: torch.Tensor) -> torch.Tensor:
    return softmax((q @ k.mT).masked_fill(~keep, float("-inf")), dim=-1).nan_to_num(1.0) @ v


def written_value(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, keep: torch.Tensor) -> torch.Tensor:
    k = k * 1.5
    s = q @ k.mT
    k.zero_()
    return softmax(s, dim=-1) @ (v + k)


def in_place_scores(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, keep: torch.Tensor) -> torch.Tensor:
    s = q @ k.mT
    s += additive(keep)
    return softmax(s, dim=-1) @ v


def wrong_side(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, keep: torch.Tensor) -> torch.Tensor:
    return v.mT @ softmax(q @ k.mT, dim=-1)


NEAR_MISSES: dict[str, tuple[Site, str]] = {
    "other_dim": (other_dim, "last dimension"),
    "escaping": (escaping, "only the product with V reads"),
    "scores_read_twice": (scores_read_twice, "only the softmax reads"),
    "two_values": (two_values, "only the product with V reads"),
    "nan_to_num": (infinite_fill, "nan_to_num"),
    "written_value": (written_value, "written by"),
    "in_place_scores": (in_place_scores, "add_"),
    "wrong_side": (wrong_side, "a product with V over the last dimension of the probabilities"),
}


@pytest.mark.parametrize("name", NEAR_MISSES)
def test_near_miss(name: str) -> None:
    site, reason = NEAR_MISSES[name]
    found = rewriting(site, PASSES)
    args = inputs()
    out, wanted = found.call(*args), site(*args)
    if isinstance(out, torch.Tensor):
        out, wanted = (out,), (wanted,)
    assert all(torch.equal(a.nan_to_num(7), b.nan_to_num(7)) for a, b in zip(out, wanted, strict=True))
    assert found.applied(NAME) == 0
    assert reason in found.reasons(NAME)
