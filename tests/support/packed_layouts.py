"""Weights packed as other libraries pack them: written from their layouts' descriptions, entry by entry."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch


def codes_of(rows: int, columns: int, bits: int = 4, seed: int = 0) -> torch.Tensor:
    """Random codes from 0 on: uint8 (rows, columns)."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, 1 << bits, (rows, columns), generator=generator, dtype=torch.uint8)


def scales_of(
    *shape: int, dtype: torch.dtype = torch.float32, seed: int = 1, lowest: float = 0.01
) -> torch.Tensor:
    """Random positive scales of a shape."""
    generator = torch.Generator().manual_seed(seed)
    return (torch.rand(*shape, generator=generator) * 0.05 + lowest).to(dtype)


def in_words(values: torch.Tensor, bits: int, order: Sequence[int] | None = None) -> torch.Tensor:
    """(R, C) -> int32 (R, C * bits / 32); the field at bit i * bits is the value at order[i]."""
    per_word = 32 // bits
    order = order or range(per_word)
    rows, columns = values.shape
    found = np.zeros((rows, -(-columns // per_word)), dtype=np.uint32)
    for row in range(rows):
        for word in range(found.shape[1]):
            for place, source in enumerate(order):
                column = word * per_word + source
                if column < columns:
                    found[row, word] |= np.uint32(int(values[row, column]) << (place * bits))
    return torch.from_numpy(found.view(np.int32))


def in_bytes(values: torch.Tensor, *, high_first: bool) -> torch.Tensor:
    """(C,) -> uint8 (ceil(C / 2),): neighbours share a byte."""
    numbers = [*values.flatten().tolist(), 0]
    pairs = zip(numbers[::2], numbers[1::2], strict=False)
    found = [(a << 4) | b if high_first else (b << 4) | a for a, b in pairs]
    return torch.tensor(found, dtype=torch.uint8)


def in_halves(values: torch.Tensor, *, high_first: bool) -> torch.Tensor:
    """(2 R, C) -> uint8 (R, C): row r shares bytes with row r + R."""
    half = values.shape[0] // 2
    first, second = values[:half].int(), values[half:].int()
    return ((first * 16 + second) if high_first else (second * 16 + first)).to(torch.uint8)


def for_cpu_4bit(values: torch.Tensor) -> torch.Tensor:
    """bitsandbytes' layout for CPUs: (N, K) -> uint8 (N, K / 2)."""
    rows, columns = values.shape
    found = []
    for first in range(0, rows, 32):
        for column in range(0, columns, 2):
            pairs = [int(values[first + row, column + side]) for row in range(32) for side in range(2)]
            found += [pairs[place] | (pairs[place + 32] << 4) for place in range(32)]
    return torch.tensor(found, dtype=torch.uint8).view(rows, columns // 2)
