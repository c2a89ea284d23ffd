"""fxopt::packed_linear: every way to compute it against float64, gradients, shapes, no kernel."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from fxopt.ir.ops import register_ops
from fxopt.ir.ops.packed_linear import packed_linear as plain
from fxopt.ir.ops.packed_linear import packed_linear_backward as plain_backward
from fxopt.ir.ops.packed_linear import round_tokens
from fxopt.ir.quantize import quantize
from fxopt.ir.quantized_weight import QuantizedWeight
from fxopt.ir.weight_formats import FORMATS
from fxopt.runtime import quantized_linear
from fxopt.runtime.quantized_linear import register_processor

WEIGHTS = [
    ("int8", 0), ("int8", 64), ("fp8_e4m3", 0), ("int4", 32), ("int4", 0), ("nf4", 64), ("fp4", 64),
    ("fp4_e2m1", 16),
]  # fmt: skip
# Relative error in the norm against float64, of the weight as it is stored.
LIMITS = {torch.float32: 1e-5, torch.bfloat16: 5e-3, torch.float16: 2e-3}
SHAPES = [(48, 96), (37, 100), (16, 512), (6, 33)]


@pytest.fixture(autouse=True)
def _registered() -> None:
    register_ops()
    register_processor()


def made(shape: tuple[int, int], name: str, group: int) -> QuantizedWeight:
    return quantize(torch.randn(shape) * 0.05, name, group)


def call(x: torch.Tensor, weight: QuantizedWeight, bias: Any = None, activation: str = "") -> torch.Tensor:
    parts = (weight.codes, weight.scales, weight.offsets, weight.columns)
    kinds = {"format": weight.format.name, "group_size": weight.group_size, "activation": activation}
    out: torch.Tensor = torch.ops.fxopt.packed_linear(x, *parts, bias, **kinds)
    return out


def relative(candidate: torch.Tensor, exact: torch.Tensor) -> float:
    return float((candidate.double() - exact).norm() / exact.norm())


def exact(x: torch.Tensor, weight: QuantizedWeight, bias: torch.Tensor | None = None) -> torch.Tensor:
    out = x.double() @ weight.dequantize(torch.float64).T
    return out if bias is None else out + bias.double()


@pytest.mark.parametrize("dtype", LIMITS)
@pytest.mark.parametrize(("name", "group"), WEIGHTS)
def test_matches_float64_at_every_number_of_tokens(
    name: str, group: int, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(quantized_linear.Shortcut, "allow", lambda *_: None)  # the boundaries are not kept
    for shape in (*SHAPES, (150, 300)):
        weight = made(shape, name, group)
        bias = torch.randn(shape[0]).to(dtype)
        for boundary, in_panels in ((0, False), (0, True), (1000, True)):
            monkeypatch.setattr(quantized_linear, "many_from", lambda *_, at=boundary: at)
            monkeypatch.setattr(quantized_linear, "panels_are_faster", lambda *_, so=in_panels: so)
            for added in (None, bias):
                pairs = []
                for tokens in (1, 2, 3, 4, 7, 9, 14, 26, 40, 57, 81):
                    x = torch.randn(tokens, shape[1]).to(dtype)
                    found = call(x, weight, added)
                    assert found.dtype is dtype
                    pairs.append((found, exact(x, weight, added)))
                    # A norm of six numbers is too few for the limit itself.
                    assert relative(*pairs[-1]) <= 2 * LIMITS[dtype], (shape, boundary, tokens)
                together = [torch.cat(parts) for parts in zip(*pairs, strict=True)]
                assert relative(*together) <= LIMITS[dtype], (shape, boundary)


@pytest.mark.parametrize("dtype", LIMITS)
@pytest.mark.parametrize(("name", "storage"), [("int8", torch.int8), ("fp8_e4m3", torch.float8_e4m3fn)])
@pytest.mark.parametrize("way", [quantized_linear.codes_in_registers, quantized_linear.panels])
def test_every_code_of_8_bits(way: Any, name: str, storage: torch.dtype, dtype: torch.dtype) -> None:
    """Subnormal numbers and NaN, too: one code in each row, multiplied by 1."""
    if quantized_linear.native() is None:
        pytest.skip("the functions are not for this processor")
    columns = 40
    codes = torch.zeros(256, columns, dtype=torch.uint8)
    place = torch.arange(256) % columns
    codes[torch.arange(256), place] = torch.arange(256, dtype=torch.uint8)
    weight = QuantizedWeight(FORMATS[name], columns, columns, codes.view(storage), torch.ones(256, 1))
    x = torch.eye(columns, dtype=dtype)
    out = torch.empty(columns, 256, dtype=dtype)
    way(x, weight, None, out)
    wanted = torch.arange(256, dtype=torch.uint8).view(storage).to(dtype)
    torch.testing.assert_close(out[place, torch.arange(256)], wanted, rtol=0, atol=0, equal_nan=True)


def test_compiled_code_is_used_where_it_is_said_to_be() -> None:
    """On the processors that it is written for; elsewhere the tests above ran without it."""
    assert (quantized_linear.native() is not None) == torch.cpu._is_vnni_supported()


@pytest.mark.parametrize("dtype", LIMITS)
@pytest.mark.parametrize("tokens", [1, 2, 3, 4, 5, 6, 7, 9, 40, 41, 43, 127, 128])
@pytest.mark.parametrize("shape", [*SHAPES, (150, 300)])
@pytest.mark.parametrize("by_torch", [False, True])
def test_sums_of_integers_are_exact(
    shape: tuple[int, int], tokens: int, dtype: torch.dtype, by_torch: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Scales are powers of two, so that every number up to the result is exact in float32."""
    monkeypatch.setattr(quantized_linear, "int_mm_is_faster", lambda: by_torch)
    codes = torch.randint(-127, 128, shape, dtype=torch.int8)
    scales = 2.0 ** torch.randint(-9, -3, (shape[0], 1)).float()
    weight = QuantizedWeight.from_codes("int8", codes, scales)
    wanted = torch.randint(-127, 128, (tokens, shape[1])).float()
    wanted[:, 0] = 127
    power = 2.0 ** torch.randint(-5, 3, (tokens, 1)).float()
    found = call((wanted * power).to(dtype), weight, None, "int8")
    sums = wanted.double() @ codes.double().T
    assert sums.abs().max() < 2**24
    assert torch.equal(found, (sums * power.double() * scales.double().T).to(dtype))


