"""Inputs of small attention sites."""

from __future__ import annotations

import torch

B, H, S, D = 2, 3, 9, 4  # batch, heads, length, depth of a head


def inputs(dtype: torch.dtype = torch.float32) -> list[torch.Tensor]:
    """Q, K, V of shape (B, H, S, D), and which keys are kept, a bool of shape (B, 1, S, S).

    Left padding: the first three rows of the first sequence have no live key.
    """
    q, k, v = (torch.randn(B, S, H, D).to(dtype).transpose(1, 2) for _ in range(3))
    keep = torch.ones(S, S, dtype=torch.bool).tril().expand(B, 1, S, S).clone()
    keep[0, :, :, :3] = False
    return [q, k, v, keep]
