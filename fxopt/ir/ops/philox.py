"""Philox-4x32-10 in plain torch, as kernels compute it.

Source: Salmon, Moraes, Dror and Shaw, "Parallel Random Numbers: As Easy as 1, 2, 3", 2011, section 3.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

# --- All below is copied into kernels' files as it stands.


def philox_uniform(size: Sequence[int], seed: torch.Tensor, bits: int) -> torch.Tensor:
    """Numbers in [0, 1) of so many `bits`, float32: the first word of Philox-4x32-10 of each place.

    Args:
        seed: () int64, the key. The counter is the position in a contiguous tensor of `size`.
    """
    low = 0xFFFFFFFF
    place = torch.arange(torch.Size(size).numel(), device=seed.device)
    words = [place & low, place >> 32, torch.zeros_like(place), torch.zeros_like(place)]
    keys = [seed & low, (seed >> 32) & low]
    for _ in range(10):
        (high_a, low_a), (high_b, low_b) = _product(words[0], 0xD2511F53), _product(words[2], 0xCD9E8D57)
        words = [high_b ^ words[1] ^ keys[0], low_b, high_a ^ words[3] ^ keys[1], low_a]
        keys = [(keys[0] + 0x9E3779B9) & low, (keys[1] + 0xBB67AE85) & low]
    return ((words[0] >> (32 - bits)).to(torch.float32) * 2.0**-bits).view(tuple(size))


def _product(word: torch.Tensor, factor: int) -> tuple[torch.Tensor, torch.Tensor]:
    """The high and the low 32 bits of a product of two words of 32 bits, in int64."""
    high = (word * (factor >> 16) + (word * (factor & 0xFFFF) >> 16)) >> 16
    return high, (word * factor) & 0xFFFFFFFF
