"""Weights that are tensor subclasses: torchao's and optimum-quanto's.

Recognised by the name of the class and by its attributes, since both libraries move their classes from
module to module between versions. Written for torchao 0.18 and optimum-quanto 0.2.
"""

from __future__ import annotations

import operator
from collections.abc import Callable
from typing import Any

import torch
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from fxopt.ir.quantized_weight import QuantizedWeight
from fxopt.ir.sources import affine, quanto
from fxopt.ir.sources.bits import nibbles
from fxopt.ir.sources.found import Found
from fxopt.ir.sources.refusal import CannotConvert
from fxopt.ir.sources.tinygemm import from_int4pack


def convert(weight: torch.Tensor) -> Found:
    """The weight that a tensor subclass stands for.

    Raises:
        CannotConvert: its class is not known, or it is of a kind that has no place in fxopt's layout.
    """
    name = type(weight).__name__
    known = _KNOWN.get(name)
    if known is None:
        raise CannotConvert(f"a weight of class {name}")
    library, attributes, of = known
    held = _read(weight, attributes)
    if weight.dim() != 2:
        raise CannotConvert(f"a weight with {weight.dim()} dimensions")
    found, activation = of(weight, *held)
    return Found(found, f"{library} {name}", activation)


def is_known(value: object) -> bool:
    """Whether `convert` knows the class of `value`."""
    return type(value).__name__ in _KNOWN and is_traceable_wrapper_subclass(value)


def _read(weight: torch.Tensor, attributes: tuple[str, ...]) -> list[Any]:
    try:
        return [operator.attrgetter(name)(weight) for name in attributes]
    except AttributeError as error:
        raise CannotConvert(f"a {type(weight).__name__} of another version: {error}") from error


_Converted = tuple[QuantizedWeight, str]


def _int8(weight: Any, codes: Any, scale: Any, block: Any) -> _Converted:
    _refuse_scaled_input(weight)
    if getattr(weight, "act_quant_scale", None) is not None:
        raise CannotConvert("activations are rounded with a scale that is given")
    if getattr(weight, "reduce_range", False):
        raise CannotConvert("activations are rounded to a smaller range")
    activation = _activation(weight.act_quant_kwargs, "int8", torch.int8)
    return affine.from_blocks(codes, scale, _block(block), getattr(weight, "zero_point", None)), activation


def _float8(weight: Any, codes: Any, scale: Any, block: Any) -> _Converted:
    activation = _activation(weight.act_quant_kwargs, "fp8", torch.float8_e4m3fn)
    return affine.from_blocks(codes, scale, _block(block) if block else tuple(codes.shape)), activation


def _activation(options: Any, name: str, dtype: torch.dtype) -> str:
    """How activations are rounded, from the options of torchao's quantizer of tensors.

    To int8 with a scale for each token, as here; its largest number is 127.5 of a step, and here 127.
    """
    if options is None:
        return ""
    granularity = type(getattr(options, "granularity", None)).__name__
    mapping = getattr(getattr(options, "mapping_type", None), "name", "SYMMETRIC")
    if granularity != "PerRow" or mapping != "SYMMETRIC" or getattr(options, "reduce_range", False):
        raise CannotConvert(f"activations are rounded {granularity}, {mapping}")
    limits = [getattr(options, name, None) for name in ("hp_value_lb", "hp_value_ub")]
    if limits != [None, None] or getattr(options, "float8_dtype", dtype) != dtype:
        raise CannotConvert(f"activations are rounded with options of their own: {options}")
    return name


def _unpacked(weight: Any, codes: Any, scale: Any, zero: Any, kind: Any, block: Any) -> _Converted:
    if weight.activation_quantization is not None:
        raise CannotConvert(f"activations are rounded {weight.activation_quantization}")
    bits = int(str(kind).removeprefix("torch.int"))
    return affine.from_blocks(codes, scale, _block(block), zero, bits=4 if bits <= 4 else 8), ""


