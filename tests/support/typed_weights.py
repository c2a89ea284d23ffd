"""Tensor subclasses with the names and attributes of torchao's and quanto's, which compute by widening."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from torch.utils._python_dispatch import return_and_correct_aliasing


class TypedWeight(torch.Tensor):
    """A weight (N, K) made of `tensors` and `values`, by name; `dequantize` gives it widened."""

    names: tuple[str, ...] = ()

    @staticmethod
    def __new__(
        cls: Any, tensors: dict[str, torch.Tensor], values: dict[str, Any], shape: Any, dtype: Any
    ) -> Any:
        return torch.Tensor._make_wrapper_subclass(cls, shape, dtype=dtype, device="cpu", requires_grad=False)

    def __init__(
        self, tensors: dict[str, torch.Tensor], values: dict[str, Any], shape: Any, dtype: Any
    ) -> None:
        self._held, self._values = list(tensors), values
        for name, value in {**tensors, **values}.items():
            setattr(self, name, value)

    def __tensor_flatten__(self) -> tuple[list[str], Any]:
        return list(self._held), (self._values, tuple(self.shape), self.dtype)

    @classmethod
    def __tensor_unflatten__(cls, tensors: dict[str, torch.Tensor], meta: Any, *_: Any) -> TypedWeight:
        values, shape, dtype = meta
        return cls(tensors, values, shape, dtype)

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is nn.functional.linear:
            x, weight, *bias = args
            return func(x, weight.dequantize(), *bias, **kwargs)
        if func is torch.Tensor.t:
            return args[0].dequantize().t()
        with torch._C.DisableTorchFunctionSubclass():
            return func(*args, **kwargs)

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any, kwargs: Any = None) -> Any:
        if func in (torch.ops.aten.detach.default, torch.ops.aten.alias.default):
            one = args[0]
            tensors = {name: func(getattr(one, name)) for name in one._held}
            return return_and_correct_aliasing(
                func, args, kwargs or {}, type(one)(tensors, one._values, one.shape, one.dtype)
            )
        raise NotImplementedError(f"{func} of {cls.__name__}")

    def dequantize(self, dtype: torch.dtype | None = None) -> torch.Tensor:
        raise NotImplementedError


class Int8Tensor(TypedWeight):
    """As torchao's: (qdata - zero_point) * scale."""

    def dequantize(self, dtype: torch.dtype | None = None) -> torch.Tensor:
        kind, zero = dtype or self.dtype, getattr(self, "zero_point", None)
        codes = self.qdata.to(kind) - (0 if zero is None else zero.to(kind))
        return codes * self.scale.to(kind)


class Int4Tensor(TypedWeight):
    """As torchao's in plain packing: signed nibbles, the first in the low bits; scales are (K / G, N)."""

    def dequantize(self, dtype: torch.dtype | None = None) -> torch.Tensor:
        kind = dtype or self.dtype
        low, high = (self.qdata & 15) ^ 8, ((self.qdata >> 4) & 15) ^ 8
        codes = torch.stack((low, high), -1).flatten(-2).to(kind) - 8
        group = self.block_size[1]
        scale, zero = (
            each.t().repeat_interleave(group, 1).to(kind) for each in (self.scale, self.zero_point)
        )
        return codes * scale + zero


class WeightQBytesTensor(TypedWeight):
    """As quanto's: _data * _scale."""

    def dequantize(self, dtype: torch.dtype | None = None) -> torch.Tensor:
        kind = dtype or self.dtype
        return self._data.to(kind) * self._scale.to(kind)


class UnknownTensor(Int8Tensor):
    """A class that nobody knows."""


def int8_weight(
    rows: int,
    columns: int,
    dtype: torch.dtype = torch.float32,
    kind: type[TypedWeight] = Int8Tensor,
    **values: Any,
) -> TypedWeight:
    generator = torch.Generator().manual_seed(rows + columns)
    codes = torch.randint(-127, 128, (rows, columns), dtype=torch.int8, generator=generator)
    scale = torch.rand(rows, 1, generator=generator) * 0.01 + 0.001
    own = {"block_size": [1, columns], "act_quant_kwargs": None, "act_pre_scale": None, **values}
    return kind({"qdata": codes, "scale": scale}, own, (rows, columns), dtype)


def int4_weight(rows: int, columns: int, group: int = 32, dtype: torch.dtype = torch.float32) -> Int4Tensor:
    generator = torch.Generator().manual_seed(rows + columns)
    packed = torch.randint(0, 256, (rows, columns // 2), dtype=torch.uint8, generator=generator)
    scale, zero = (torch.rand(columns // group, rows, generator=generator) * 0.01 for _ in range(2))
    tensors = {"qdata": packed.view(torch.int8), "scale": scale, "zero_point": zero}
    values = {"block_size": [1, group], "act_pre_scale": None, "activation_dtype": torch.bfloat16}
    return Int4Tensor(tensors, values, (rows, columns), dtype)


def bytes_weight(rows: int, columns: int, dtype: torch.dtype = torch.float32) -> WeightQBytesTensor:
    generator = torch.Generator().manual_seed(rows + columns)
    codes = torch.randn(rows, columns, generator=generator).to(torch.float8_e4m3fn)
    scale = torch.rand(rows, 1, generator=generator) * 0.01 + 0.001
    values = {"axis": 0, "activation_qtype": None}
    return WeightQBytesTensor({"_data": codes, "_scale": scale}, values, (rows, columns), dtype)


def layer_of(weight: torch.Tensor, bias: bool = True) -> nn.Linear:
    """A linear layer with this weight."""
    rows, columns = weight.shape
    layer = nn.Linear(columns, rows, bias=bias).to(weight.dtype)
    layer.weight = nn.Parameter(weight, requires_grad=False)
    return layer.requires_grad_(False).eval()
