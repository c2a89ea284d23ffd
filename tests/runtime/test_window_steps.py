"""Steps past Dynamo's guards over caches that keep a window, and that count what they have seen."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch

from fxopt.runtime import step_loops
from fxopt.runtime.decode_path import DecodePath
from support.stepping import compiled_once, kept_compiler

WINDOW = 6


class Rows:
    def __init__(self, width: int) -> None:
        self.keys = torch.linspace(0, 1, 2 * width).view(1, 2, width)
        self.seen = 2


class Cache:
    """The first layer keeps a window, the second one of another width does too, the third keeps all rows."""

    def __init__(self) -> None:
        self.layers = [Rows(3), Rows(5), Rows(3)]


class Decoder(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight = 0.5

    def forward(self, x: torch.Tensor, cache: Cache, rate: int = 2) -> torch.Tensor:
        total = x.sum() * self.weight * rate
        for number, rows in enumerate(cache.layers):
            new = x[..., :1].expand(*x.shape[:2], rows.keys.shape[-1]) * (number + 1)
            whole = torch.cat([rows.keys, new], 1)
            total = total + whole.sin().sum() * rows.seen
            rows.keys = whole if number == 2 else whole[:, -WINDOW:]
            rows.seen = rows.seen + x.shape[1]
        return total


class World:
    """The decoder compiled, and an eager twin."""

    def __init__(self, compiled: Any) -> None:
        self.path, self.twin = DecodePath(compiled), compiled._orig_mod
        self.caches, self.rate = [Cache(), Cache()], 2

    def step(self, rows: int = 1) -> bool:
        """One step of both; whether it went past the guards."""
        before, x = DecodePath.taken, torch.linspace(-1, 1, 3 * rows).view(1, rows, 3)
        batch = self.caches[0].layers[0].keys.shape[0]
        x = x.repeat(batch, 1, 1)
        found = [
            call(x=x.clone(), cache=cache, rate=self.rate)
            for call, cache in zip((self.path, self.twin), self.caches, strict=True)
        ]
        assert torch.equal(*found)
        for mine, other in zip(self.caches[0].layers, self.caches[1].layers, strict=True):
            assert torch.equal(mine.keys, other.keys)
            assert (mine.seen, type(mine.seen)) == (other.seen, int)
        return DecodePath.taken > before

    def learned(self) -> World:
        taken = [self.step() for _ in range(24)]
        assert all(taken[-6:]), taken
        return self


compiled = compiled_once(Decoder)
fresh_compiler = kept_compiler()


@pytest.fixture
def world(compiled: Any) -> World:
    return World(compiled)


def test_a_window_moves_through_its_memory(world: World) -> None:
    """It comes to the end of its buffer, and begins another one, more than once."""
    world.learned()
    starts, taken = [], []
    for _ in range(700):
        taken.append(world.step())
        starts.append(world.caches[0].layers[0].keys.storage_offset())
    assert sum(taken) > 680
    assert sum(later < before for before, later in zip(starts, starts[1:], strict=False)) >= 2


def test_without_a_compiler(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(step_loops.CURRENT, "loops", step_loops.PythonLoops())
    world.learned()


@pytest.mark.parametrize("change", ["weight", "rate", "seen", ""])
def test_compiled_for_all_sizes(change: str) -> None:
    """Numbers are inputs of the graph then: those of the model, of the cache, and arguments."""
    dynamic = torch.compile(Decoder().eval(), backend="fxopt", dynamic=True, options={"host": "eager"})
    world = World(dynamic).learned()
    if change == "weight":
        world.twin.weight = 0.25
    elif change == "rate":
        world.rate = 3
    elif change:
        for cache in world.caches:
            cache.layers[1].seen = 7
    assert world.step() is not bool(change)
    assert all([world.step() for _ in range(8)][-2:])


def _crop(rows: Rows) -> None:
    rows.keys = rows.keys[:, :-1]


def _count(rows: Rows) -> None:
    rows.seen = 3


def _batch(rows: Rows) -> None:
    rows.keys = rows.keys.repeat(2, 1, 1)


def _copied(rows: Rows) -> None:
    rows.keys = copy.deepcopy(rows.keys)


@pytest.mark.parametrize("change", [_crop, _count, _batch, _copied])
def test_a_change_is_seen(world: World, change: Callable[[Rows], None]) -> None:
    world.learned()
    for cache in world.caches:
        for rows in cache.layers if change is _batch else cache.layers[:1]:
            change(rows)
    assert not world.step()
    world.step()


def test_a_count_that_is_no_integer(world: World) -> None:
    """What holds a count may hold something else, without Dynamo's being asked."""
    world.learned()
    step = world.path._step
    assert step is not None
    pasts = step.loops.held_once(step.dicts, step.names)
    assert step.numbers.of(pasts) is not None
    rows = world.caches[0].layers[0]
    rows.seen = True
    assert step.numbers.of(pasts) is None


def test_several_rows_at_once(world: World) -> None:
    world.learned()
    assert not world.step(rows=2)


def test_an_interrupted_step_can_be_repeated(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    world.learned()
    step = world.path._step
    assert step is not None
    whole = step.call.compiled

    def broken(*inputs: Any) -> Any:
        whole(*inputs)
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(step.call, "compiled", broken)
        world.path(x=torch.ones(1, 1, 3), cache=world.caches[0])
    world.step()
