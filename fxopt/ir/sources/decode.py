"""What a dense weight was computed of, told from the computation itself and not from how it is written.

A library's graph turns codes into a weight: w = f(codes). Nothing is assumed of how codes are packed or
of the order of the operations. `f` is evaluated in float64 at codes that are all the same, which gives
scales and zero points; the codes follow from the weight, and all of it is checked against f(codes).
"""

from __future__ import annotations

from collections.abc import Callable

import torch

from fxopt.ir.quantized_weight import QuantizedWeight
from fxopt.ir.sources.refusal import CannotConvert
from fxopt.ir.weight_formats import FORMATS

# Of the largest number that takes part: what float64 leaves of a difference that is none.
EXACT = 1e-12
GROUPS = (2048, 1024, 512, 256, 128, 64, 32, 16)
_TABLES = ("nf4", "fp4", "fp4_e2m1")

# Codes, all of one number or as they are -> the weight (N, K) in float64.
Dequantize = Callable[[torch.Tensor], torch.Tensor]


def decode(codes: torch.Tensor, dequantize: Dequantize) -> QuantizedWeight:
    """The weight `dequantize(codes)` in fxopt's layout.

    Args:
        codes: integers or float8_e4m3fn, of any shape.

    Raises:
        CannotConvert: it is no scale and zero point for groups of columns, and no table of values that is
        known.
    """
    dense = dequantize(codes)
    if codes.dtype is torch.float8_e4m3fn:
        return _of_floats(dense, dequantize(torch.ones_like(codes)), dequantize(torch.zeros_like(codes)))
    lowest, highest = (int(each) for each in codes.aminmax())
    if highest - lowest > 255 or lowest < -128:
        raise CannotConvert(f"codes from {lowest} to {highest}")
    try:
        return _of_integers(dense, codes, dequantize, lowest, highest)
    except CannotConvert:
        if lowest < 0 or highest > 15:
            raise
    return _of_table(dense, codes, dequantize)


def _of_floats(dense: torch.Tensor, one: torch.Tensor, zero: torch.Tensor) -> QuantizedWeight:
    if zero.any():
        raise CannotConvert("zero points of codes that are floating")
    scale = torch.where(one == 0, 1.0, one)
    codes = (dense / scale).to(torch.float8_e4m3fn)
    _check(codes.double() * one, dense)
    (scales,), group = _of_groups(one)
    return QuantizedWeight.from_codes("fp8_e4m3", codes, _narrow(scales), group_size=group)


def _of_integers(
    dense: torch.Tensor, codes: torch.Tensor, dequantize: Dequantize, lowest: int, highest: int
) -> QuantizedWeight:
    """w = base + step * code."""
    base = dequantize(torch.zeros_like(codes))
    step = dequantize(torch.ones_like(codes)) - base
    found = torch.where(step == 0, 0.0, (dense - base) / torch.where(step == 0, 1.0, step)).round()
    within = bool(((found >= lowest) & (found <= highest)).all())
    _check(base + step * found if within else base, dense)
    name, middle = _format(lowest, highest)
    (steps, bases), group = _of_groups(step, base)
    # Codes of fxopt count from the middle of their range.
    shift = bases + middle * steps
    none = bool((shift.abs() <= EXACT * _largest(dense)).all())
    stored = (found - middle).to(torch.int8) if name == "int8" else (found - middle + 8).to(torch.uint8)
    offsets = None if none else shift.float()
    return QuantizedWeight.from_codes(name, stored, _narrow(steps), group_size=group, offsets=offsets)


def _format(lowest: int, highest: int) -> tuple[str, int]:
    """The format that codes from `lowest` to `highest` have place in, and the code that is its zero."""
    for name, half in (("int4", 8), ("int8", 128)):
        if -half <= lowest and highest < half:
            return name, 0
        if lowest >= 0 and highest < 2 * half:
            return name, half
    raise CannotConvert(f"codes from {lowest} to {highest}")


def _of_table(dense: torch.Tensor, codes: torch.Tensor, dequantize: Dequantize) -> QuantizedWeight:
    """w = table[code] * scale."""
    for name in _TABLES:
        table = FORMATS[name].table.double().to(dense.device)
        top = int(table.argmax())
        scale = dequantize(torch.full_like(codes, top)) / table[top]
        every = (dequantize(torch.full_like(codes, code)) - table[code] * scale for code in range(16))
        if any(bool((each.abs() > 1e-6 * _largest(scale)).any()) for each in every):
            continue
        ascending, order = table.sort()
        places = torch.bucketize(
            dense / torch.where(scale == 0, 1.0, scale), (ascending[1:] + ascending[:-1]) / 2
        )
        found = order[places]
        _check(table[found] * scale, dense, 1e-6)
        (scales,), group = _of_groups(scale)
        return QuantizedWeight.from_codes(name, found.to(torch.uint8), _narrow(scales), group_size=group)
    raise CannotConvert("codes that stand for values of no known table")


def _check(found: torch.Tensor, dense: torch.Tensor, relative: float = EXACT) -> None:
    if not bool(((found - dense).abs() <= relative * _largest(dense)).all()):
        raise CannotConvert("the weight is no linear function of its codes")


def _largest(numbers: torch.Tensor) -> float:
    return float(numbers.abs().amax()) if numbers.numel() else 0.0


def _of_groups(*tables: torch.Tensor) -> tuple[list[torch.Tensor], int]:
    """Numbers (N, K) that are the same within groups of columns -> (N, K / G), and G."""
    columns = tables[0].shape[1]
    for group in (columns, *GROUPS):
        if group > columns or columns % group:
            continue
        views = [each.unflatten(1, (-1, group)) for each in tables]
        if all(bool((each - each[..., :1]).abs().amax() <= EXACT * _largest(each)) for each in views):
            return [each[..., 0].contiguous() for each in views], group
    raise CannotConvert(f"no {GROUPS[-1]} neighbouring columns share a scale")


def _narrow(scales: torch.Tensor) -> torch.Tensor:
    """In the narrowest dtype that has these numbers, float32 at most."""
    single = scales.float()
    for dtype in (torch.bfloat16, torch.float16):
        if torch.equal(single.to(dtype).float(), single):
            return single.to(dtype)
    return single
