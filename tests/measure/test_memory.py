"""The peak of a call's memory, where it is known."""

from __future__ import annotations

import torch

from fxopt.measure.memory import peak_bytes

N = 256
SIZE = N * N * 4


def test_what_is_released_does_not_add_up() -> None:
    x = torch.ones(N, N)

    def chain() -> torch.Tensor:
        for _ in range(5):
            y = x + 1
            y = y * 2
        return y

    assert 2 * SIZE <= peak_bytes(chain) <= 4 * SIZE


def test_what_is_held_adds_up() -> None:
    x = torch.ones(N, N)
    assert 5 * SIZE <= peak_bytes(lambda: [x + number for number in range(5)]) <= 6 * SIZE
