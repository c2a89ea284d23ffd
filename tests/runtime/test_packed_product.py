"""fxopt::packed_product in C++: the numbers of Python, and Python for all that it does not take."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from fxopt.ir.ops import register_ops
from fxopt.ir.quantize import quantize
from fxopt.ir.quantized_weight import QuantizedWeight
from fxopt.runtime import packed_product, quantized_linear
from fxopt.runtime.packed_product import Shortcut
from fxopt.runtime.quantized_linear import packed_linear_on_processor, register_processor, shortcut

KINDS = [
    ("int8", 0, ""), ("int8", 32, ""), ("int8", 0, "int8"), ("fp8_e4m3", 0, ""), ("int4", 32, ""),
    ("nf4", 64, ""), ("fp4", 64, ""), ("fp4_e2m1", 16, ""),
]  # fmt: skip
N, K = 37, 100


@pytest.fixture(autouse=True)
def _registered() -> None:
    register_ops()
    register_processor()
    if quantized_linear.native() is None:
        pytest.skip("the functions are not for this processor")


def made(name: str, group: int) -> QuantizedWeight:
    return quantize(torch.randn(N, K) * 0.05, name, group)


def operands(
    x: torch.Tensor, weight: QuantizedWeight, bias: Any = None, activation: str = ""
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    kinds = {"format": weight.format.name, "group_size": weight.group_size, "activation": activation}
    return (x, weight.codes, weight.scales, weight.offsets, weight.columns, bias), kinds


def allowed(weight: QuantizedWeight, dtype: torch.dtype, activation: str) -> None:
    """Computed once in Python, and from then on in C++."""
    args, kinds = operands(torch.randn(1, K).to(dtype), weight, None, activation)
    torch.ops.fxopt.packed_product(*args, **kinds)
    assert shortcut().wait()


@pytest.fixture
def in_python(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """One entry for each product whose way is chosen in Python."""
    calls: list[int] = []
    chosen = quantized_linear.route

    def route(weight: QuantizedWeight, tokens: torch.Tensor, activation: str) -> Any:
        calls.append(tokens.shape[0])
        return chosen(weight, tokens, activation)

    monkeypatch.setattr(quantized_linear, "route", route)
    return calls


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("name", "group", "activation"), KINDS)
def test_the_same_numbers(
    name: str, group: int, activation: str, dtype: torch.dtype, in_python: list[int]
) -> None:
    weight = made(name, group)
    allowed(weight, dtype, activation)
    in_cpp = name != "fp4_e2m1"  # groups of 16 codes are widened by torch
    for shape in ((1, K), (3, K), (2, 2, K), (K,)):
        for bias in (None, torch.randn(N).to(dtype), torch.randn(N)):
            args, kinds = operands(torch.randn(shape).to(dtype), weight, bias, activation)
            wanted = packed_linear_on_processor(*args, **kinds)
            in_python.clear()
            with torch.inference_mode():
                found = torch.ops.fxopt.packed_product(*args, **kinds)
            assert torch.equal(found, wanted) and found.dtype is dtype and found.shape == (*shape[:-1], N)
            assert not in_python or not in_cpp


def transposed(x: torch.Tensor) -> torch.Tensor:
    return x.t().contiguous().t()


def none_of_it(x: torch.Tensor) -> torch.Tensor:
    return x[:0]


@pytest.mark.parametrize("change", [transposed, none_of_it, torch.Tensor.double])
def test_other_activations_go_to_python(change: Callable[[torch.Tensor], torch.Tensor]) -> None:
    weight = made("int8", 0)
    allowed(weight, torch.float32, "")
    args, kinds = operands(change(torch.randn(4, K)), weight)
    assert torch.equal(
        torch.ops.fxopt.packed_product(*args, **kinds), packed_linear_on_processor(*args, **kinds)
    )


@pytest.mark.parametrize("group", [16, 32])
def test_many_tokens(group: int, in_python: list[int], monkeypatch: pytest.MonkeyPatch) -> None:
    """Panels are called in C++, too; for groups that they do not have, torch is, from Python."""
    monkeypatch.setattr(quantized_linear, "panels_are_faster", lambda *_: True)
    many = quantized_linear.many_from("int8", torch.bfloat16)
    args, kinds = operands(torch.randn(many, K).bfloat16(), made("int8", group))
    for other in (32, group):
        torch.ops.fxopt.packed_product(
            *operands(args[0], made("int8", other))[0], **kinds | {"group_size": other}
        )
    assert shortcut().wait()
    in_python.clear()
    found = torch.ops.fxopt.packed_product(*args, **kinds)
    assert in_python == ([] if group == 32 else [many])
    assert torch.equal(found, packed_linear_on_processor(*args, **kinds))


def test_columns_in_another_order_go_to_python(in_python: list[int]) -> None:
    weight = made("int4", 32)
    allowed(weight, torch.float32, "")
    (x, codes, scales, offsets, _, bias), kinds = operands(torch.randn(1, K), weight)
    in_python.clear()
    args = (x, codes, scales, offsets, torch.randperm(K), bias)
    found = torch.ops.fxopt.packed_product(*args, **kinds)
    assert in_python == [1]
    assert torch.equal(found, packed_linear_on_processor(*args, **kinds))


def test_scales_of_another_shape_are_pythons_error() -> None:
    weight = made("int8", 0)
    allowed(weight, torch.float32, "")
    (x, codes, scales, *rest), kinds = operands(torch.randn(1, K), weight)
    with pytest.raises(ValueError, match="scales of shape"):
        torch.ops.fxopt.packed_product(x, codes, scales[:5], *rest, **kinds)


def test_autocast_changes_nothing() -> None:
    weight = made("int8", 0)
    allowed(weight, torch.float32, "int8")
    args, kinds = operands(torch.randn(2, K), weight, None, "int8")
    with torch.autocast("cpu", torch.bfloat16):
        found = torch.ops.fxopt.packed_product(*args, **kinds)
    assert found.dtype is torch.float32
    assert torch.equal(found, packed_linear_on_processor(*args, **kinds))


def test_without_a_compiler_products_stay_in_python(monkeypatch: pytest.MonkeyPatch) -> None:
    def none(path: Any) -> Any:
        raise RuntimeError("no compiler")

    monkeypatch.setattr(packed_product, "library_of", none)
    monkeypatch.setattr(Shortcut, "_in_python", lambda self: None)  # the op is taken already
    other = Shortcut(packed_linear_on_processor)
    other.allow(("int8",), packed_product.Kind)
    assert not other.wait()