@pytest.mark.parametrize("activation", ["int8", "fp8"])
@pytest.mark.parametrize(("name", "group"), WEIGHTS)
def test_rounded_activations(name: str, group: int, activation: str) -> None:
    weight, bias = made((37, 100), name, group), torch.randn(37)
    for tokens in (1, 5, 130):
        x = torch.randn(tokens, 100)
        codes, scale = round_tokens(x, activation)
        wanted = exact(codes.double() * scale.double(), weight, bias)
        assert relative(call(x, weight, bias, activation), wanted) < 1e-5
        assert relative(call(x.bfloat16(), weight, bias, activation), wanted) < 2e-2


@pytest.mark.parametrize("activation", ["", "int8"])
def test_zero_tokens_and_infinities_and_nan(activation: str) -> None:
    weight = made((20, 64), "int8", 0)
    x = torch.randn(5, 64)
    x[0], x[2, 3], x[3, 4] = 0, float("nan"), float("inf")
    found = call(x, weight, None, activation)
    assert not found[0].any()
    assert found[[1, 4]].isfinite().all()
    assert found[2].isnan().all()
    assert not found[3].isfinite().any()


@pytest.mark.parametrize("shape", [(64,), (1, 64), (0, 64), (2, 3, 64), (2, 0, 64), (2, 1, 5, 64)])
@pytest.mark.parametrize("activation", ["", "int8"])
def test_shapes(shape: tuple[int, ...], activation: str) -> None:
    weight = made((20, 64), "int8", 0)
    x = torch.randn(shape)
    found = call(x, weight, torch.ones(20), activation)
    assert found.shape == (*shape[:-1], 20)
    assert found.is_contiguous()
    with torch.device("meta"):
        faked = torch.empty(shape)
    parts = [each.to("meta") for each in (weight.codes, weight.scales)]
    kinds = {"format": "int8", "group_size": 64, "activation": activation}
    assert torch.ops.fxopt.packed_linear(faked, *parts, None, None, None, **kinds).shape == found.shape


def test_strided_activations() -> None:
    weight = made((20, 64), "nf4", 64)
    x = torch.randn(64, 6).t()
    wide = torch.randn(6, 128)[:, ::2]
    for each in (x, wide):
        assert relative(call(each, weight), exact(each, weight)) < 1e-5


@pytest.mark.parametrize("name", ["int4", "int8"])
def test_columns_in_another_order(name: str) -> None:
    order = torch.randperm(96)
    weight = made((20, 96), name, 32).replaced(columns=order)
    x = torch.randn(3, 96)
    assert relative(call(x, weight), exact(x, weight)) < 1e-5
    assert relative(call(x, weight, None, "int8"), exact(x, weight)) < 2e-2


def test_an_op_of_its_own_without_gradients() -> None:
    weight, x = made((20, 64), "int4", 32), torch.randn(3, 64)
    parts = (weight.codes, weight.scales, weight.offsets, None, None)
    kinds = {"format": "int4", "group_size": 32, "activation": ""}
    assert torch.equal(torch.ops.fxopt.packed_product(x, *parts, **kinds), call(x, weight))
    tests = ("test_schema", "test_faketensor", "test_aot_dispatch_dynamic")
    torch.library.opcheck(torch.ops.fxopt.packed_product.default, (x, *parts), kinds, test_utils=tests)
    trained = x.requires_grad_()
    assert torch.ops.fxopt.qlinear(trained, *parts, **kinds).requires_grad
    with torch.no_grad():
        assert not torch.ops.fxopt.qlinear(trained, *parts, **kinds).requires_grad


