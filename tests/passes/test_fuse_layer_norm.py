"""fuse-layer-norm: spelled-out layer norms fire, look-alikes do not, the answer is eager's."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from support.golden import assert_golden
from support.numerics import assert_closer
from support.reference import reference_mode
from support.rewriting import rewriting

NAME = "fuse-layer-norm"
PASSES = ("eliminate-noops", "fuse-rms-norm", NAME)
Norm = Callable[[torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]


def cohere(x: torch.Tensor, w: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    h = x.to(torch.float32)
    mean = h.mean(-1, keepdim=True)
    variance = (h - mean).pow(2).mean(-1, keepdim=True)
    h = (h - mean) * torch.rsqrt(variance + 1e-5)
    return (w.to(torch.float32) * h).to(x.dtype)


def deberta(x: torch.Tensor, w: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    h = x.float()
    mean = h.mean(-1, keepdim=True)
    variance = (h - mean).pow(2).mean(-1, keepdim=True)
    h = (h - mean) / torch.sqrt(variance + 1e-7)
    return w * h.to(x.dtype) + b


def shared_difference(x: torch.Tensor, w: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    d = x - x.mean(dim=-1, keepdim=True)
    return d * torch.rsqrt((d * d).mean(dim=-1, keepdim=True) + 1e-6) * w + b


def library_variance(x: torch.Tensor, w: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    return (x - x.mean(-1, keepdim=True)) / (x.var(-1, unbiased=False, keepdim=True) + 1e-6).sqrt()


SPELLINGS: dict[str, Norm] = {f.__name__: f for f in (cohere, deberta, shared_difference, library_variance)}


def inputs(dtype: torch.dtype = torch.float32) -> list[torch.Tensor]:
    return [t.to(dtype) for t in (torch.randn(3, 5, 8), torch.rand(8) + 0.5, torch.randn(8))]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", SPELLINGS)
def test_fires(name: str, dtype: torch.dtype) -> None:
    norm = SPELLINGS[name]
    found = rewriting(norm, PASSES)
    args = inputs(dtype)
    out = found.call(*args)
    assert found.applied(NAME) == 1, found.reasons()
    assert "sqrt" not in found.after[0]
    with reference_mode():
        exact = norm(*[t.double() for t in args])
    assert_closer(exact, out, norm(*args))


@pytest.mark.parametrize("name", SPELLINGS)
def test_fires_with_eagers_gradients(name: str) -> None:
    norm = SPELLINGS[name]
    found = rewriting(norm, PASSES)

    def gradients(call: Norm, tensors: list[torch.Tensor]) -> list[torch.Tensor]:
        leaves = [t.clone().requires_grad_() for t in tensors]
        out = call(*leaves)
        (out * torch.linspace(-1, 2, out.numel(), dtype=out.dtype).view_as(out).cos()).sum().backward()
        return [leaf.grad for leaf in leaves if leaf.grad is not None]

    args = inputs()
    with reference_mode():
        exact = gradients(norm, [t.double() for t in args])
    assert_closer(exact, gradients(found.call, args), gradients(norm, args))
    assert found.applied(NAME) == 1


def test_fires_with_dynamic_shapes() -> None:
    found = rewriting(shared_difference, PASSES, dynamic=True)
    for rows in (3, 6, 10):
        x, w, b = torch.randn(rows, 8), torch.rand(8), torch.randn(8)
        exact = shared_difference(x.double(), w.double(), b.double())
        assert_closer(exact, found.call(x, w, b), shared_difference(x, w, b))
    assert found.graphs == 1
    assert found.applied(NAME) == 1, found.reasons()


def test_fires_golden() -> None:
    found = rewriting(deberta, PASSES)
    found.call(*inputs())
    assert_golden(found.before[0], "fuse_layer_norm", "deberta_before")
    assert_golden(found.after[0], "fuse_layer_norm", "deberta_after")


def unbiased(x: torch.Tensor, w: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    return (x - x.mean(-1, keepdim=True)) / (x.var(-1, keepdim=True) + 1e-6).sqrt()


def eps_outside(x: torch.Tensor, w: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    return (x - x.mean(-1, keepdim=True)) / (x.var(-1, unbiased=False, keepdim=True).sqrt() + 1e-6)


def other_dim(x: torch.Tensor, w: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    return (x - x.mean(1, keepdim=True)) / (x.var(1, unbiased=False, keepdim=True) + 1e-6).sqrt()


def other_mean(x: torch.Tensor, w: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    return (x - w.mean(-1, keepdim=True)) / (x.var(-1, unbiased=False, keepdim=True) + 1e-6).sqrt()


def statistics_escape(x: torch.Tensor, w: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    root = (x.var(-1, unbiased=False, keepdim=True) + 1e-6).sqrt()
    return (x - x.mean(-1, keepdim=True)) / root + root


def rms(x: torch.Tensor, w: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-6) * w + b


@pytest.mark.parametrize("norm", [unbiased, eps_outside, other_dim, other_mean, statistics_escape, rms])
def test_near_miss(norm: Norm) -> None:
    found = rewriting(norm, PASSES)
    args = inputs()
    assert torch.equal(found.call(*args), norm(*args))
    assert found.applied(NAME) == 0


def test_near_miss_reasons() -> None:
    for norm, reason in ((unbiased, "unbiased"), (other_dim, "last dimension"), (other_mean, "mean(x)")):
        found = rewriting(norm, PASSES)
        found.call(*inputs())
        assert reason in found.reasons(NAME)


def test_not_across_a_write_to_the_input() -> None:
    def f(x: torch.Tensor, w: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
        y = x * 2
        d = y - y.mean(-1, keepdim=True)
        y.zero_()
        return d / ((d * d).mean(-1, keepdim=True) + 1e-6).sqrt() + y

    found = rewriting(f, PASSES)
    args = inputs()
    # Without the mean it is a root-mean-square norm of what is left.
    assert_closer(f(*(each.double() for each in args)), found.call(*args), f(*args))
    assert found.applied(NAME) == 0
    assert "written by" in found.reasons(NAME)
