"""Linear modules of other libraries: what their attributes say of the weight.

Recognised by the name of the class and by attributes, without importing a library. Written for bitsandbytes
0.50, GPTQModel 7.7, compressed-tensors 0.20, hqq 0.2, optimum-quanto 0.2, torchao 0.18 and transformers 5.23.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from fxopt.ir.sources import affine, bitsandbytes, compressed_tensors, gptq, hqq
from fxopt.ir.sources.found import Found
from fxopt.ir.sources.refusal import CannotConvert
from fxopt.ir.sources.typed import convert, is_known

# Of GPTQModel: those that keep the layout of the checkpoint until their first call.
_GPTQ_CLASSES = (
    "TorchLinear",
    "TorchAtenLinear",
    "TorchFusedLinear",
    "TorchCpuAvx512Linear",
    "TritonV2Linear",
)
_AWQ_CLASSES = (
    "AwqTorchLinear",
    "TorchAtenAwqLinear",
    "TorchFusedAwqLinear",
    "TorchCpuAvx512AwqLinear",
    "AwqGEMMLinear",
)


@dataclass(frozen=True)
class Layer:
    """A linear module's meaning: the weight, and what is done around the product."""

    found: Found
    bias: torch.Tensor | None
    threshold: float = 0.0
    compute_dtype: torch.dtype | None = None


def read_module(module: nn.Module) -> Layer | None:
    """What a module of a known library computes; None for all others.

    Raises:
        CannotConvert: it is of a known library, and has no counterpart.
    """
    try:
        return next((found for one in _READERS if (found := one(module)) is not None), None)
    except (AttributeError, ValueError, RuntimeError) as error:
        raise CannotConvert(f"a {type(module).__name__} of another version: {error}") from error


def has_processor_op(module: Any) -> bool:
    """Whether a module has an op of its own for this processor, which may be faster than fxopt's product.

    bitsandbytes' 4-bit layers where there is AVX512-BF16: they pack their weights for it in their first call.
    """
    if not _is(module, "Linear4bit") or module.training or module.weight.device.type != "cpu":
        return False
    return bool(getattr(module, "support_avx512bf16_for_cpu", False))


def _bias(module: Any) -> torch.Tensor | None:
    found: torch.Tensor | None = getattr(module, "bias", None)
    return found


def _is(module: nn.Module, *names: str) -> bool:
    """Whether a class of one of these names is among those that the module's inherits from."""
    return any(each.__name__ in names for each in type(module).__mro__)


def _linear_8bit(module: Any) -> Layer | None:
    if not _is(module, "Linear8bitLt"):
        return None
    state, weight = module.state, module.weight
    if state.has_fp16_weights:
        raise CannotConvert("the weight is rounded anew in each call")
    # Where the first call has moved them.
    codes = weight.CB if weight.CB is not None else state.CB
    absmax = weight.SCB if weight.SCB is not None else state.SCB
    if codes is None or absmax is None:
        raise CannotConvert("the weight is not quantized yet: it is when the module is moved to a device")
    found = Found(bitsandbytes.from_int8(codes, absmax), "bitsandbytes Linear8bitLt", "int8")
    return Layer(found, _bias(module), float(state.threshold))


def _linear_4bit(module: Any) -> Layer | None:
    if not _is(module, "Linear4bit"):
        return None
    state = getattr(module.weight, "quant_state", None) or getattr(module, "quant_state", None)
    if state is None:
        raise CannotConvert("the weight is not quantized yet: it is when the module is moved to a device")
    kind, block, packed = state.quant_type, state.blocksize, module.weight
    if getattr(state, "packing_format_for_cpu", False):
        weight = bitsandbytes.from_cpu_4bit(packed.detach(), state.absmax, block, kind)
    else:
        absmax = state.absmax
        if state.nested:
            inner = state.state2
            absmax = bitsandbytes.nested_absmax(
                absmax, inner.code, inner.absmax, state.offset, inner.blocksize
            )
        weight = bitsandbytes.from_4bit(packed, state.shape, absmax, block, kind)
    if weight.shape != (module.out_features, module.in_features):
        raise CannotConvert(f"a weight {weight.shape} of a layer {module.out_features, module.in_features}")
    # It computes in the dtype that it is told; where it is told float32 for activations that have fewer bits,
    # it changes its mind in the first call.
    told = module.compute_dtype if module.compute_type_is_set else None
    return Layer(Found(weight, f"bitsandbytes {kind}"), _bias(module), compute_dtype=told)


