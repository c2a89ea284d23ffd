"""fxopt::outlier_linear: features with a large entry keep their precision, and no number is read."""

from __future__ import annotations

import pytest
import torch

from fxopt.ir.ops import register_ops
from fxopt.ir.ops.outlier_linear import outlier_linear
from fxopt.ir.quantize import quantize
from fxopt.runtime.quantized_linear import register_processor

N, K = 32, 64
WEIGHT = quantize(torch.randn(N, K, generator=torch.Generator().manual_seed(0)) * 0.05, "int8")
DENSE = WEIGHT.dequantize(torch.float64)


@pytest.fixture(autouse=True)
def _registered() -> None:
    register_ops()
    register_processor()


def given(tokens: int, large: tuple[int, ...], dtype: torch.dtype = torch.float32) -> torch.Tensor:
    x = torch.randn(tokens, K, generator=torch.Generator().manual_seed(1)).clamp(-3, 3)
    for place, column in enumerate(large):
        x[place % tokens, column] = 60.0 * (-1) ** place
    return x.to(dtype)


def call(x: torch.Tensor, bias: torch.Tensor | None = None, threshold: float = 6.0) -> torch.Tensor:
    out: torch.Tensor = torch.ops.fxopt.outlier_linear(
        x, WEIGHT.codes, WEIGHT.scales, bias, threshold=threshold
    )
    return out


def error(found: torch.Tensor, exact: torch.Tensor) -> float:
    return float((found.double() - exact).norm() / exact.norm())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("tokens", [1, 5])
@pytest.mark.parametrize("large", [(), (3,), (3, 40, 41)])
def test_large_features_cost_the_others_nothing(
    tokens: int, large: tuple[int, ...], dtype: torch.dtype
) -> None:
    x, bias = given(tokens, large, dtype), torch.randn(N).to(dtype)
    exact = x.double() @ DENSE.T + bias.double()
    assert error(call(x, bias), exact) <= 1e-2
    if large:
        # Without the threshold one scale serves 60 and 0.1: the small entries are lost.
        small = x.double().masked_fill((x.abs() >= 6).any(0), 0)
        lost = call(x, bias, threshold=1e9).double() - exact
        kept = call(x, bias).double() - exact
        assert kept.norm() < lost.norm() / 3, small.norm()


def test_devices_get_the_same_without_reading_a_number() -> None:
    """There, both products are of all features: followed on tensors that have no numbers to be read."""
    x = given(4, (3, 40))
    apart = (x.abs() >= 6).any(0)
    masked = outlier_linear(x.masked_fill(apart, 0), WEIGHT.codes, WEIGHT.scales, None, threshold=6.0)
    rest = x.masked_fill(~apart, 0).double() @ DENSE.T
    torch.testing.assert_close(call(x).double(), masked.double() + rest, rtol=1e-5, atol=1e-5)
    meta = [each.to("meta") for each in (x, WEIGHT.codes, WEIGHT.scales)]
    assert outlier_linear(*meta, None, threshold=6.0).shape == (4, N)


def test_gradients_are_those_of_the_product() -> None:
    x = given(4, (3,)).requires_grad_()
    bias = torch.randn(N, requires_grad=True)
    upstream = torch.randn(4, N)
    call(x, bias).backward(upstream)
    torch.testing.assert_close(x.grad, (upstream.double() @ DENSE).float(), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(bias.grad, upstream.sum(0))


def test_no_tokens() -> None:
    assert call(torch.empty(0, K)).shape == (0, N)