def _plain_int4(weight: Any, packed: Any, scale: Any, zero: Any, block: Any) -> _Converted:
    """Signed nibbles, the first of two in the low bits; w = code * scale + zero; scale, zero: (K / G, N)."""
    _refuse_scaled_input(weight)
    if getattr(weight, "activation_dtype", torch.bfloat16) != torch.bfloat16:
        raise CannotConvert(f"activations are rounded to {weight.activation_dtype}")
    codes = nibbles(packed.detach().view(torch.uint8), high_first=False) ^ 8
    return _int4(codes, scale, zero, _block(block)[1]), ""


def _int4(codes: torch.Tensor, scale: torch.Tensor, offset: torch.Tensor, group: int) -> QuantizedWeight:
    table, shift = scale.detach().t().contiguous(), offset.detach().t().contiguous()
    return QuantizedWeight.from_codes("int4", codes, table, group_size=group, offsets=shift)


def _int4pack(weight: Any, packed: Any, both: Any, block: Any) -> _Converted:
    _refuse_scaled_input(weight)
    if getattr(weight, "act_mapping_type", None) is not None:
        raise CannotConvert(f"activations are rounded {weight.act_mapping_type}")
    return from_int4pack(packed, both, weight.shape, _block(block)[1]), ""


def _block(sizes: Any) -> tuple[int, int]:
    if len(sizes) != 2:
        raise CannotConvert(f"blocks of {sizes}")
    return int(sizes[0]), int(sizes[1])


def _refuse_scaled_input(weight: Any) -> None:
    if getattr(weight, "act_pre_scale", None) is not None:
        raise CannotConvert("activations are scaled first")


def _quanto_bytes(weight: Any, codes: Any, scale: Any, axis: Any) -> _Converted:
    if getattr(weight, "activation_qtype", None) is not None:
        raise CannotConvert(f"activations are rounded to {weight.activation_qtype}")
    return quanto.from_bytes(codes, scale, axis), ""


def _quanto_bits(
    weight: Any, packed: Any, bits: Any, scale: Any, shift: Any, group: Any, axis: Any
) -> _Converted:
    found = quanto.from_bits(packed, scale, shift, shape=weight.shape, bits=bits, group_size=group, axis=axis)
    return found, ""


def _quanto_tinygemm(weight: Any, packed: Any, both: Any, group: Any) -> _Converted:
    return from_int4pack(packed, both, weight.shape, group), ""


_QUANTO_BITS = ("_data._data", "_data._bits", "_scale", "_shift", "_group_size", "axis")
# class -> (library, what is read of it, what makes the weight of that)
_KNOWN: dict[str, tuple[str, tuple[str, ...], Callable[..., _Converted]]] = {
    "Int8Tensor": ("torchao", ("qdata", "scale", "block_size"), _int8),
    "Float8Tensor": ("torchao", ("qdata", "scale", "block_size"), _float8),
    "IntxUnpackedToInt8Tensor": (
        "torchao",
        ("qdata", "scale", "zero_point", "target_dtype", "block_size"),
        _unpacked,
    ),
    "Int4Tensor": ("torchao", ("qdata", "scale", "zero_point", "block_size"), _plain_int4),
    "Int4TilePackedTo4dTensor": ("torchao", ("qdata", "scale_and_zero", "block_size"), _int4pack),
    "Int4OpaqueTensor": ("torchao", ("qdata", "scale_and_zero", "block_size"), _int4pack),
    "WeightQBytesTensor": ("optimum-quanto", ("_data", "_scale", "axis"), _quanto_bytes),
    "WeightQBitsTensor": ("optimum-quanto", _QUANTO_BITS, _quanto_bits),
    "TinyGemmWeightQBitsTensor": (
        "optimum-quanto",
        ("_data._data", "_scale_shift", "_group_size"),
        _quanto_tinygemm,
    ),
}
