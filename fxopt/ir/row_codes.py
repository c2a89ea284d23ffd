"""Rows of keys and values as numbers of 8 bits with a scale for each row.

    scale = max |x| / L        row = round(x / scale)        L = 127 for int8, 448 for float8_e4m3fn

with the scale in float32, whatever the rows were computed in. What a row is stored as depends on it alone.
"""

from __future__ import annotations

import torch

SMALLEST = torch.finfo(torch.float32).tiny
# What is written into caches; `fxopt.ir.ops.quantized_attention` reads more.
WRITTEN = (torch.int8, torch.float8_e4m3fn)


def quantized(states: torch.Tensor, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
    """(..., D) as rows of `dtype`, and their scales (..., 1) in float32."""
    wide, largest = states.float(), largest_of(dtype)
    scales = (wide.abs().amax(-1, keepdim=True) / largest).clamp_min(SMALLEST)
    rows = wide / scales
    if not dtype.is_floating_point:
        rows = rows.round()
    return rows.clamp(-largest, largest).to(dtype), scales


def dequantized(rows: torch.Tensor, scales: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """What `quantized` was given, as far as it is kept."""
    return (rows.to(scales.dtype) * scales).to(dtype)


def largest_of(dtype: torch.dtype) -> float:
    """The largest number of a dtype whose negative it has, too."""
    return float(torch.finfo(dtype).max if dtype.is_floating_point else torch.iinfo(dtype).max)


def write_rows(stored: torch.Tensor, places: torch.Tensor, rows: torch.Tensor) -> None:
    """``stored[:, :, places] = rows``, (B, H, rows, D), of a dtype of 8 bits too."""
    if rows.is_floating_point() and rows.element_size() == 1:  # float8 has no kernel of its own for it
        stored, rows = stored.view(torch.uint8), rows.view(torch.uint8)
    stored.index_copy_(2, places, rows)
