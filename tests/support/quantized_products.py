"""Programs around linear layers with quantized weights, and the graphs that kernels are made of."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import fx
from torch._inductor.decomposition import select_decomp_table
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx
from torch.nn import functional as F

from fxopt.codegen.choose_products import candidates, choose
from fxopt.codegen.kernel_file import KernelFile
from fxopt.codegen.kernels import kernel_of
from fxopt.codegen.matmul import MatmulBody
from fxopt.codegen.quantized_products import expand_quantized
from fxopt.codegen.region import Region
from fxopt.codegen.regions import partition
from fxopt.ir.contract import Evidence
from fxopt.ir.ops import register_ops
from fxopt.ir.quantization_policy import SCHEMES
from fxopt.ir.quantize import quantize
from fxopt.ir.quantized_weight import QuantizedWeight
from fxopt.ir.target import Target

CPU = frozenset({"cpu"})
Value = torch.Tensor
Linear = Callable[..., Value]


def packed(rows: int, columns: int, scheme: str, group: int | None = None) -> QuantizedWeight:
    """A weight (rows, columns) of random numbers."""
    generator = torch.Generator().manual_seed(rows + columns)
    dense = torch.randn(rows, columns, generator=generator) / columns**0.5
    return quantize(dense, SCHEMES[scheme][0], group)


def linear(weight: QuantizedWeight, scheme: str) -> Linear:
    """x, the tensors of a weight of that form, bias -> the op."""
    kinds = {"format": weight.format.name, "group_size": weight.group_size, "activation": SCHEMES[scheme][1]}

    def call(x: Value, tensors: dict[str, Value], bias: Value | None = None) -> Value:
        given = [tensors.get(name) for name in ("codes", "scales", "offsets", "columns")]
        out: Value = torch.ops.fxopt.packed_product(x, *given, bias, **kinds)
        return out

    return call


def rms_norm(x: Value, weight: Value) -> Value:
    wide = x.float()
    return (wide * (wide.pow(2).mean(-1, keepdim=True) + 1e-6).rsqrt()).to(x.dtype) * weight


def gated(one: Linear) -> Callable[..., Value]:
    """Norm, gate, up and activation."""

    def call(x: Value, scale: Value, gate: dict[str, Value], up: dict[str, Value]) -> Value:
        normal = rms_norm(x, scale)
        return F.silu(one(normal, gate)) * one(normal, up)

    return call


def residual(one: Linear) -> Callable[..., Value]:
    def call(x: Value, tensors: dict[str, Value], bias: Value, other: Value) -> Value:
        return other + one(x, tensors, bias)

    return call


def expanded(function: Callable[..., Any], *given: Any) -> tuple[fx.GraphModule, list[Evidence]]:
    """The graph of `function`, with its quantized layers taken apart."""
    register_ops()
    mode = FakeTensorMode()
    fake = torch.utils._pytree.tree_map_only(torch.Tensor, mode.from_tensor, given)

    def traced(*inputs: Any) -> Any:  # `make_fx` wants no defaults
        return function(*inputs)

    gm = make_fx(traced, decomposition_table=select_decomp_table())(*fake)
    return gm, expand_quantized(gm, CPU)


def regions(gm: fx.GraphModule, *, every: bool = True) -> Sequence[Region]:
    """Those of a graph; `every`: also products with many rows."""
    choose(gm.graph, candidates(gm.graph, CPU) if every else ())
    return partition(gm.graph, CPU).regions


def product_kernels(gm: fx.GraphModule, target: str, split_k: str = "never") -> list[KernelFile]:
    """The kernels with products, for a target."""
    own = [one for one in regions(gm) if isinstance(one.body, MatmulBody)]
    return [kernel_of(one, Target.named(target), split_k) for one in own]
