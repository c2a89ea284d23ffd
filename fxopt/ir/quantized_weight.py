"""A quantized weight in the one layout that fxopt computes with, whatever library it comes from.

    w[n, k] = value(codes[n, k]) * scales[n, k // G] + offsets[n, k // G]

    N, K      output and input features
    G         the group size: columns of a row that share a scale (and an offset); the last group may be short
    codes     int8 (N, K), float8_e4m3fn (N, K), or uint8 (N, ceil(K / 32) * 16) with two codes in a byte
    scales    (N, ceil(K / G)), floating
    offsets   (N, ceil(K / G)), floating, or None: 0
    columns   (K,) int64 or None: column j of the codes belongs to input feature columns[j]

Codes of 4 bits: of each 32 columns, byte j holds column j in its low and column j + 16 in its high bits. A
load of bytes gives two tiles of neighbouring columns, which share their scales for any group of a multiple of
16. Columns beyond K have code 0 and stand for nothing.

All zero points are offsets: (q - z) * s with codes q from 0 on is value * s + (c - z) * s, where c is 8 for
int4 and 128 for codes of 8 bits. The product is exact in float32 for any integer z and s of 16 bits.
"""

from __future__ import annotations

from dataclasses import dataclass, fields, replace
from typing import Any

import torch
from torch._subclasses.fake_tensor import is_fake

from fxopt.ir.weight_formats import FORMATS, Format

# Columns whose codes of 4 bits share 16 bytes.
BLOCK = 32
_HALF = BLOCK // 2


