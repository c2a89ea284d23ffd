"""Calls of graphs that read their lengths on the device: see `fxopt.frontend.device_lengths`.

Such a graph takes all the memory of each cache, and a tensor with the numbers that change from step to step.
As long as the caches grow within their memory, nothing else about a call is different from the one before:
it can be replayed.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

import torch
from torch.multiprocessing.reductions import StorageWeakRef

from fxopt.runtime.graphs import Replay
from fxopt.runtime.kv_growth import Length
from fxopt.runtime.kv_state import STATE, first_rows
from fxopt.runtime.step_loops import alias

# Of so many sets of caches the room is known.
_MOST = 64
# Inputs that are as long as no cache are taken in steps of a quarter of their length, at least so much.
_LEAST = 256

Compute = Callable[..., tuple[int, ...]]
Place = TypeVar("Place")


@dataclass(frozen=True)
class Formulas(Generic[Place]):
    """Integers of which each belongs to a place, as a function of others."""

    places: tuple[Place, ...]
    compute: Compute

    def of(self, values: Sequence[int]) -> Iterable[tuple[Place, int]]:
        return zip(self.places, self.compute(*values), strict=True)


@dataclass(frozen=True)
class Grown:
    """A cache of which the graph takes all rows from its first one on.

    Attributes:
        source: its place among the inputs. rows: the place of their number.
        dim: that grows. new: rows of each step. most: it has no more than so many rows.
    """

    source: int
    rows: int
    dim: int
    new: int
    most: int | None


@dataclass(frozen=True)
class Window:
    """A cache of always as many rows, which move through their memory: the graph takes all of that.

    Attributes:
        source, dim, new: as in `Grown`. rows: their number before each step, and the place of it if any.
        total: rows of the memory.
    """

    source: int
    dim: int
    new: int
    rows: tuple[int, int | None]
    total: int


@dataclass(frozen=True)
class DeviceLengths:
    """How a graph of this kind is called.

    Attributes:
        grown, windows: its caches.
        symbols: the numbers that sizes and other numbers are made of; by them, `lengths` are those that grow.
        numbers: what the graph reads from its last input, but for where each window begins.
        inputs: places of numbers that the graph takes, and what it is given there.
        outputs: places among all outputs, and what is there: numbers, which the graph does not compute.
        sizes: place and dimension of inputs that are to be as long as the caches, and how long.
        unread: places of numbers that make no difference.
    """

    grown: tuple[Grown, ...]
    windows: tuple[Window, ...]
    symbols: tuple[Length, ...]
    lengths: Mapping[int, int | None]
    numbers: Compute
    inputs: Formulas[int]
    outputs: Formulas[int]
    sizes: Formulas[tuple[int, int]]
    unread: tuple[int, ...] = ()

    def takes(self, inputs: Sequence[Any]) -> bool:
        """Caches are of lengths that the graph is for. Of `inputs`, only numbers are looked at."""
        rows = {inputs[each.rows] for each in self.grown}
        most = [each.most - each.new for each in self.grown if each.most is not None]
        if len(rows) > 1 or (most and max(rows) > min(most)):
            return False
        known = [each.rows for each in self.windows]
        return all(place is None or inputs[place] == count for count, place in known)


@dataclass(frozen=True)
class _Room:
    """Rows that there is memory for, in each of some caches."""

    rows: int
    alive: list[StorageWeakRef]  # keeps other storages from getting these addresses


class LengthsCall:
    """A graph of this kind as a function of what it took before: caches with new rows, and their length."""

    def __init__(self, replay: Replay, lengths: DeviceLengths) -> None:
        self.replay, self.lengths = replay, lengths
        self._rooms: OrderedDict[tuple[tuple[int, int], ...], _Room] = OrderedDict()

    def __call__(self, *inputs: Any) -> Any:
        lengths, given = self.lengths, list(inputs)
        true = [each.of(inputs) for each in lengths.symbols]
        room = self._room(inputs)
        taken = list(true)
        for number, more in lengths.lengths.items():
            taken[number] = _bucket(true[number], room) if more is None else room - more
        for place, size in lengths.inputs.of(taken):
            given[place] = size
        for unread in lengths.unread:
            given[unread] = 0
        for each in lengths.grown:
            given[each.source] = first_rows(given[each.source], each.dim, room)
        starts = []
        for window in lengths.windows:
            given[window.source], start = _whole(given[window.source], window)
            starts.append(start)
        numbers = torch.tensor([*lengths.numbers(*true), *starts])
        results = self.replay.run([*given, numbers], self._sizes(inputs, taken, numbers))
        return self._with_numbers(results, true)

    def _sizes(
        self, inputs: Sequence[Any], taken: Sequence[int], numbers: torch.Tensor
    ) -> dict[int, Sequence[int]]:
        sizes: dict[int, Sequence[int]] = {len(inputs): numbers.shape}
        for (place, dim), size in self.lengths.sizes.of(taken):
            before = sizes.get(place, inputs[place].shape)
            sizes[place] = (*before[:dim], size, *before[dim + 1 :])
        return sizes

    def _with_numbers(self, results: Sequence[Any], true: Sequence[int]) -> Sequence[Any]:
        if not self.lengths.outputs.places:
            return results
        found = list(results)
        for place, number in self.lengths.outputs.of(true):
            found.insert(place, number)
        return tuple(found)

    def _room(self, inputs: Sequence[Any]) -> int:
        """Rows that fit into the memory of each of the caches that grow."""
        tensors = [(inputs[each.source], each.dim) for each in self.lengths.grown]
        key = tuple([(tensor.untyped_storage()._cdata, tensor.storage_offset()) for tensor, _ in tensors])
        if key not in self._rooms:
            self._rooms[key] = _cleared(tensors)
            if len(self._rooms) > _MOST:
                self._rooms.popitem(last=False)
        return self._rooms[key].rows


def _cleared(tensors: Sequence[tuple[torch.Tensor, int]]) -> _Room:
    """The room of caches, whose rows behind are made numbers: attention multiplies them by 0."""
    rows = []
    for tensor, dim in tensors:
        count, behind = tensor.shape[dim], STATE.room_behind(tensor)
        assert behind is not None
        first_rows(tensor, dim, behind, count).zero_()
        rows.append(count + behind)
    return _Room(min(rows, default=0), [StorageWeakRef(tensor.untyped_storage()) for tensor, _ in tensors])


def _whole(tensor: torch.Tensor, window: Window) -> tuple[torch.Tensor, int]:
    """All the memory of a window, and the row where it begins."""
    offset, dim = int(tensor.storage_offset()), window.dim
    sizes = (*tensor.shape[:dim], window.total, *tensor.shape[dim + 1 :])
    return alias(tensor, sizes, tensor.stride(), -offset), offset // tensor.stride(dim)


def _bucket(length: int, room: int) -> int:
    """A length that stays the same for a while."""
    if length <= room:
        return room
    step = max(_LEAST, 1 << max(length.bit_length() - 3, 0))
    return -(-length // step) * step
