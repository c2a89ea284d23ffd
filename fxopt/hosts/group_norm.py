"""Group norm in plain operators, as torch decomposes it on GPUs.

On the CPU torch's own decomposition makes a factor and a summand for each channel first, which suits loops
there. Graphs whose kernels are for a GPU that is not here are traced on the CPU, and must have the GPU's
form: then a norm is one kernel, which reads its input once.
"""

from __future__ import annotations

import torch

from fxopt.ir.ops.attention_attributes import computed_in


def native_group_norm(
    input: torch.Tensor,
    weight: torch.Tensor | None,
    bias: torch.Tensor | None,
    sequences: int,
    channels: int,
    size: int,
    groups: int,
    eps: float,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """What ``aten.native_group_norm`` gives for `input` (sequences, channels, ...) with `size` elements in
    each channel: the norm, and the mean and reciprocal deviation of each group (sequences, groups)."""
    wide = input.to(computed_in(input.dtype)).reshape(sequences, groups, channels // groups, size)
    variance, mean = torch.var_mean(wide, dim=(2, 3), correction=0, keepdim=True)
    scale = torch.rsqrt(variance + eps)
    out = ((wide - mean) * scale).reshape(input.shape)
    of_channels = (channels, *[1] * (input.dim() - 2))
    if weight is not None:
        out = out * weight.reshape(of_channels)
    if bias is not None:
        out = out + bias.reshape(of_channels)
    mean, scale = (one.reshape(sequences, groups).to(input.dtype) for one in (mean, scale))
    return out.to(input.dtype), mean, scale
