"""``fxopt::uniform``: random numbers that are a function of a seed and of their place.

Whoever computes one, forward or backward, the host or a kernel, gets the same number: nothing has to be kept
for the backward pass but the seed.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from fxopt.ir.ops.op import NAMESPACE, define_op
from fxopt.ir.ops.philox import philox_uniform

# Bits of a number in [0, 1) that a dtype holds exactly: torch.rand never rounds up to 1 either.
BITS = {torch.float64: 24, torch.float32: 24, torch.float16: 11, torch.bfloat16: 8}


def is_uniform(target: object) -> bool:
    """Whether a node with this target draws such numbers."""
    return isinstance(target, torch._ops.OpOverload) and target._schema.name == f"{NAMESPACE}::uniform"


def _fake(size: Sequence[int], seed: torch.Tensor, bits: int) -> torch.Tensor:
    return torch.empty(size, dtype=torch.float32, device=seed.device)


def register(library: torch.library.Library) -> None:
    """Make the op known to torch's dispatcher."""
    define_op(library, "uniform(SymInt[] size, Tensor seed, int bits) -> Tensor", philox_uniform, _fake)
