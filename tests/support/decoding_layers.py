"""Parts of layers that decode over a cache, for tests of the pass that makes one op of them."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch.nn import functional as F

from fxopt.ir.contract import Verdict
from fxopt.ir.graph_facts import Kernels

# As a host with kernels for the CPU has it, whose ops are computed by torch here.
KERNELS = Kernels(frozenset({"cpu"}), lambda node, facts: Verdict.no(""))
Tensor = torch.Tensor
Site = Callable[..., Tensor]
B, HEADS, KV_HEADS, NEW, D, ROWS, FIRST = 2, 6, 2, 3, 16, 12, 5


def new_rows() -> list[Tensor]:
    """q, k, v, cos and sin; always the same."""
    torch.manual_seed(0)
    angles = torch.rand(1, NEW, D // 2) * 6
    angles = torch.cat([angles, angles], -1)
    rows = [torch.randn(B, heads, NEW, D) for heads in (HEADS, KV_HEADS, KV_HEADS)]
    return [*rows, angles.cos(), angles.sin()]


def attend(q: Tensor, key: Tensor, value: Tensor, mask: Tensor) -> Tensor:
    return F.scaled_dot_product_attention(q, key, value, mask, enable_gqa=True)


def turn(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """As Llama has it."""
    first, second = x[..., : x.shape[-1] // 2], x[..., x.shape[-1] // 2 :]
    return x * cos[:, None] + torch.cat((-second, first), dim=-1) * sin[:, None]
