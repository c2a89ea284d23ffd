"""The peak of a call's memory, where it is known."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import torch

from fxopt.measure.memory import peak_bytes, stored_bytes

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


class _Half(torch.nn.Module):
    """Two layers and a table that one of them shares."""

    def __init__(self, *, tied: bool) -> None:
        super().__init__()
        self.table = torch.nn.Embedding(10, 4)
        self.head = torch.nn.Linear(4, 10, bias=False)
        self.register_buffer("scales", torch.ones(3))
        if tied:
            self.head.weight = self.table.weight


def test_a_table_that_is_read_by_rows_is_not_stored_for_products() -> None:
    assert stored_bytes(_Half(tied=False)) == 4 * (40 + 3)
    assert stored_bytes(_Half(tied=True)) == 4 * (40 + 3)


def test_scales_beside_a_weight_count() -> None:
    layer = torch.nn.Linear(4, 10, bias=False)
    weight: Any = layer.weight
    weight.SCB = torch.ones(10)
    assert stored_bytes(layer) == 4 * 50
    weight.quant_state = SimpleNamespace(absmax=torch.ones(2), state2=SimpleNamespace(absmax=torch.ones(1)))
    assert stored_bytes(layer) == 4 * 53
