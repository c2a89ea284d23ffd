"""Random numbers as functions of seeds."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import fx
from torch._inductor.decomposition import select_decomp_table
from torch.fx.experimental.proxy_tensor import make_fx

from fxopt.codegen.random_numbers import seed_random_numbers
from fxopt.ir.ops.philox import philox_uniform
from fxopt.ir.ops.uniform import BITS


def seeded(
    function: Callable[..., object], *inputs: object, mode: str = "fake"
) -> tuple[fx.GraphModule, int]:
    gm = make_fx(function, decomposition_table=select_decomp_table(), tracing_mode=mode)(*inputs)
    count = seed_random_numbers(gm.graph)
    gm.graph.lint()
    gm.recompile()
    return gm, count


def test_the_known_answer_of_philox() -> None:
    """Random123's kat_vectors: counter and key of zeros give 6627e8d5 as the first word."""
    assert philox_uniform([1], torch.tensor(0), 24).item() == (0x6627E8D5 >> 8) * 2.0**-24


def test_numbers_depend_on_the_whole_seed_and_on_the_place_alone() -> None:
    numbers = philox_uniform([6, 7], torch.tensor(5), 24)
    assert torch.equal(numbers, philox_uniform([42], torch.tensor(5), 24).view(6, 7))
    assert not torch.equal(numbers, philox_uniform([6, 7], torch.tensor(5 + 2**32), 24))
    assert numbers.unique().numel() == 42


@pytest.mark.parametrize("dtype", sorted(BITS, key=str))
def test_numbers_are_below_one_in_their_dtype(dtype: torch.dtype) -> None:
    numbers = philox_uniform([5000], torch.tensor(3), BITS[dtype])
    assert torch.equal(numbers.to(dtype).to(torch.float32), numbers)
    assert numbers.min() >= 0
    assert numbers.max() < 1
    assert abs(numbers.mean() - 0.5) < 0.02


def test_every_draw_has_a_seed_of_its_own() -> None:
    gm, count = seeded(lambda x: torch.rand_like(x) - torch.rand(3, 4), torch.ones(3, 4))
    assert count == 2
    torch.manual_seed(0)
    first = gm(torch.ones(3, 4))
    torch.manual_seed(0)
    assert torch.equal(first, gm(torch.ones(3, 4)))
    assert first.abs().min() > 0


def test_sizes_are_read_from_the_tensor() -> None:
    gm, count = seeded(torch.rand_like, torch.ones(3, 4), mode="symbolic")
    assert count == 1
    assert gm(torch.ones(5, 2)).shape == (5, 2)


def test_other_distributions_stay() -> None:
    assert seeded(lambda x: torch.randn_like(x) + torch.randint(9, (3,)), torch.ones(3))[1] == 0
