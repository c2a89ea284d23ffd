"""The keyword arguments of ``fxopt::attention``, which all its providers share."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from fxopt.ir.ops.masking import ZERO


@dataclass(frozen=True)
class Attributes:
    """What an attention is, besides its operands; `fxopt.ir.ops.attention` explains each."""

    scale: float | None = None
    enable_gqa: bool = False
    dead_rows: str = ZERO
    mask_replaces: bool = False
    wide_scores: bool = False
    score: str = ""
    sinks: torch.Tensor | None = None
    mask: str = ""
    bias: str = ""
    captures: Sequence[torch.Tensor] | None = None
    sizes: Sequence[int] | None = None


def computed_in(dtype: torch.dtype) -> torch.dtype:
    """The dtype of scores, weights and sums for operands of `dtype`."""
    return torch.float64 if dtype is torch.float64 else torch.float32
