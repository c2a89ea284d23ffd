"""Gradients of attention in tiles are rounded as eager's: rows of few keys, sums over many queries."""

from __future__ import annotations

import math

import pytest
import torch

from fxopt.ir.ops import register_ops
from fxopt.ir.ops.block_attention import in_blocks
from support.numerics import assert_closer

B, H, D = 2, 2, 8


def eager(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, causal: bool) -> torch.Tensor:
    scores = q @ k.mT * 0.35
    if causal:
        length = torch.arange(q.shape[2])
        scores = scores.masked_fill(length > length[:, None], -math.inf)
    return torch.softmax(scores, -1) @ v


def in_tiles(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, causal: bool) -> torch.Tensor:
    return in_blocks(q, k, v, mask="k <= q" if causal else "True", scale=0.35, dead_rows="mean")


def gradients(call: object, args: list[torch.Tensor], causal: bool) -> list[torch.Tensor]:
    leaves = [each.detach().clone().requires_grad_() for each in args]
    out = call(*leaves, causal)  # type: ignore[operator]
    (
        out * torch.linspace(-1, 1, out.numel(), dtype=torch.float64).view(out.shape).to(out.dtype)
    ).sum().backward()
    return [leaf.grad for leaf in leaves if leaf.grad is not None]


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("length", [130, 520])
def test_no_gradient_is_farther_from_float64_than_the_rule_allows(length: int, causal: bool) -> None:
    """Of the CPU's flash kernel a fifth are: dQ from rows of few keys, dK from sums in one number."""
    register_ops()
    for seed in range(8):
        torch.manual_seed(seed)
        args = [torch.randn(B, H, length, D) for _ in range(3)]
        exact = gradients(eager, [each.double() for each in args], causal)
        got, wanted = gradients(in_tiles, args, causal), gradients(eager, args, causal)
        assert_closer(exact, got, wanted, strides=False, what=f"seed {seed}")
