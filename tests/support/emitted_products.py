"""Programs around matrix products with few rows, for kernels in Triton's interpreter."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch.nn import functional as F

Value = torch.Tensor
Program = tuple[Callable[..., Value | tuple[Value, ...]], tuple[Value, ...]]


def random(*shape: int, dtype: torch.dtype = torch.float32) -> Value:
    """Matrices are scaled as weights are."""
    value = torch.randn(shape, generator=torch.Generator().manual_seed(sum(shape)))
    return (value / shape[-1] ** 0.5 if len(shape) == 2 else value).to(dtype)


def rms_norm(x: Value, weight: Value) -> Value:
    wide = x.float()
    return (wide * (wide.pow(2).mean(-1, keepdim=True) + 1e-6).rsqrt()).to(x.dtype) * weight


def projections(x: Value, scale: Value, q: Value, k: Value, v: Value, bias: Value) -> tuple[Value, ...]:
    normal = rms_norm(x, scale)
    return F.linear(normal, q, bias), F.linear(normal, k), F.linear(normal, v)


def gated(x: Value, scale: Value, gate: Value, up: Value) -> Value:
    normal = rms_norm(x, scale)
    return F.silu(F.linear(normal, gate)) * F.linear(normal, up)


def residual(x: Value, weight: Value, other: Value) -> Value:
    return other + F.linear(x, weight)


def normal_residual(x: Value, other: Value, weight: Value) -> tuple[Value, Value]:
    """The sum in front of the norm, and the norm, are read again."""
    total = x + other
    normal = F.layer_norm(total, total.shape[-1:])
    return total, normal + F.gelu(F.linear(normal, weight))


def rotated(x: Value, cos: Value, sin: Value) -> Value:
    """Rotary embedding of the first columns of every head."""
    own, rest = x[..., : cos.shape[-1]], x[..., cos.shape[-1] :]
    half = own.shape[-1] // 2
    turned = torch.cat([-own[..., half:], own[..., :half]], -1)
    embedded = own * cos + turned * sin
    return torch.cat([embedded, rest], -1) if rest.shape[-1] else embedded


def rotated_projections(width: int) -> Callable[..., tuple[Value, ...]]:
    """Queries, keys and values of heads of `width`."""

    def project(x: Value, scale: Value, q: Value, k: Value, cos: Value, sin: Value) -> tuple[Value, ...]:
        normal = rms_norm(x, scale)
        heads = [F.linear(normal, one).unflatten(-1, (-1, width)).transpose(1, 2) for one in (q, k, k + k)]
        return rotated(heads[0], cos, sin), rotated(heads[1], cos, sin), heads[2]

    return project


def layers(rows: tuple[int, int], width: int, columns: int, dtype: torch.dtype) -> dict[str, Program]:
    """What decoding does with `rows` of `width`; results have `columns`."""
    x = random(*rows, width, dtype=dtype)
    scale, bias = random(width, dtype=dtype), random(columns, dtype=dtype)
    weight, half = random(columns, width, dtype=dtype), random(columns // 2 + 1, width, dtype=dtype)
    across = random(*rows, columns, dtype=dtype)
    head = 128 if width > 1024 else 32
    q, k = random(2 * head, width, dtype=dtype), random(head, width, dtype=dtype)
    cos, sin = (random(rows[0], 1, rows[1], head, dtype=dtype) * size for size in (1, 2))
    return {
        "rotated projections": (rotated_projections(head), (x, scale, q, k, cos, sin)),
        "half rotated": (rotated_projections(head), (x, scale, q, k, cos[..., ::2], sin[..., ::2])),
        "projections": (projections, (x, scale, weight, half, half * 2, bias)),
        "gated": (gated, (x, scale, weight, weight * 2)),
        "residual": (residual, (x, weight, across)),
        "normal residual": (normal_residual, (x, x * 2, random(width, width, dtype=dtype))),
    }


def _special() -> Value:
    x = torch.rand(3, 37) + 0.5
    x[1, 3], x[2, 5] = float("nan"), float("inf")
    return x


def _dequantized(x: Value, weight: Value, scales: Value) -> Value:
    return F.linear(x, weight.to(x.dtype) * scales)


PLAIN: dict[str, Program] = {
    "logarithms, infinite where a row has ended": (lambda a, w: a.log() @ w + 1, (_special(), random(37, 9))),
    "one such row": (lambda a, w: a.log() @ w + 1, (_special()[:1], random(37, 9))),
    "strided operand": (lambda a, w: F.relu(a @ w) + 1, (random(6, 80)[::2, 1::2], random(40, 20))),
    "transposed operand": (lambda a, w: F.relu(a @ w) + 1, (random(40, 3).t(), random(40, 20))),
    "expanded operand": (lambda a, w: F.relu(a @ w) + 1, (random(1, 40).expand(3, 40), random(40, 20))),
    "strided weight": (lambda a, w: F.relu(a @ w) + 1, (random(1, 40), random(80, 60)[::2, ::3])),
    "columns side by side": (lambda a, w: F.relu(a @ w) + 1, (random(1, 300), random(300, 70))),
    "longer than a tile": (lambda a, w: F.relu(F.linear(a, w)) + 1, (random(1, 5000), random(3, 5000))),
    "rows of 8 bits": (
        _dequantized,
        (random(2, 40), torch.randint(-9, 9, (24, 40), dtype=torch.int8), random(24, 1)),
    ),
    "bias of every element": (
        lambda a, w, b: torch.addmm(b, a, w) * 2,
        (random(4, 9), random(9, 5), random(4, 5)),
    ),
    "few columns of many summands": (lambda a, w: F.relu(a @ w) + 1, (random(3, 3000), random(3000, 10))),
    "two products of them": (
        lambda a, v, w: F.silu(F.linear(a, v)) * F.linear(a, w),
        tuple(random(*shape, dtype=torch.bfloat16) for shape in ((2, 4001), (9, 4001), (9, 4001))),
    ),
    "one column": (lambda a, w: torch.sigmoid(a @ w), (random(5, 33), random(33, 1))),
    "one column of one row": (lambda a, w: torch.sigmoid(a @ w), (random(1, 33), random(33, 1))),
    "every result": (lambda a, w: (y := a @ w, F.silu(y)), (random(3, 20), random(20, 12))),
    "reduced rows behind": (lambda a, w: (a @ w) * a.sum(-1, keepdim=True), (random(3, 20), random(20, 20))),
}


SIZES = (
    ((1, 1), 64, 32, torch.bfloat16),
    ((1, 1), 37, 19, torch.float16),
    ((2, 5), 33, 70, torch.bfloat16),
    ((16, 1), 40, 1, torch.float32),
)


def in_sizes(
    sizes: Sequence[tuple[Any, ...]], made: Callable[..., dict[str, Program]], whole: bool
) -> Iterator[tuple[str, Program]]:
    """Name and program of what is `made` of each of the sizes: all, or each in one of them."""
    for place, size in enumerate(sizes):
        for number, (name, program) in enumerate(made(*size).items()):
            if whole or number % len(sizes) == place:
                yield " ".join(map(str, (name, *size))), program


def programs(whole: bool) -> Iterator[tuple[str, Program]]:
    """Name and program; those of a layer for one row, few rows and a full tile of them.

    Args:
        whole: every layer in all sizes, not each in one of them.
    """
    yield from in_sizes(SIZES, layers, whole)
    yield from PLAIN.items()
