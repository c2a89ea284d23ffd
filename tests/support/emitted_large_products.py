"""Programs around matrix products with many rows, or of stacks, for kernels in Triton's interpreter."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from torch.nn import functional as F

from support.emitted_products import (
    Program,
    Value,
    gated,
    in_sizes,
    normal_residual,
    projections,
    random,
    residual,
)


def interleaved(x: Value) -> Value:
    """Neighbours exchanged, the second negated."""
    return torch.stack([-x[..., 1::2], x[..., ::2]], -1).flatten(-2)


def interleaved_projections(width: int, part: int) -> Callable[..., tuple[Value, ...]]:
    """Queries and keys of heads of `width`, of which the first `part` columns are turned in pairs of
    neighbours, as GPT-J and GLM have them."""

    def project(x: Value, q: Value, k: Value, cos: Value, sin: Value) -> tuple[Value, ...]:
        def turned(weight: Value) -> Value:
            heads = F.linear(x, weight).unflatten(-1, (-1, width))
            own, rest = heads[..., :part], heads[..., part:]
            embedded = own * cos + interleaved(own) * sin
            return torch.cat([embedded, rest], -1).transpose(1, 2)

        return turned(q), turned(k)

    return project


def gradients(x: Value, weight: Value, grad: Value) -> tuple[Value, ...]:
    """Of ``gelu(x @ weight.t())``."""
    inner = F.linear(x, weight)
    before = torch.ops.aten.gelu_backward(grad, inner)
    return before.t() @ x, before @ weight + x, before.sum(0)


def feed_forward(x: Value, up: Value, bias: Value, down: Value) -> Value:
    return x + F.linear(F.gelu(F.linear(x, up, bias)), down)


def dequantized(x: Value, weight: Value, scales: Value) -> Value:
    return F.relu(F.linear(x, weight.to(x.dtype) * scales))


def stacks(x: Value, y: Value, bias: Value) -> Value:
    return F.silu(torch.baddbmm(bias, x, y)) * 2


def layers(rows: int, width: int, columns: int, dtype: torch.dtype) -> dict[str, Program]:
    """What a layer does with `rows` of `width`."""
    x, grad = random(rows, width, dtype=dtype), random(rows, columns, dtype=dtype)
    scale, bias = random(width, dtype=dtype), random(columns, dtype=dtype)
    weight, half = random(columns, width, dtype=dtype), random(columns // 2 + 1, width, dtype=dtype)
    return {
        "projections": (projections, (x, scale, weight, half, half * 2, bias)),
        "gated": (gated, (x, scale, weight, weight * 2)),
        "residual": (residual, (x, weight, grad)),
        "normal residual": (normal_residual, (x, x * 2, random(width, width, dtype=dtype))),
        "gradients": (gradients, (x, weight, grad)),
        "feed forward": (feed_forward, (x, weight, bias, random(width, columns, dtype=dtype))),
    }


def rotations(rows: int, width: int, dtype: torch.dtype) -> dict[str, Program]:
    x = random(2, rows, width, dtype=dtype)
    q, k = random(64, width, dtype=dtype), random(32, width, dtype=dtype)
    found: dict[str, Program] = {}
    for part in (16, 8, 2):
        cos, sin = (random(rows, 1, part, dtype=dtype) * size for size in (1, 2))
        found[f"{part} of 16 turned"] = (interleaved_projections(16, part), (x, q, k, cos, sin))
    return found


PLAIN: dict[str, Program] = {
    "strided operand": (lambda a, w: F.relu(a @ w) + 1, (random(70, 80)[::2, 1::2], random(40, 20))),
    "padded rows": (lambda a, w: F.relu(a @ w) + 1, (random(37, 64)[:, :40], random(40, 33)[:, :20])),
    "transposed operand": (lambda a, w: F.relu(a @ w) + 1, (random(40, 37).t(), random(40, 20))),
    "both transposed": (lambda a, w: F.relu(a @ w) + 1, (random(40, 37).t(), random(20, 40).t())),
    "expanded operand": (lambda a, w: F.relu(a @ w) + 1, (random(1, 40).expand(37, 40), random(40, 20))),
    "one column": (lambda a, w: torch.sigmoid(a @ w), (random(37, 33), random(33, 1))),
    "logarithms, infinite where a row has ended": (
        lambda a, w: a.log() @ w + 1,
        (torch.rand(37, 19, generator=torch.Generator().manual_seed(1)) + 0.5, random(19, 9)),
    ),
    "weights of 8 bits": (
        dequantized,
        (random(37, 40), torch.randint(-9, 9, (24, 40), dtype=torch.int8), random(24, 1)),
    ),
    "stacks": (stacks, (random(3, 20, 40), random(3, 40, 24), random(3, 20, 24))),
    "stacks with one row": (stacks, (random(5, 1, 40), random(5, 24, 40).mT, random(24))),
    "a stack of one": (stacks, (random(1, 37, 40), random(1, 40, 24), random(37, 1))),
    "one weight for a stack": (stacks, (random(3, 20, 40), random(40, 24).expand(3, 40, 24), random(24))),
    "few results of many summands": (lambda a, w: F.relu(a @ w) + 1, (random(40, 5000), random(5000, 24))),
    "a gradient of many rows": (lambda a, b: (a.t() @ b) * 2, (random(5000, 20), random(5000, 24))),
    "every result": (lambda a, w: (y := a @ w, F.silu(y)), (random(37, 20), random(20, 12))),
}


SIZES = (
    (37, 33, 70, torch.bfloat16),
    (130, 37, 19, torch.float16),
    (64, 64, 32, torch.float32),
    (17, 16, 1, torch.float32),
)
ROTATED = ((19, 24, torch.bfloat16), (3, 24, torch.float32), (1, 24, torch.float16))


def programs(whole: bool) -> Iterator[tuple[str, Program]]:
    """Name and program: of ragged and of round sizes, in every dtype.

    Args:
        whole: every layer in all sizes, not each in one of them.
    """
    yield from in_sizes(SIZES, layers, whole)
    yield from in_sizes(ROTATED, rotations, whole)
    yield from PLAIN.items()
