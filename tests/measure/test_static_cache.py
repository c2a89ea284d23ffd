"""The benchmark of static caches measures steps over the caches that it names."""

from __future__ import annotations

import argparse

import pytest
import torch

from benchmarks import static_cache
from benchmarks.decoding import Step
from benchmarks.latent_model import cached_sizes

ROOM, FILLED = 24, 17


def steps(kv: str, sliding: bool) -> tuple[Step, Step]:
    """Over random keys and values, and over zeros."""
    arguments = argparse.Namespace(layers=1, latent=False, sliding=sliding, dtype="bfloat16")
    model = static_cache._model(arguments, ROOM)
    entries = [torch.randn(1, *size) for size in cached_sizes(model.config, ROOM)]
    filled = ROOM if sliding else FILLED
    first, second = (
        static_cache._step(model, model.config, held, filled, kv)
        for held in (entries, [torch.zeros_like(each) for each in entries])
    )
    return first, second


CASES = [("auto", False), ("int8", False), ("fp8", False), ("auto", True)]


@pytest.mark.parametrize(("kv", "sliding"), CASES)
def test_a_step_reads_the_rows_that_are_there(kv: str, sliding: bool) -> None:
    step, of_nothing = steps(kv, sliding)
    with torch.no_grad():
        found = step()
        assert found.dtype is torch.bfloat16
        assert not torch.allclose(found, of_nothing(), rtol=0.1)
        if not sliding:  # each step of a window moves it
            for _ in range(ROOM):  # the same token at the same place, however often
                again = step()
            assert torch.equal(again, found)
