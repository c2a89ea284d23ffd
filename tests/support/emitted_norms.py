"""Norms and their gradients, as programs that are run through kernels in the interpreter."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch.nn import functional as F

from fxopt.hosts.group_norm import native_group_norm

aten = torch.ops.aten
Value = torch.Tensor


def group_norm_gradient(x: Value, weight: Value, bias: Value, gradient: Value) -> tuple[Value, ...]:
    """As autograd asks for it: what `torch.func.vjp` makes can be differentiated again, and is longer."""
    sizes = (x.shape[0], x.shape[1], x[0, 0].numel(), 2)
    _, mean, scale = aten.native_group_norm(x, weight, bias, *sizes, 1e-5)
    made = aten.native_group_norm_backward(gradient, x, mean, scale, weight, *sizes, [True] * 3)
    return tuple(made)


def group_norm_of_gpus(x: Value, weight: Value, bias: Value, more: Value) -> Value:
    made = native_group_norm(x + more, weight, bias, x.shape[0], x.shape[1], x[0, 0].numel(), 3, 1e-5)
    return F.silu(made[0])


def norm_gradient(gradient: Value, more: Value, x: Value, weight: Value) -> tuple[Value, ...]:
    """Two kernels need the same products: the rows', and the sums over columns."""
    wide = (gradient + more).float()
    variance, mean = torch.var_mean(x.float(), -1, keepdim=True, correction=0)
    scale = (variance + 1e-5).rsqrt()
    normal, weighted = (x.float() - mean) * scale, wide * weight.float()
    away = weighted.mean(-1, keepdim=True) + normal * (weighted * normal).mean(-1, keepdim=True)
    return (scale * (weighted - away)).to(x.dtype), (wide * normal).sum(0), wide.sum(0)


def group_norm(x: Value, weight: Value, bias: Value, more: Value) -> tuple[Value, Value]:
    """As in a block of convolutions: the sum in front is a result, the activation behind."""
    total = x + more
    return F.silu(F.group_norm(total, 3, weight, bias)), total


def image(*shape: int, dtype: torch.dtype = torch.float32) -> tuple[Value, ...]:
    """An input of channels with their weights and biases, and another of its shape."""
    generator = torch.Generator().manual_seed(sum(shape))

    def random(*sizes: int) -> Value:
        return torch.randn(sizes, generator=generator).to(dtype)

    return random(*shape), random(shape[1]), random(shape[1]), random(*shape)


PROGRAMS: dict[str, tuple[Callable[..., Any], tuple[Value, ...]]] = {
    "computed again": (
        norm_gradient,
        tuple(torch.randn(70, 40).bfloat16() for _ in range(3)) + (torch.ones(40).bfloat16(),),
    ),
    "moments of equal elements": (
        lambda a: (a - torch.var_mean(a, 0, keepdim=True)[1], torch.var_mean(a, 0, correction=0)[0]),
        (torch.randn(1, 40).expand(7, 40),),
    ),
    "moments of long equal rows": (
        lambda a: F.layer_norm(a, (9001,)) * 2,
        (torch.randn(2, 1).expand(2, 9001),),
    ),
    "group norm": (lambda a: F.group_norm(a, 2), (torch.randn(2, 6, 5),)),
    "group norm of images": (group_norm, image(2, 6, 5, 3)),
    "group norm of images in bfloat16": (group_norm, image(2, 6, 5, 3, dtype=torch.bfloat16)),
    "group norm as on GPUs": (group_norm_of_gpus, image(2, 6, 5, 3)),
    "group norm as on GPUs in bfloat16": (group_norm_of_gpus, image(2, 6, 5, 3, dtype=torch.bfloat16)),
    "group norm of long groups": (group_norm, image(1, 3, 9001)),
    "group norm with a group for each channel": (group_norm, image(3, 3, 17)),
    "gradient of group norm": (
        group_norm_gradient,
        (torch.randn(3, 6, 5), torch.randn(6), torch.randn(6), torch.randn(3, 6, 5)),
    ),
    "gradient of group norm of images": (group_norm_gradient, image(2, 4, 7, 3)),
    "gradient of group norm in bfloat16": (group_norm_gradient, image(2, 4, 7, 3, dtype=torch.bfloat16)),
    "gradient of group norm of long groups": (group_norm_gradient, image(1, 2, 9001)),
}
