"""``fxopt::snapshot``: what a tensor of indices or of bools holds now, for a backward pass to read.

A user may write to an input before the backward pass runs. A plain copy would not do: AOTAutograd may decide
to keep the input and to copy it later.
"""

from __future__ import annotations

import torch

from fxopt.ir.ops.op import define_op


def snapshot(tensor: torch.Tensor) -> torch.Tensor:
    """A copy, contiguous."""
    return tensor.clone(memory_format=torch.contiguous_format)


def register(library: torch.library.Library) -> None:
    """Make the op known to torch's dispatcher."""
    define_op(library, "snapshot(Tensor tensor) -> Tensor", snapshot, snapshot)
