"""Recordings on the CPU that behave like CUDA graphs, so that faults of who uses them are seen.

A recording knows addresses and numbers only, of when it was made: a replay computes with whatever is at those
addresses by then, and puts the results where they were the first time. It keeps no input alive.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch


@dataclass(frozen=True)
class Place:
    """A tensor by its address."""

    address: int
    size: torch.Size
    stride: tuple[int, ...]
    dtype: torch.dtype

    @staticmethod
    def of(tensor: torch.Tensor) -> Place:
        return Place(tensor.data_ptr(), tensor.size(), tensor.stride(), tensor.dtype)

    def tensor(self) -> torch.Tensor:
        """Whatever is there."""
        if not self.size.numel():
            return torch.empty(self.size, dtype=self.dtype)
        last = sum((size - 1) * stride for size, stride in zip(self.size, self.stride, strict=True))
        memory = (ctypes.c_char * ((last + 1) * self.dtype.itemsize)).from_address(self.address)
        return torch.frombuffer(memory, dtype=self.dtype).as_strided(self.size, self.stride)


@dataclass
class FakeGraph:
    """One recording."""

    function: Callable[..., Any]
    inputs: list[Any]
    results: list[Place]
    replays: int = 0

    def replay(self) -> None:
        self.replays += 1
        given = [each.tensor() if isinstance(each, Place) else each for each in self.inputs]
        for place, result in zip(self.results, _tensors(self.function(*given)), strict=True):
            place.tensor().copy_(result)


@dataclass
class FakeRecorder:
    """Makes such recordings.

    Attributes:
        made: all of them. fault: is raised instead of recording. busy: what `is_busy` says.
    """

    made: list[FakeGraph] = field(default_factory=list)
    fault: Exception | None = None
    busy: bool = False

    @contextmanager
    def turn(self) -> Iterator[None]:
        yield

    def is_busy(self) -> bool:
        return self.busy

    def record(self, function: Callable[..., Any], inputs: Sequence[Any]) -> tuple[FakeGraph, Sequence[Any]]:
        """Nothing is computed where the inputs are: the function sees copies of them."""
        if self.fault is not None:
            raise self.fault
        copies: dict[int, torch.Tensor] = {}
        given = [_copied(each, copies) for each in inputs]
        results = function(*given)
        pairs = [(copy, each) for copy, each in zip(given, inputs, strict=True) if _is_tensor(each)]
        back = {copy.untyped_storage().data_ptr(): each for copy, each in pairs}
        results = tuple(_where_it_was(each, back) for each in results)
        graph = FakeGraph(
            function,
            [Place.of(each) if _is_tensor(each) else each for each in inputs],
            [Place.of(each) for each in _tensors(results)],
        )
        self.made.append(graph)
        for each in _tensors(results):
            if not any(each is given for given in inputs) and each.is_floating_point():
                each.fill_(float("nan"))  # recording computes nothing
        return graph, results


def _is_tensor(value: Any) -> bool:
    return isinstance(value, torch.Tensor)


def _tensors(values: Sequence[Any]) -> list[torch.Tensor]:
    return [value for value in values if isinstance(value, torch.Tensor)]


def _copied(value: Any, copies: dict[int, torch.Tensor]) -> Any:
    """A copy in memory of its own, of all that the tensor's storage holds."""
    if not isinstance(value, torch.Tensor):
        return value
    storage = value.untyped_storage()
    whole = torch.empty(0, dtype=value.dtype).set_(storage, 0, (storage.nbytes() // value.itemsize,))
    copy = copies.setdefault(storage.data_ptr(), whole.clone())
    return copy.as_strided(value.size(), value.stride(), value.storage_offset())


def _where_it_was(result: Any, back: dict[int, torch.Tensor]) -> Any:
    """A result in the memory of an input is in that of the input itself, not of its copy."""
    owner = back.get(result.untyped_storage().data_ptr()) if isinstance(result, torch.Tensor) else None
    if owner is None:
        return result
    return owner.as_strided(result.size(), result.stride(), result.storage_offset())
