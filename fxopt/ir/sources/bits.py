"""How several codes share one number: nibbles of bytes, fields of 32-bit words, halves of rows."""

from __future__ import annotations

from collections.abc import Sequence

import torch

# The nibbles of a word of AWQ, from the lowest bits up, hold these of eight neighbouring columns.
# Lin et al., "AWQ: Activation-aware Weight Quantization", 2023; the layout is that of its CUDA kernels.
AWQ_ORDER = (0, 2, 4, 6, 1, 3, 5, 7)


def nibbles(packed: torch.Tensor, *, high_first: bool) -> torch.Tensor:
    """uint8 (..., B) -> uint8 (..., 2 B): two neighbours share a byte."""
    low, high = packed & 15, packed >> 4
    return torch.stack((high, low) if high_first else (low, high), -1).flatten(-2)


def fields(words: torch.Tensor, bits: int, order: Sequence[int] | None = None) -> torch.Tensor:
    """int32 (..., W) -> uint8 (..., W * 32 / bits): the fields of each word.

    Args:
        bits: of a field: 4 or 8.
        order: field i from the lowest bits up is the value at order[i]; None is 0, 1, 2 ...
    """
    count = 32 // bits
    shifts = torch.arange(0, 32, bits, dtype=torch.int32, device=words.device)
    found = ((words[..., None] >> shifts) & ((1 << bits) - 1)).to(torch.uint8)
    if order is not None:
        places = torch.tensor(order, device=words.device).argsort()
        found = found[..., places]
    return found.reshape(*words.shape[:-1], words.shape[-1] * count)


def halves(packed: torch.Tensor, *, high_first: bool) -> torch.Tensor:
    """uint8 (R, C) -> uint8 (2 R, C): row r and row r + R share their bytes."""
    low, high = packed & 15, packed >> 4
    return torch.cat((high, low) if high_first else (low, high))
