"""fuse-rms-norm, fuse-add-rms-norm: spellings that fire, near-misses that must not, numerics, gradients."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from support.golden import assert_golden
from support.numerics import assert_closer
from support.rewriting import rewriting

PASSES = ("eliminate-noops", "fuse-rms-norm", "fuse-add-rms-norm")
Norm = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]
EPS = 1e-5


def llama(x: torch.Tensor, w: torch.Tensor) -> torch.Tensor:
    h = x.to(torch.float32)
    h = h * torch.rsqrt(h.pow(2).mean(-1, keepdim=True) + EPS)
    return w * h.to(x.dtype)


def t5(x: torch.Tensor, w: torch.Tensor) -> torch.Tensor:
    variance = x.to(torch.float32).pow(2).mean(-1, keepdim=True)
    h = x * torch.rsqrt(variance + EPS)
    return w * h.to(w.dtype)


def gemma(x: torch.Tensor, w: torch.Tensor) -> torch.Tensor:
    h = x.float()
    h = h * torch.rsqrt(h.pow(2).mean(-1, keepdim=True) + EPS)
    return (h * (1.0 + w.float())).type_as(x)


def olmo(x: torch.Tensor, w: torch.Tensor) -> torch.Tensor:
    h = x.to(torch.float32)
    h = h * torch.rsqrt(h.square().mean(-1, keepdim=True) + EPS)
    return (w * h).to(x.dtype)


def product(x: torch.Tensor, w: torch.Tensor) -> torch.Tensor:
    return torch.rsqrt(EPS + (x * x).mean(dim=-1, keepdim=True)) * x * w


def bare(x: torch.Tensor, w: torch.Tensor) -> torch.Tensor:
    return x * torch.rsqrt((x * x).mean(-1, keepdim=True) + EPS)


def quotient(x: torch.Tensor, w: torch.Tensor) -> torch.Tensor:
    return x / torch.sqrt((x * x).mean(-1, keepdim=True) + EPS) * w


def inverse(x: torch.Tensor, w: torch.Tensor) -> torch.Tensor:
    h = x.float()
    return w * (h * (1.0 / (h.pow(2).mean(-1, keepdim=True) + EPS).sqrt())).to(x.dtype)


def power(x: torch.Tensor, w: torch.Tensor) -> torch.Tensor:
    h = x.float()
    return w * (h * (h.pow(2).mean(-1, keepdim=True) + EPS) ** -0.5).to(x.dtype)


def half_power(x: torch.Tensor, w: torch.Tensor) -> torch.Tensor:
    return x / (EPS + x.square().mean(-1, keepdim=True)) ** 0.5 * w


# The root is spelled without rsqrt: rounded once more or less.
ROOTS: dict[str, Norm] = {f.__name__: f for f in (quotient, inverse, power, half_power)}
SPELLINGS: dict[str, Norm] = {f.__name__: f for f in (llama, t5, gemma, olmo, product, bare)}


def inputs(dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
    return torch.randn(3, 5, 8).to(dtype), torch.rand(8).add(0.5).to(dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", SPELLINGS)
def test_fires_with_the_same_bits(name: str, dtype: torch.dtype) -> None:
    norm = SPELLINGS[name]
    found = rewriting(norm, PASSES)
    x, w = inputs(dtype)
    out = found.call(x, w)
    assert found.applied("fuse-rms-norm") == 1, found.reasons()
    assert torch.equal(out, norm(x, w))
    assert "rsqrt" not in found.after[0]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", ROOTS)
def test_fires_for_other_roots(name: str, dtype: torch.dtype) -> None:
    norm = ROOTS[name]
    found = rewriting(norm, PASSES)
    x, w = torch.randn(64, 5, 96).to(dtype), torch.rand(96).add(0.5).to(dtype)
    out = found.call(x, w)
    assert found.applied("fuse-rms-norm") == 1, found.reasons()
    assert "sqrt" not in found.after[0] and "pow" not in found.after[0]
    assert_closer(product(x.double(), w.double()), out, norm(x, w))


@pytest.mark.parametrize("name", (*SPELLINGS, *ROOTS))
def test_fires_with_the_same_gradients(name: str) -> None:
    norm = {**SPELLINGS, **ROOTS}[name]
    found = rewriting(norm, PASSES)

    def gradients(call: Norm, x: torch.Tensor, w: torch.Tensor) -> list[torch.Tensor]:
        leaves = [x.clone().requires_grad_(), w.clone().requires_grad_()]
        out = call(*leaves)
        (out * torch.linspace(-1, 2, out.numel(), dtype=out.dtype).view_as(out)).sum().backward()
        return [leaf.grad for leaf in leaves if leaf.grad is not None]

    x, w = inputs(torch.float32)
    exact = gradients(bare if norm is bare else _wide(norm), x.double(), w.double())
    assert_closer(exact, gradients(found.call, x, w), gradients(norm, x, w))
    assert found.applied("fuse-rms-norm") == 1


def _wide(norm: Norm) -> Norm:
    """The same function where a cast to float32 would cost the reference its precision."""
    return _gemma_wide if norm is gemma else product


def _gemma_wide(x: torch.Tensor, w: torch.Tensor) -> torch.Tensor:
    return x * torch.rsqrt((x * x).mean(-1, keepdim=True) + EPS) * (1.0 + w)


def test_fires_with_dynamic_shapes() -> None:
    def norm(x: torch.Tensor, w: torch.Tensor) -> torch.Tensor:
        return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-5) * w

    found = rewriting(norm, PASSES, dynamic=True)
    for rows in (3, 6, 11):
        x, w = torch.randn(rows, 2, 8), torch.rand(8)
        assert torch.equal(found.call(x, w), norm(x, w))
    assert found.graphs == 1
    assert found.applied("fuse-rms-norm") == 1


def test_fires_in_autocast() -> None:
    def f(x: torch.Tensor, w: torch.Tensor, m: torch.Tensor) -> torch.Tensor:
        with torch.autocast("cpu", dtype=torch.bfloat16):
            return llama(x @ m, w)

    found = rewriting(f, PASSES)
    x, w = inputs(torch.float32)
    m = torch.randn(8, 8)
    assert torch.equal(found.call(x, w, m), f(x, w, m))
    assert found.applied("fuse-rms-norm") == 1, found.reasons()


def residual(x: torch.Tensor, y: torch.Tensor, w: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    total = x + y
    return llama(total, w), total * 2


def test_fires_with_the_residual_sum() -> None:
    found = rewriting(residual, PASSES)
    x, w = inputs(torch.float32)
    y = torch.randn_like(x)
    assert all(torch.equal(a, b) for a, b in zip(found.call(x, y, w), residual(x, y, w), strict=True))
    assert found.applied("fuse-add-rms-norm") == 1, found.reasons()
    assert_golden(found.before[0], "fuse_rms_norm", "residual_before")
    assert_golden(found.after[0], "fuse_rms_norm", "residual_after")


def early_reader(x: torch.Tensor, y: torch.Tensor, w: torch.Tensor) -> torch.Tensor:
    total = x + y
    return llama(total, w + (total * 2).mean(0).mean(0))


def test_near_miss_sum_that_is_read_before_the_norm() -> None:
    found = rewriting(early_reader, PASSES)
    x, w = inputs(torch.float32)
    assert torch.equal(found.call(x, x, w), early_reader(x, x, w))
    assert found.applied("fuse-add-rms-norm") == 0


def other_dim(x: torch.Tensor, w: torch.Tensor) -> torch.Tensor:
    return x * torch.rsqrt(x.pow(2).mean(-2, keepdim=True) + EPS) * w


def variance(x: torch.Tensor, w: torch.Tensor) -> torch.Tensor:
    return x * torch.rsqrt((x - x.mean(-1, keepdim=True)).pow(2).mean(-1, keepdim=True) + EPS) * w


def cube(x: torch.Tensor, w: torch.Tensor) -> torch.Tensor:
    return x * torch.rsqrt(x.abs().pow(3).mean(-1, keepdim=True) + EPS) * w


def no_eps(x: torch.Tensor, w: torch.Tensor) -> torch.Tensor:
    return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True)) * w


def other_value(x: torch.Tensor, w: torch.Tensor) -> torch.Tensor:
    return (x + 1) * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + EPS) * w


def escaping_scale(x: torch.Tensor, w: torch.Tensor) -> torch.Tensor:
    scale = torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + EPS)
    return x * scale * w + scale


def tensor_eps(x: torch.Tensor, w: torch.Tensor) -> torch.Tensor:
    return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + w[0]) * w


def inverted_quotient(x: torch.Tensor, w: torch.Tensor) -> torch.Tensor:
    return torch.sqrt(x.pow(2).mean(-1, keepdim=True) + EPS) / x * w


def product_with_the_root(x: torch.Tensor, w: torch.Tensor) -> torch.Tensor:
    return x * torch.sqrt(x.pow(2).mean(-1, keepdim=True) + EPS) * w


def escaping_root(x: torch.Tensor, w: torch.Tensor) -> torch.Tensor:
    root = torch.sqrt(x.pow(2).mean(-1, keepdim=True) + EPS)
    return x / root * w + root


def root_of_another(x: torch.Tensor, w: torch.Tensor) -> torch.Tensor:
    return (x + 1) / torch.sqrt(x.pow(2).mean(-1, keepdim=True) + EPS) * w


NEAR_MISSES: dict[str, tuple[Norm, str]] = {
    "other_dim": (other_dim, "last dimension"),
    "variance": (variance, "scales something else"),
    "cube": (cube, "mean of squares"),
    "no_eps": (no_eps, "plus a number"),
    "other_value": (other_value, "scales something else"),
    "escaping_scale": (escaping_scale, "2 readers"),
    "tensor_eps": (tensor_eps, "plus a number"),
    "inverted_quotient": (inverted_quotient, "product with the inverse root"),
    "product_with_the_root": (product_with_the_root, "product with the inverse root"),
    "escaping_root": (escaping_root, "2 readers"),
    "root_of_another": (root_of_another, "scales something else"),
}


@pytest.mark.parametrize("power", [1.5, -1.0, 2.0])
def test_near_miss_power_that_is_no_root(power: float) -> None:
    def norm(x: torch.Tensor, w: torch.Tensor) -> torch.Tensor:
        return x / (x.pow(2).mean(-1, keepdim=True) + EPS) ** power * w

    found = rewriting(norm, PASSES)
    x, w = inputs(torch.float32)
    assert torch.equal(found.call(x, w), norm(x, w))
    assert found.applied("fuse-rms-norm") == 0


@pytest.mark.parametrize("name", NEAR_MISSES)
def test_near_miss(name: str) -> None:
    norm, reason = NEAR_MISSES[name]
    found = rewriting(norm, PASSES)
    x, w = inputs(torch.float32)
    assert torch.equal(found.call(x, w), norm(x, w))
    assert found.applied("fuse-rms-norm") == 0
    assert reason in found.reasons("fuse-rms-norm")


def written_weight(x: torch.Tensor, w: torch.Tensor) -> torch.Tensor:
    w = w.clone()
    scale = torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + EPS)
    y = x.mul(1.5)
    normed = y * torch.rsqrt(y.pow(2).mean(-1, keepdim=True) + EPS)
    y.add_(scale)
    return normed.to(torch.float64).to(torch.float32) * w + y


def test_not_across_a_write_to_the_input() -> None:
    found = rewriting(written_weight, PASSES)
    x, w = inputs(torch.float32)
    assert torch.equal(found.call(x, w), written_weight(x, w))
    assert "written by" in found.reasons("fuse-rms-norm")


def test_a_norm_half_in_no_grad_is_left_alone() -> None:
    def f(x: torch.Tensor, w: torch.Tensor) -> torch.Tensor:
        with torch.no_grad():
            scale = torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + EPS)
        return x * scale * w

    found = rewriting(f, PASSES)
    x, w = inputs(torch.float32)
    leaf = x.clone().requires_grad_()
    found.call(leaf, w).sum().backward()
    other = x.clone().requires_grad_()
    f(other, w).sum().backward()
    assert torch.equal(leaf.grad, other.grad)  # type: ignore[arg-type]
    assert "grad or autocast modes" in found.reasons("fuse-rms-norm")


def test_not_a_cast_that_rounds_on_purpose() -> None:
    """Fake quantization: the result in float8 and back."""

    def norm(x: torch.Tensor, w: torch.Tensor) -> torch.Tensor:
        normed = product(x, w)
        return normed.to(torch.float8_e4m3fn).float()

    found = rewriting(norm, PASSES)
    x, w = inputs(torch.float32)
    assert torch.equal(found.call(x, w), norm(x, w))
    assert "float8" in found.after[0]


def test_two_roundings_stay_two() -> None:
    def norm(x: torch.Tensor, w: torch.Tensor) -> torch.Tensor:
        return product(x, w).bfloat16().float()

    found = rewriting(norm, PASSES)
    x, w = inputs(torch.float32)
    assert torch.equal(found.call(x, w), norm(x, w))
    assert found.applied("fuse-rms-norm") == 1
