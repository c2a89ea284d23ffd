"""The keyword arguments of ``fxopt::attention``, which all its providers share."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from fxopt.ir.ops.masking import ZERO
from fxopt.ir.ops.op import is_symbol

# In the schema of an op, behind its operands.
SCHEMA = (
    "Tensor? attn_mask=None, float dropout_p=0.0, bool is_causal=False, *, Scalar? scale=None, "
    "bool enable_gqa=False, str dead_rows='zero', bool mask_replaces=False, bool wide_scores=False, "
    "str score='', Tensor? sinks=None, str mask='', str bias='', bool? bias_replaced=None, "
    "Tensor[]? captures=None, SymInt[]? sizes=None"
)


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
    query_rest: torch.Tensor | None = None
    key_rest: torch.Tensor | None = None
    mask: str = ""
    bias: str = ""
    bias_replaced: bool | None = None
    captures: Sequence[torch.Tensor] | None = None
    sizes: Sequence[int] | None = None

    def factor(self, query: torch.Tensor) -> float:
        """Of Q K^T: `scale`, or 1/sqrt of the width of Q."""
        width = query.shape[-1] + (0 if self.query_rest is None else self.query_rest.shape[-1])
        return 1.0 / math.sqrt(width) if self.scale is None else self.scale


def without_symbol(query: torch.Tensor, scale: float) -> tuple[torch.Tensor, float]:
    """Query and scale, which is part of the query where it is a symbol.

    An op that takes a number would make a guard of it, and a recompile of each of its values.
    """
    if is_symbol(scale):
        return query * scale, 1.0
    return query, scale


def computed_in(dtype: torch.dtype) -> torch.dtype:
    """The dtype of scores, weights and sums for operands of `dtype`."""
    return torch.float64 if dtype is torch.float64 else torch.float32