def ceil_div(number: int, divisor: int) -> int:
    return -(-number // divisor)


def pack_nibbles(codes: torch.Tensor) -> torch.Tensor:
    """Codes (..., K) from 0 to 15, of any integer dtype -> uint8 (..., ceil(K / 32) * 16)."""
    count = codes.shape[-1]
    wide = torch.nn.functional.pad(codes.to(torch.uint8), (0, -count % BLOCK))
    low, high = wide.unflatten(-1, (-1, 2, _HALF)).unbind(-2)
    packed: torch.Tensor = (low | (high << 4)).flatten(-2)
    return packed


def unpack_nibbles(packed: torch.Tensor, count: int) -> torch.Tensor:
    """The reverse of `pack_nibbles`: uint8 (..., `count`)."""
    blocks = packed.unflatten(-1, (-1, _HALF))
    return torch.stack((blocks & 15, blocks >> 4), -2).flatten(-3)[..., :count]


@dataclass(frozen=True, eq=False)
class QuantizedWeight:
    """A weight (N, K) of a linear layer; the attributes are explained above."""

    format: Format
    in_features: int
    group_size: int
    codes: torch.Tensor
    scales: torch.Tensor
    offsets: torch.Tensor | None = None
    columns: torch.Tensor | None = None

    def __post_init__(self) -> None:
        """Raises ValueError when the tensors are not of the shapes and dtypes that the layout has."""
        wanted = self.shapes(self.format, self.codes.shape[0], self.in_features, self.group_size)
        for name, shape in wanted.items():
            given = getattr(self, name)
            if given is not None and tuple(given.shape) != shape:
                raise ValueError(f"{name} of shape {tuple(given.shape)}, wanted {shape}")
        if self.codes.dtype != self.format.storage:
            raise ValueError(f"codes of {self.codes.dtype}, wanted {self.format.storage}")

    @staticmethod
    def shapes(kind: Format, rows: int, columns: int, group_size: int) -> dict[str, tuple[int, ...]]:
        """The shapes of all tensors of a weight (`rows`, `columns`)."""
        of_groups = (rows, ceil_div(columns, group_size))
        wide = ceil_div(columns, BLOCK) * _HALF if kind.bits == 4 else columns
        return {"codes": (rows, wide), "scales": of_groups, "offsets": of_groups, "columns": (columns,)}

    @staticmethod
    def from_codes(
        name: str,
        codes: torch.Tensor,
        scales: torch.Tensor,
        *,
        group_size: int = 0,
        offsets: torch.Tensor | None = None,
        zeros: torch.Tensor | None = None,
        columns: torch.Tensor | None = None,
    ) -> QuantizedWeight:
        """A weight from codes that are not packed: what every converter ends with.

        Args:
            name: of one of `FORMATS`.
            codes: (N, K). int4, nf4, fp4: 0 to 15, any integer dtype. int8: int8, or uint8 from 0 to 255 with
                `zeros`. fp8_e4m3: float8_e4m3fn.
            scales: (N, ceil(K / G)).
            group_size: G; 0 is K.
            offsets: as above.
            zeros: instead of `offsets`, zero points of codes that count from 0, integers or not.
            columns: as above.

        Raises:
            ValueError: shapes or dtypes do not fit.
        """
        kind = FORMATS[name]
        if zeros is not None:
            if offsets is not None or kind.values != FORMATS["int4"].values and name != "int8":
                raise ValueError(f"zero points of {name}, or besides offsets")
            middle = 1 << (kind.bits - 1)
            offsets = (middle - zeros.float()) * scales.float()
        if codes.dtype is torch.uint8 and name == "int8":
            codes = (codes ^ 128).view(torch.int8)
        count = codes.shape[-1]
        stored = pack_nibbles(codes) if kind.bits == 4 else codes.contiguous()
        return QuantizedWeight(kind, count, group_size or count, stored, scales, offsets, columns)

    @property
    def shape(self) -> tuple[int, int]:
        """(N, K)."""
        return self.codes.shape[0], self.in_features

    @property
    def tensors(self) -> dict[str, torch.Tensor]:
        """The tensors that it has, by name."""
        held = {name: getattr(self, name) for name in ("codes", "scales", "offsets", "columns")}
        return {name: each for name, each in held.items() if each is not None}

    @property
    def nbytes(self) -> int:
        """Bytes of all tensors."""
        return sum(each.numel() * each.element_size() for each in self.tensors.values())

    @property
    def device(self) -> torch.device:
        return self.codes.device

    def to(self, device: torch.device | str) -> QuantizedWeight:
        """On another device; itself where it is there."""
        moved = {name: each.to(device) for name, each in self.tensors.items()}
        same = all(moved[name] is each for name, each in self.tensors.items())
        return self if same else self.replaced(**moved)

    def unpacked(self) -> torch.Tensor:
        """The codes (N, K), one in each entry: int8, float8_e4m3fn, or uint8 from 0 to 15."""
        return unpack_nibbles(self.codes, self.in_features) if self.format.bits == 4 else self.codes

    def rows(self, start: int, stop: int) -> QuantizedWeight:
        """Some of its output features; views of the same memory."""
        parts = {name: each[start:stop] for name, each in self.tensors.items() if name != "columns"}
        return self.replaced(**parts)

    def per_column(self, of_groups: torch.Tensor) -> torch.Tensor:
        """Numbers of groups (N, ceil(K / G)), repeated for each of their columns: (N, K)."""
        return of_groups.repeat_interleave(self.group_size, 1)[:, : self.in_features]

    def dequantize(self, dtype: torch.dtype = torch.float32) -> torch.Tensor:
        """The weight (N, K), features in their own order; computed in float32, for float64 in float64."""
        wide = torch.float64 if dtype is torch.float64 else torch.float32
        codes = self.unpacked()
        if self.format.values:
            # While a graph is captured, tensors that are no part of it have no place in it.
            table = torch.tensor(self.format.values, device="cpu") if is_fake(codes) else self.format.table
            found = table.to(device=self.device, dtype=wide)[codes.long()]
        else:
            found = codes.to(wide)
        found = found * self.per_column(self.scales.to(wide))
        if self.offsets is not None:
            found = found + self.per_column(self.offsets.to(wide))
        if self.columns is not None:
            found = torch.empty_like(found).index_copy_(1, self.columns, found)
        return found.to(dtype)

    def same_as(self, other: QuantizedWeight) -> bool:
        """Whether all that makes it is equal, bit for bit."""
        plain = ("format", "in_features", "group_size")
        if any(getattr(self, name) != getattr(other, name) for name in plain):
            return False
        mine, theirs = self.tensors, other.tensors
        return mine.keys() == theirs.keys() and all(_equal(mine[name], theirs[name]) for name in mine)

    def replaced(self, **changes: Any) -> QuantizedWeight:
        """A copy with other values of some fields."""
        known = {each.name for each in fields(self)}
        if not changes.keys() <= known:
            raise TypeError(f"no fields {sorted(changes.keys() - known)}")
        return replace(self, **changes)


def _equal(a: torch.Tensor, b: torch.Tensor) -> bool:
    if a.dtype != b.dtype or a.shape != b.shape:
        return False
    return torch.equal(a.contiguous().view(torch.uint8), b.contiguous().view(torch.uint8))


def signal_to_noise(dense: torch.Tensor, approximate: torch.Tensor) -> float:
    """10 log10(sum(dense^2) / sum((dense - approximate)^2)) in decibels; infinite where they are equal."""
    wide = dense.double()
    noise = (wide - approximate.double()).square().sum()
    return float(10 * torch.log10(wide.square().sum() / noise))