def _gptq(module: Any) -> Layer | None:
    if not _is(module, *_GPTQ_CLASSES) or not hasattr(module, "qweight"):
        return None
    if getattr(module, "planar", False):
        raise CannotConvert("codes in planes of bits")
    if module.qweight is None or module.qweight.dtype is not torch.int32 or module.adapter is not None:
        raise CannotConvert("a layer that was repacked for its kernel, or that has an adapter")
    if module.qweight.shape != (module.in_features * module.bits // 32, module.out_features):
        raise CannotConvert(f"codes {tuple(module.qweight.shape)} in no layout of checkpoints")
    weight = gptq.from_gptq(
        module.qweight, module.qzeros, module.scales, getattr(module, "g_idx", None),
        bits=module.bits, group_size=module.group_size, zeros_format=module.qzero_format(),
    )  # fmt: skip
    return Layer(Found(weight, f"GPTQ {type(module).__name__}"), _bias(module))


def _awq(module: Any) -> Layer | None:
    if not _is(module, *_AWQ_CLASSES) or not hasattr(module, "qweight"):
        return None
    if module.qweight is None or module.qweight.dtype is not torch.int32 or module.adapter is not None:
        raise CannotConvert("a layer that was repacked for its kernel, or that has an adapter")
    if module.qweight.shape != (module.in_features, module.out_features * module.bits // 32):
        raise CannotConvert(f"codes {tuple(module.qweight.shape)} in no layout of checkpoints")
    weight = gptq.from_awq(
        module.qweight, module.qzeros, module.scales, bits=module.bits, group_size=module.group_size
    )
    return Layer(Found(weight, f"AWQ {type(module).__name__}"), _bias(module))


def _hqq(module: Any) -> Layer | None:
    if not _is(module, "HQQLinear"):
        return None
    meta = module.meta
    if meta["quant_scale"] or meta["quant_zero"]:
        raise CannotConvert("scales or zero points that are quantized themselves")
    packed = module.W_q.view(meta["unpack_view_dtype"]) if meta["view_as_float"] else module.W_q
    weight = hqq.from_hqq(
        packed, meta["scale"], meta["zero"],
        shape=meta["shape"], bits=meta["nbits"], group_size=meta["group_size"], axis=meta["axis"],
    )  # fmt: skip
    return Layer(Found(weight, "HQQ HQQLinear"), _bias(module))


def _compressed_tensors(module: Any) -> Layer | None:
    scheme = getattr(module, "quantization_scheme", None)
    status = getattr(getattr(module, "quantization_status", None), "value", None)
    if scheme is None or not isinstance(module, nn.Linear) or getattr(scheme, "weights", None) is None:
        return None
    if status != "compressed":
        raise CannotConvert(f"a layer that is {status}, not compressed")
    if getattr(scheme, "output_activations", None) is not None:
        raise CannotConvert("results are rounded")
    weight = _compressed_weight(module, scheme.weights)
    rounded = _compressed_activation(scheme.input_activations)
    return Layer(Found(weight, "compressed-tensors", rounded), _bias(module))


def _compressed_weight(module: Any, how: Any) -> Any:
    kind, strategy = _text(how.type), _text(how.strategy)
    zeros = getattr(module, "weight_zero_point", None)
    index = getattr(module, "weight_g_idx", None)
    packed = getattr(module, "weight_packed", None)
    if packed is not None and kind == "int":
        if strategy not in ("group", "channel"):
            raise CannotConvert(f"scales for each {strategy}")
        return compressed_tensors.from_words(
            packed, module.weight_scale, module.weight_shape.tolist(), bits=how.num_bits,
            group_size=how.group_size, zeros=None if how.symmetric else zeros, group_index=index,
        )  # fmt: skip
    if packed is not None:
        if packed.dtype is not torch.uint8 or how.num_bits != 4:
            raise CannotConvert(f"{how.num_bits} bits in {packed.dtype}")
        if getattr(module, "weight_global_scale", None) is not None:
            return compressed_tensors.from_nvfp4(packed, module.weight_scale, module.weight_global_scale)
        return compressed_tensors.from_mxfp4(packed, module.weight_scale)
    rows, columns = module.weight.shape
    blocks: dict[str, Any] = {
        "tensor": (rows, columns),
        "channel": (1, columns),
        "group": (1, how.group_size),
        "block": how.block_structure,
    }
    if strategy not in blocks or index is not None:
        raise CannotConvert(f"scales for each {strategy}")
    high, wide = blocks[strategy]
    given = None if how.symmetric or kind == "float" else zeros
    return affine.from_blocks(module.weight, module.weight_scale, (int(high), int(wide)), given)


def _compressed_activation(how: Any) -> str:
    """How activations are rounded: with a scale for each token, or not at all."""
    if how is None:
        return ""
    kind, strategy = _text(how.type), _text(how.strategy)
    if how.dynamic is not True or strategy != "token" or not how.symmetric or how.num_bits != 8:
        given = "a scale for each" if how.dynamic else "a given scale for each"
        raise CannotConvert(f"activations of {how.num_bits} bits with {given} {strategy}")
    return "int8" if kind == "int" else "fp8"


def _text(value: Any) -> str:
    return str(getattr(value, "value", value))


def _block_fp8(module: Any) -> Layer | None:
    """Fine-grained FP8 of DeepSeek-V3, without the rounding of activations, which it does for speed."""
    if not _is(module, "FP8Linear") or getattr(module, "weight_scale_inv", None) is None:
        return None
    if getattr(module, "activation_scheme", "dynamic") != "dynamic":
        raise CannotConvert(f"activations are rounded {module.activation_scheme}")
    block = module.block_size or tuple(module.weight.shape)
    scales = module.weight_scale_inv
    if scales.dtype not in (torch.float32, torch.bfloat16, torch.float16):
        scales = scales.float()
    found = affine.from_blocks(module.weight, scales, (int(block[0]), int(block[1])))
    return Layer(Found(found, "fine-grained FP8"), _bias(module))


def _typed(module: Any) -> Layer | None:
    weight: Any = getattr(module, "weight", None)
    is_linear = isinstance(module, nn.Linear) or _is(module, "QLinear")
    if not is_linear or not is_known(weight):
        return None
    rounded = [getattr(module, name, None) for name in ("activation_qtype", "_quantize_activations")]
    if any(rounded):
        raise CannotConvert(f"activations are rounded to {rounded[0]}")
    return Layer(convert(weight), _bias(module))


_READERS: tuple[Callable[[Any], Layer | None], ...] = (
    _linear_8bit,
    _linear_4bit,
    _gptq,
    _awq,
    _hqq,
    _compressed_tensors,
    _block_fp8,
    _typed,
)