@pytest.mark.parametrize("activation", ["", "int8"])
@pytest.mark.parametrize(("name", "group"), WEIGHTS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_gradients(name: str, group: int, activation: str, dtype: torch.dtype) -> None:
    weight = made((37, 96), name, group)
    if name == "int8":
        weight = weight.replaced(columns=torch.randperm(96))
    x = torch.randn(2, 5, 96).to(dtype).requires_grad_()
    bias = torch.randn(37).to(dtype).requires_grad_()
    out = call(x, weight, bias, activation)
    grad = torch.randn_like(out)
    out.backward(grad)
    assert x.grad is not None and bias.grad is not None
    assert x.grad.dtype is dtype and bias.grad.dtype is dtype
    assert relative(x.grad, grad.double() @ weight.dequantize(torch.float64)) < LIMITS[dtype]
    assert relative(bias.grad, grad.double().sum((0, 1))) < LIMITS[dtype]


@pytest.mark.parametrize(("name", "group"), WEIGHTS)
def test_plain_torch_says_the_same(name: str, group: int) -> None:
    """What runs on other devices, and where there is no compiler."""
    weight = made((37, 96), name, group)
    parts = (weight.codes, weight.scales, weight.offsets, weight.columns)
    kinds = {"format": name, "group_size": weight.group_size}
    x, bias = torch.randn(7, 96), torch.randn(37)
    for activation in ("", "int8", "fp8"):
        found = plain(x, *parts, bias, **kinds, activation=activation)
        assert relative(call(x, weight, bias, activation), found.double()) < 1e-5
    grad = torch.randn(7, 37)
    of_x = plain_backward(grad, *parts, **kinds, in_features=96)
    assert relative(of_x, grad.double() @ weight.dequantize(torch.float64)) < 1e-5


def test_falls_back_without_compiled_code(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(quantized_linear, "native", lambda: None)
    weight = made((37, 96), "int4", 32)
    x = torch.randn(3, 96)
    assert relative(call(x, weight), exact(x, weight)) < 1e-5
    assert relative(call(x.double(), weight), exact(x.double(), weight)) < 1e-12


def test_autocast_does_not_act_inside() -> None:
    weight, x = made((20, 64), "int4", 32), torch.randn(3, 64)
    with torch.autocast("cpu", torch.bfloat16):
        found = call(x, weight)
    assert found.dtype is torch.float32
    assert torch.equal(found, call(x, weight))


def test_measures_which_way_is_fastest(monkeypatch: pytest.MonkeyPatch) -> None:
    measured = quantized_linear.many_from.__wrapped__("int4", torch.bfloat16)
    assert measured in (4, 8, 16, 24, 32, 64, 128)
    weight = made((20, 64), "int4", 32)
    few, many = torch.ones(1, 64), torch.ones(500, 64)
    assert quantized_linear.route(weight, few, "") is quantized_linear.codes_in_registers
    monkeypatch.setattr(quantized_linear, "panels_are_faster", lambda *_: True)
    assert quantized_linear.route(weight, many, "") is quantized_linear.panels
    odd = made((20, 64), "int8", 16)
    assert quantized_linear.route(odd, many, "") is quantized_linear.dense
    monkeypatch.setattr(quantized_linear, "panels_are_faster", lambda *_: False)
    assert quantized_linear.route(weight, many, "") is quantized_linear.dense
    eight = made((20, 64), "int8", 0)
    assert quantized_linear.route(eight, few, "int8") is quantized_linear.integers
    quantized_linear.int_mm_is_faster.cache_clear()
    expected = (
        quantized_linear.many_integers if quantized_linear.int_mm_is_faster() else quantized_linear.integers
    )
    assert quantized_linear.route(eight, many, "int8") is expected
    monkeypatch.setattr(quantized_linear, "int_mm_is_faster", lambda: True)
    assert quantized_linear.route(eight, torch.ones(127, 64), "int8") is quantized_linear.integers
    assert quantized_linear.route(eight, torch.ones(128, 64), "int8") is quantized_linear.many_integers


# torch's check adds up all entries of a tensor, which it cannot do for float8.
@pytest.mark.parametrize(("name", "group"), [each for each in WEIGHTS if each[0] != "fp8_e4m3"])
def test_opcheck(name: str, group: int) -> None:
    weight = made((20, 64), name, group)
    parts = (weight.codes, weight.scales, weight.offsets, None, torch.randn(20))
    kinds = {"format": name, "group_size": weight.group_size, "activation": ""}
    x = torch.randn(3, 64, requires_grad=True)
    tests = ("test_schema", "test_faketensor", "test_aot_dispatch_dynamic")
    torch.library.opcheck(torch.ops.fxopt.packed_linear.default, (x, *parts), kinds, test_utils=tests)
