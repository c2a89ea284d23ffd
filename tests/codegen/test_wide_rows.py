"""Kernels at the widths of real models compile for every architecture, and fit."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch._inductor.decomposition import select_decomp_table
from torch.fx.experimental.proxy_tensor import make_fx
from torch.nn import functional as F
from torch.utils._pytree import tree_map

from fxopt.codegen.compile import compile_launches
from fxopt.codegen.kernel_file import KernelFile
from fxopt.codegen.kernels import kernel_of
from fxopt.codegen.regions import partition
from fxopt.ir.target import Target

ROWS = 4096
Value = torch.Tensor
META = frozenset({"meta"})


def add_rms_norm(x: Value, residual: Value, weight: Value, bias: Value) -> tuple[Value, Value]:
    total = x + residual
    wide = total.float()
    return total, weight * (wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + 1e-6)).to(x.dtype)


def gelu_layer_norm(x: Value, residual: Value, weight: Value, bias: Value) -> Value:
    return F.layer_norm(F.gelu(x) + residual, x.shape[-1:], weight, bias)


def log_softmax(x: Value, residual: Value, weight: Value, bias: Value) -> Value:
    return F.log_softmax(x.float(), -1)


def gate(x: Value, residual: Value, weight: Value, bias: Value) -> Value:
    return F.silu(x) * residual


PROGRAMS = (add_rms_norm, gelu_layer_norm, log_softmax, gate)


def with_gradients(function: Callable[..., Any]) -> Callable[..., Any]:
    def both(*inputs: Value) -> Any:
        made, pull = torch.func.vjp(function, *inputs)
        return made, pull(tree_map(torch.ones_like, made))

    return both


def kernels(function: Callable[..., Any], width: int, dtype: torch.dtype, target: Target) -> list[KernelFile]:
    shapes = ((ROWS, width), (ROWS, width), (width,), (width,))
    inputs = [torch.empty(shape, dtype=dtype, device="meta") for shape in shapes]
    gm = make_fx(with_gradients(function), decomposition_table=select_decomp_table())(*inputs)
    return [kernel_of(region, target) for region in partition(gm.graph, META).regions]


def problems(width: int, dtype: torch.dtype, arch: str) -> list[Any]:
    target = Target.named(arch)
    made = [one for function in PROGRAMS for one in kernels(function, width, dtype, target)]
    assert len(made) >= 2 * len(PROGRAMS) - 1
    launches = [(kernel, place) for kernel in made for place in range(len(kernel.launches))]
    return [(one.entry, one.problems()) for one in compile_launches(launches, target) if one.problems()]


@pytest.mark.parametrize("arch", ["sm_80", "sm_90", "sm_100", "sm_120"])
def test_at_the_width_of_a_large_model(arch: str) -> None:
    assert problems(4096, torch.bfloat16, arch) == []


@pytest.mark.slow
@pytest.mark.parametrize("arch", ["sm_80", "sm_86", "sm_89", "sm_90", "sm_100", "sm_120"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("width", [768, 2048, 5120, 8192, 16384])
def test_at_all_widths(width: int, dtype: torch.dtype, arch: str) -> None:
    assert problems(width, dtype, arch) == []
