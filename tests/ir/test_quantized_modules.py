"""Linear modules of other libraries, as far as their attributes go: what is read, and what is refused."""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn

from fxopt.ir.sources import CannotConvert
from fxopt.ir.sources.modules import Layer, read_module
from fxopt.ir.weight_formats import FORMATS
from support.packed_layouts import codes_of, for_cpu_4bit, in_bytes, in_halves, in_words, scales_of
from support.typed_weights import int8_weight, layer_of

N, K, G = 64, 128, 32
AWQ = (0, 2, 4, 6, 1, 3, 5, 7)


def module_of(kind: str, base: type[nn.Module] = nn.Module, **attributes: Any) -> Any:
    """A module of a class of this name."""
    made: Any = type(kind, (base,), {}).__new__(type(kind, (base,), {}))
    nn.Module.__init__(made)
    for name, value in {"in_features": K, "out_features": N, "bias": None, **attributes}.items():
        object.__setattr__(made, name, value)
    return made


def bytes_of() -> torch.Tensor:
    return (codes_of(N, K, 8).int() - 128).to(torch.int8)


def spread(table: torch.Tensor) -> torch.Tensor:
    return table.double().repeat_interleave(K // table.shape[1], 1)


def linear_8bit(called: bool = False, **state: Any) -> tuple[Any, torch.Tensor]:
    codes, absmax = bytes_of(), scales_of(N)
    held = {"CB": codes, "SCB": absmax}
    none = {"CB": None, "SCB": None}
    own = {"threshold": 6.0, "has_fp16_weights": False, **(held if called else none), **state}
    weight = SimpleNamespace(**(none if called else held))
    module = module_of("Linear8bitLt", weight=weight, state=SimpleNamespace(**own))
    return module, codes.double() * absmax.double()[:, None] / 127


def linear_4bit(nested: bool = False, for_cpu: bool = False, **state: Any) -> tuple[Any, torch.Tensor]:
    codes, blocks = codes_of(N, K), N * K // 64
    absmax = scales_of(blocks)
    packed = in_bytes(codes, high_first=True)[: N * K // 2, None]
    own: dict[str, Any] = {"absmax": absmax, "quant_type": "nf4", "blocksize": 64, "nested": nested}
    if nested:
        inner = codes_of(1, blocks, 8)[0]
        table, outer = torch.linspace(-1, 1, 256), scales_of(1)
        state2 = SimpleNamespace(code=table, absmax=outer, blocksize=256)
        own |= {"absmax": inner, "state2": state2, "offset": torch.tensor(0.5)}
        absmax = table[inner.long()] * outer + 0.5
    if for_cpu:
        absmax = absmax.bfloat16()
        packed = for_cpu_4bit(codes)
        own |= {"absmax": absmax.view(N, -1).t().contiguous(), "packing_format_for_cpu": True}
    weight = packed.clone()
    weight.quant_state = SimpleNamespace(shape=(N, K), **{**own, **state})  # type: ignore[attr-defined]
    module = module_of("Linear4bit", weight=weight, compute_dtype=torch.bfloat16, compute_type_is_set=True)
    return module, FORMATS["nf4"].table.double()[codes.long()] * spread(absmax.view(N, -1))


def gptq_linear(kind: str = "TorchLinear", **attributes: Any) -> tuple[Any, torch.Tensor]:
    codes, zeros = codes_of(N, K), codes_of(K // G, N, 3, seed=3)
    scales = scales_of(K // G, N, dtype=torch.float16)
    index = (torch.arange(K) // G)[torch.randperm(K, generator=torch.Generator().manual_seed(2))]
    own = {
        "qweight": in_words(codes, 4).t().contiguous(), "qzeros": in_words(zeros, 4), "scales": scales,
        "g_idx": index.int(), "bits": 4, "group_size": G, "adapter": None, "qzero_format": lambda: 1,
    }  # fmt: skip
    wanted = (codes.double().t() - zeros.double()[index] - 1) * scales.double()[index]
    return module_of(kind, **{**own, **attributes}), wanted.t()


def awq_linear(**attributes: Any) -> tuple[Any, torch.Tensor]:
    codes, zeros, scales = codes_of(N, K), codes_of(K // G, N, seed=3), scales_of(K // G, N)
    own = {
        "qweight": in_words(codes.t().contiguous(), 4, AWQ), "qzeros": in_words(zeros, 4, AWQ),
        "scales": scales, "bits": 4, "group_size": G, "adapter": None,
    }  # fmt: skip
    index = torch.arange(K) // G
    wanted = (codes.double().t() - zeros.double()[index]) * scales.double()[index]
    return module_of("AwqTorchLinear", **{**own, **attributes}), wanted.t()


def hqq_linear(**meta: Any) -> tuple[Any, torch.Tensor]:
    codes = codes_of(N, K).view(-1, G)
    scale, zero = scales_of(len(codes), 1), scales_of(len(codes), 1, seed=7) * 100
    own = {
        "quant_scale": False, "quant_zero": False, "view_as_float": False, "scale": scale, "zero": zero,
        "shape": (N, K), "nbits": 4, "group_size": G, "axis": 1,
    }  # fmt: skip
    module = module_of("HQQLinear", W_q=in_halves(codes, high_first=True), meta={**own, **meta})
    return module, ((codes - zero.double()) * scale.double()).view(N, K)


def how(**given: Any) -> SimpleNamespace:
    """compressed-tensors' arguments of a rounding."""
    own = {"type": "int", "strategy": "group", "num_bits": 4, "group_size": G, "symmetric": True}
    return SimpleNamespace(**{**own, "block_structure": None, "dynamic": True, **given})


def compressed(weights: Any, activations: Any = None, status: str = "compressed", **tensors: Any) -> Any:
    scheme = SimpleNamespace(weights=weights, input_activations=activations, output_activations=None)
    module = nn.Linear(K, N, bias=False)
    for name, value in tensors.items():
        if name in module._parameters:
            del module._parameters[name]
        object.__setattr__(module, name, value)
    module.quantization_scheme = scheme  # type: ignore[assignment]
    module.quantization_status = SimpleNamespace(value=status)  # type: ignore[assignment]
    return module


def compressed_words(
    activations: Any = None, status: str = "compressed", **given: Any
) -> tuple[Any, torch.Tensor]:
    codes, scales = codes_of(N, K), scales_of(N, K // G)
    held = {"weight_packed": in_words(codes, 4), "weight_scale": scales, "weight_shape": torch.tensor([N, K])}
    return compressed(how(**given), activations, status, **held), (codes.double() - 8) * spread(scales)


def compressed_bytes(**activation: Any) -> tuple[Any, torch.Tensor]:
    codes, scales = bytes_of(), scales_of(N, 1)
    rounded = how(strategy="token", num_bits=8, **activation) if activation else None
    module = compressed(how(strategy="channel", num_bits=8), rounded, weight=codes, weight_scale=scales)
    return module, codes.double() * scales.double()


def compressed_float8(strategy: str = "channel") -> tuple[Any, torch.Tensor]:
    codes = torch.randn(N, K).to(torch.float8_e4m3fn)
    scales = scales_of(N // 16, K // 32) if strategy == "block" else scales_of(N, 1)
    weights = how(type="float", strategy=strategy, num_bits=8, block_structure=[16, 32])
    wide = scales.double().repeat_interleave(N // scales.shape[0], 0)
    return compressed(weights, weight=codes, weight_scale=scales), codes.double() * spread(wide)


def compressed_nvfp4() -> tuple[Any, torch.Tensor]:
    codes, scales = codes_of(N, K), scales_of(N, K // 16, lowest=1.0).to(torch.float8_e4m3fn)
    held = {
        "weight_packed": in_bytes(codes, high_first=False)[: N * K // 2].view(N, K // 2),
        "weight_scale": scales, "weight_global_scale": torch.tensor([4.0]),
    }  # fmt: skip
    values = FORMATS["fp4_e2m1"].table.double()[codes.long()]
    return compressed(how(type="float"), **held), values * spread(scales.float()) / 4


def fp8_linear(**attributes: Any) -> tuple[Any, torch.Tensor]:
    codes, scales = torch.randn(N, K).to(torch.float8_e4m3fn), scales_of(N // 32, K // 32)
    own = {
        "weight": codes,
        "weight_scale_inv": scales,
        "block_size": (32, 32),
        "activation_scheme": "dynamic",
    }
    wide = spread(scales.double().repeat_interleave(32, 0))
    return module_of("FP8Linear", **{**own, **attributes}), codes.double() * wide


def typed() -> tuple[Any, torch.Tensor]:
    weight = int8_weight(N, K)
    return layer_of(weight), weight.dequantize(torch.float64)


READ: dict[str, tuple[Callable[[], tuple[Any, torch.Tensor]], str, str]] = {
    "bitsandbytes int8": (linear_8bit, "int8", "int8"),
    "bitsandbytes int8 after a call": (lambda: linear_8bit(called=True), "int8", "int8"),
    "bitsandbytes nf4": (linear_4bit, "nf4", ""),
    "bitsandbytes nf4, nested": (lambda: linear_4bit(nested=True), "nf4", ""),
    "bitsandbytes nf4 for CPUs": (lambda: linear_4bit(for_cpu=True), "nf4", ""),
    "GPTQ": (gptq_linear, "int4", ""),
    "AWQ": (awq_linear, "int4", ""),
    "HQQ": (hqq_linear, "int4", ""),
    "compressed-tensors words": (compressed_words, "int4", ""),
    "compressed-tensors bytes": (compressed_bytes, "int8", ""),
    "compressed-tensors W8A8": (lambda: compressed_bytes(type="int"), "int8", "int8"),
    "compressed-tensors float8": (compressed_float8, "fp8_e4m3", ""),
    "compressed-tensors blocks of float8": (lambda: compressed_float8("block"), "fp8_e4m3", ""),
    "compressed-tensors nvfp4": (compressed_nvfp4, "fp4_e2m1", ""),
    "fine-grained float8": (fp8_linear, "fp8_e4m3", ""),
    "a typed weight": (typed, "int8", ""),
}


@pytest.mark.parametrize("case", READ)
def test_reads(case: str) -> None:
    make, name, activation = READ[case]
    module, wanted = make()
    found = read_module(module)
    assert isinstance(found, Layer)
    assert (found.found.weight.format.name, found.found.activation) == (name, activation)
    error = (found.found.weight.dequantize(torch.float64) - wanted).norm() / wanted.norm()
    assert error <= 1e-7, error


def test_what_is_done_around_the_product_is_read() -> None:
    assert read_module(linear_8bit()[0]).threshold == 6.0  # type: ignore[union-attr]
    layer = read_module(linear_4bit()[0])
    assert layer is not None and layer.compute_dtype is torch.bfloat16


REFUSED: dict[str, tuple[Callable[[], Any], str]] = {
    "a weight that is rounded in each call": (
        lambda: linear_8bit(has_fp16_weights=True)[0], "anew in each call",
    ),
    "a weight that is not there yet": (lambda: linear_8bit(called=True, CB=None)[0], "not quantized yet"),
    "another 4-bit format": (lambda: linear_4bit(quant_type="af4")[0], "not known: af4"),
    "a repacked layer": (
        lambda: gptq_linear(qweight=torch.zeros(N, K // 2, dtype=torch.uint8))[0], "repacked for its kernel",
    ),
    "another layout": (
        lambda: gptq_linear(qweight=torch.zeros(N, K, dtype=torch.int32))[0], "no layout of checkpoints",
    ),
    "an adapter": (lambda: awq_linear(adapter=object())[0], "has an adapter"),
    "two bits": (lambda: hqq_linear(nbits=2)[0], "codes of 2 bits"),
    "quantized scales": (lambda: hqq_linear(quant_scale=True)[0], "quantized themselves"),
    "a layer that was widened": (lambda: compressed_words(status="decompressed")[0], "not compressed"),
    "a given scale": (lambda: compressed_bytes(dynamic=False)[0], "a given scale"),
    "a scale for all tokens": (
        lambda: compressed_words(how(strategy="tensor", num_bits=8))[0], "scale for each tensor",
    ),
    "another rounding": (lambda: fp8_linear(activation_scheme="static")[0], "rounded static"),
    "attributes that are missing": (lambda: module_of("Linear8bitLt"), "of another version"),
}  # fmt: skip


@pytest.mark.parametrize("case", REFUSED)
def test_refuses(case: str) -> None:
    make, reason = REFUSED[case]
    with pytest.raises(CannotConvert, match=reason):
        read_module(make())


@pytest.mark.parametrize(
    "make", [lambda: nn.Linear(4, 4), lambda: nn.LayerNorm(4), lambda: gptq_linear("Else")[0]]
)
def test_other_modules_are_not_touched(make: Callable[[], nn.Module]) -> None:
    assert read_module(make()) is None
