"""The formats of quantized weights: how many bits a code has, and which number it stands for."""

from __future__ import annotations

import functools
from dataclasses import dataclass

import torch

# Dettmers et al., "QLoRA", 2023, appendix E: quantiles of a normal distribution, with a zero of their own.
_NF4 = (
    -1.0,
    -0.6961928009986877,
    -0.5250730514526367,
    -0.39491748809814453,
    -0.28444138169288635,
    -0.18477343022823334,
    -0.09105003625154495,
    0.0,
    0.07958029955625534,
    0.16093020141124725,
    0.24611230194568634,
    0.33791524171829224,
    0.44070982933044434,
    0.5626170039176941,
    0.7229568362236023,
    1.0,
)
# The magnitudes of bitsandbytes' FP4, in the order of its codes; its top bit is the sign.
_FP4_MAGNITUDES = (0.0, 0.0625 / 12, 8 / 12, 1.0, 4 / 12, 6 / 12, 2 / 12, 3 / 12)
# OCP Microscaling Formats, version 1.0, section 5.3.3: two bits of exponent, one of mantissa.
_E2M1_MAGNITUDES = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)


@dataclass(frozen=True)
class Format:
    """A way to store weights.

    Attributes:
        name: how options and reports call it.
        bits: of a code.
        storage: dtype of the tensor of codes; two codes of 4 bits share a byte.
        values: the number that each code of 4 bits stands for, else empty: the entry itself is the number.
        largest: the magnitude that the largest weight of a group is scaled to.
        default_group: columns that share a scale when nobody says how many; 0 is all of a row.
    """

    name: str
    bits: int
    storage: torch.dtype
    values: tuple[float, ...]
    largest: float
    default_group: int

    @property
    def table(self) -> torch.Tensor:
        """`values` as (16,) of float32."""
        return _table(self.values)


@functools.cache
def _table(values: tuple[float, ...]) -> torch.Tensor:
    # It is kept: not on a default device, nor as a tensor of the inference mode that it is made in.
    with torch.inference_mode(False):
        return torch.tensor(values, dtype=torch.float32, device="cpu")


def _signed(magnitudes: tuple[float, ...]) -> tuple[float, ...]:
    return (*magnitudes, *(-each for each in magnitudes))


INT8 = Format("int8", 8, torch.int8, (), 127.0, 0)
FP8 = Format("fp8_e4m3", 8, torch.float8_e4m3fn, (), 448.0, 0)
# A code is the integer plus 8, so that codes are not negative; a zero point is part of a group's offset.
INT4 = Format("int4", 4, torch.uint8, tuple(float(code - 8) for code in range(16)), 7.0, 32)
NF4 = Format("nf4", 4, torch.uint8, _NF4, 1.0, 64)
FP4 = Format("fp4", 4, torch.uint8, _signed(_FP4_MAGNITUDES), 1.0, 64)
FP4_E2M1 = Format("fp4_e2m1", 4, torch.uint8, _signed(_E2M1_MAGNITUDES), 6.0, 32)

FORMATS = {each.name: each for each in (INT8, INT4, NF4, FP4, FP4_E2M1, FP8)}
