"""fxopt::expert_linear: each token meets the weight of its expert, whatever the order of tokens."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from fxopt.ir.ops import register_ops
from fxopt.ir.ops.expert_linear import picked_product
from fxopt.ir.quantize import quantize_parameter
from fxopt.ir.quantized_weight import QuantizedWeight
from fxopt.runtime.quantized_linear import register_processor

E, N, K = 5, 48, 96
LIMITS = {torch.float32: 1e-5, torch.bfloat16: 5e-3, torch.float16: 2e-3}


@pytest.fixture(autouse=True)
def _ops() -> None:
    torch.manual_seed(0)
    register_ops()
    register_processor()


def stack(format: str) -> QuantizedWeight:
    return quantize_parameter(torch.randn(E, N, K), format, transposed=False)


def product(x: torch.Tensor, experts: torch.Tensor, weight: QuantizedWeight, activation: str = "") -> Any:
    kinds = {"format": weight.format.name, "group_size": weight.group_size, "activation": activation}
    parts = (weight.codes, weight.scales, weight.offsets)
    return torch.ops.fxopt.packed_experts(x, experts, *parts, count=E, **kinds)


def exact(x: torch.Tensor, experts: torch.Tensor, weight: QuantizedWeight) -> torch.Tensor:
    dense = weight.dequantize(torch.float64).view(E, N, K)
    rows = [
        dense[each] @ one.double() if 0 <= each < E else torch.zeros(N, dtype=torch.float64)
        for one, each in zip(x, experts.tolist(), strict=True)
    ]
    return torch.stack(rows) if rows else torch.zeros(0, N, dtype=torch.float64)


def distance(a: torch.Tensor, b: torch.Tensor) -> float:
    return float((a.double() - b).norm() / b.norm())


EXPERTS = {
    "mixed": torch.tensor([3, 0, 3, 4, 1, 0, 3, 3, 2]),
    "sorted": torch.tensor([0, 0, 1, 1, 1, 4]),
    "one": torch.tensor([2]),
    "outside": torch.tensor([5, 1, -1, 7, 0], dtype=torch.int32),
}


@pytest.mark.parametrize("dtype", LIMITS)
@pytest.mark.parametrize("case", EXPERTS)
@pytest.mark.parametrize("format", ["int8", "int4", "nf4", "fp4", "fp8_e4m3"])
def test_is_the_product_with_the_rounded_weights(format: str, case: str, dtype: torch.dtype) -> None:
    weight, experts = stack(format), EXPERTS[case]
    x = torch.randn(len(experts), K, dtype=dtype)
    wanted = exact(x, experts, weight)
    found = product(x, experts, weight)
    assert found.dtype is dtype and distance(found, wanted) < LIMITS[dtype]
    picked = picked_product(x, experts, weight, E, "")
    assert picked.dtype is dtype and distance(picked, wanted) < 2 * LIMITS[dtype]


@pytest.mark.parametrize(("format", "activation"), [("int8", "int8"), ("fp8_e4m3", "fp8")])
def test_rounded_tokens(format: str, activation: str) -> None:
    weight, experts, x = stack(format), EXPERTS["mixed"], torch.randn(9, K)
    found = product(x, experts, weight, activation)
    assert 1e-4 < distance(found, exact(x, experts, weight)) < 6e-2
    assert distance(picked_product(x, experts, weight, E, activation), found.double()) < 1e-5


def test_no_tokens() -> None:
    found = product(torch.randn(0, K), torch.zeros(0, dtype=torch.int64), stack("int8"))
    assert found.shape == (0, N)


def test_a_token_meets_no_other_expert() -> None:
    """With the weights of the others infinite."""
    weight, x = stack("int8"), torch.randn(3, K)
    weight.scales[: 2 * N] = weight.scales[3 * N :] = float("inf")
    assert product(x, torch.full((3,), 2), weight).isfinite().all()
    assert not product(x, torch.tensor([2, 1, 2]), weight)[1].isfinite().any()


@pytest.mark.parametrize("format", ["int8", "int4"])
def test_gradients(format: str) -> None:
    weight, experts = stack(format), EXPERTS["outside"]
    x = torch.randn(5, K, requires_grad=True)
    product(x, experts, weight).square().sum().backward()
    again = x.detach().double().requires_grad_()
    exact(again, experts, weight).square().sum().backward()
    assert x.grad is not None and again.grad is not None
    assert distance(x.grad, again.grad) < 1e-5
    assert not x.grad[[0, 2, 3]].any()


def test_opcheck() -> None:
    weight, x = stack("int4"), torch.randn(9, K, requires_grad=True)
    kinds = {"format": "int4", "group_size": weight.group_size, "activation": "", "count": E}
    args = (x, EXPERTS["mixed"], weight.codes, weight.scales, weight.offsets)
    torch.library.opcheck(torch.ops.fxopt.packed_experts.default, args, kinds)
