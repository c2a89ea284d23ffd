"""Codes with a scale for each block of rows and columns: torchao, quanto, fine-grained FP8."""

from __future__ import annotations

import torch

from fxopt.ir.quantized_weight import QuantizedWeight, ceil_div
from fxopt.ir.sources.refusal import CannotConvert

_NAMES = {torch.int8: "int8", torch.float8_e4m3fn: "fp8_e4m3"}


def from_blocks(
    codes: torch.Tensor,
    scales: torch.Tensor,
    block: tuple[int, int],
    zeros: torch.Tensor | None = None,
    *,
    bits: int = 8,
) -> QuantizedWeight:
    """w = (codes - zeros) * scales, where a block of rows and columns shares its scale and zero point.

    Args:
        codes: int8 or float8_e4m3fn (N, K).
        scales, zeros: (ceil(N / R), ceil(K / C)), or as many numbers in another shape.
        block: (R, C).
        bits: int8 codes that are said to have 4 bits are stored so.
    """
    if codes.dim() != 2 or codes.dtype not in _NAMES:
        raise CannotConvert(f"codes of {codes.dtype} with {codes.dim()} dimensions")
    rows, columns = codes.shape
    high, wide = min(block[0], rows), min(block[1], columns)
    tables = [_of_rows(each, rows, columns, high, wide) for each in (scales, zeros) if each is not None]
    middle = 8 if bits == 4 else 128
    moved = tables[1].float() + middle if zeros is not None and tables[1].any() else None
    detached = codes.detach()
    if bits == 8 or codes.dtype is not torch.int8:
        name = _NAMES[codes.dtype]
        if moved is not None and name != "int8":
            raise CannotConvert("zero points of codes that are floating")
        stored = detached ^ -128 if moved is not None else detached
        stored = stored.view(torch.uint8) if moved is not None else stored
        return QuantizedWeight.from_codes(name, stored, tables[0], group_size=wide, zeros=moved)
    if bits != 4:
        raise CannotConvert(f"codes of {bits} bits")
    if codes.numel() and (detached.amin() < -8 or detached.amax() > 7):
        raise CannotConvert("codes that are said to have 4 bits, and have more")
    return QuantizedWeight.from_codes("int4", detached + 8, tables[0], group_size=wide, zeros=moved)


def _of_rows(numbers: torch.Tensor, rows: int, columns: int, high: int, wide: int) -> torch.Tensor:
    """Numbers of blocks -> numbers of each row, (N, ceil(K / C))."""
    wanted = (ceil_div(rows, high), ceil_div(columns, wide))
    if numbers.numel() != wanted[0] * wanted[1]:
        raise CannotConvert(f"scales or zeros {tuple(numbers.shape)}, wanted {wanted}")
    table = numbers.detach().reshape(wanted)
    return table.repeat_interleave(high, 0)[:rows].contiguous() if high > 1 else table.contiguous()
