"""Growing tensors with room behind them: appending to a key-value cache without copying it.

In eager a cache grows by ``keys = torch.cat([keys, new], -2)``: each step copies all keys. Here the rows lie
in a buffer with room for more, and what the cache holds is a view of those that are filled. A step writes new
rows behind them and hands out a longer view.

**Safety.** Two tensors that are independent in eager must never be seen to share memory, or a write to one
would change the other. So rows are appended in place only where nobody can see the older tensor after the
step: it is held by nothing but the attribute that the step overwrites (`fxopt.frontend.kv_append` proves
that it does), and nothing else is an alias of its memory. Both are counted at each step, as references to
the Python object and as references to the storage. Slices, caches that share their tensors, numpy arrays and
what else user code keeps all count, and then the rows are copied, as eager does.

Memory belongs to the views alone: it is freed with the last of them.
"""

from __future__ import annotations

import functools
import math
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from sys import getrefcount

import torch
from torch.multiprocessing.reductions import StorageWeakRef

from fxopt.runtime.step_loops import CURRENT, Loops, alias

# Rows behind those that are filled when a buffer is made: a quarter of them, within these bounds. A step
# reads all rows, so that copying them once in so many steps is at most one part in `LEAST` of its work.
LEAST, MOST = 256, 1024
# After so many new buffers, those whose memory is gone are forgotten.
_SWEEP = 256

# How long the sequences of the current call are going to be, where that is known.
_expected: ContextVar[int] = ContextVar("fxopt_expected_length", default=0)


@contextmanager
def expected_length(rows: int) -> Iterator[None]:
    """Buffers that are made inside have room for `rows` rows from the start."""
    token = _expected.set(rows)
    try:
        yield
    finally:
        _expected.reset(token)


def will_grow() -> bool:
    """Whether a cache that begins now is going to be appended to."""
    return _expected.get() > 0


def capacity_for(rows: int, share: float = 1.0, *, bounded: bool = False) -> int:
    """Rows of a buffer that holds `rows` now.

    Args:
        share: from 0 to 1, another one for each tensor of a cache, so that not all of them grow at one step.
        bounded: the cache keeps its newest rows only. Such tensors reach the ends of their buffers together:
            their offsets are equal when a step is compiled, and guards of Dynamo's say that they stay so.
    """
    room = min(max(rows // 4, LEAST), MOST)
    if bounded:
        return rows + room
    # What is expected may never come: at most as much again is reserved for it.
    return max(rows + round(room * (3 + share) / 4), min(_expected.get(), 2 * rows + MOST))


@dataclass(frozen=True)
class Buffer:
    """The form of a buffer, of which only the views hold the memory.

    Attributes:
        storage: does not keep the memory alive.
        dim: the dimension that grows; in memory it is outermost, before the others in their order.
        capacity: rows that there is memory for.
        strides: of all views, as long as the buffer lives; that of `dim` is the size of a row.
        others: sizes of the dimensions that do not grow.
        dtype: of the entries.
    """

    storage: StorageWeakRef
    dim: int
    capacity: int
    strides: tuple[int, ...]
    others: tuple[int, ...]
    dtype: torch.dtype

    def first_row(self, view: torch.Tensor) -> int | None:
        """Where the rows of a tensor in this memory begin; None where it is no run of whole rows."""
        if (
            view.stride() != self.strides
            or view.dtype != self.dtype
            or _others(view, self.dim) != self.others
        ):
            return None
        first, inside = divmod(int(view.storage_offset()), self.strides[self.dim])
        return first if inside == 0 else None


def is_alone(tensor: torch.Tensor) -> bool:
    """Nobody else has the memory of a tensor, but for what it is a view of, and nobody has that."""
    loops, is_view = CURRENT.loops, tensor._is_view()
    if loops.references(tensor) != when_alone(loops, is_view):
        return False
    return not is_view or _holders_of_base(tensor) == _no_holders_of_base()


def _holders_of_base(view: torch.Tensor) -> int:
    """References to the Python object of what a tensor is a view of: a cache may hold it, which is as much as
    holding the memory, but counts as nothing there."""
    return getrefcount(view._base)


@functools.cache
def _no_holders_of_base() -> int:
    with torch.no_grad():
        view = torch.empty(2)[:1]
    return _holders_of_base(view)


@functools.cache
def when_alone(loops: Loops, is_view: bool) -> tuple[int, int]:
    """`references` to a storage where one tensor has it, and what that is a view of, if it is one.

    Measured, as it depends on how a version of torch keeps the Python objects of storages.
    """
    with torch.no_grad() if is_view else torch.inference_mode():
        tensor = torch.empty(2)[:1]
    loops.references(tensor)  # makes the Python object
    return loops.references(tensor)


def first_rows(tensor: torch.Tensor, dim: int, rows: int, before: int = 0) -> torch.Tensor:
    """The memory of `tensor` from its first row along `dim` on, or `before` rows later: `rows` of them."""
    sizes, strides = (*tensor.shape[:dim], rows, *tensor.shape[dim + 1 :]), tensor.stride()
    return alias(tensor, sizes, strides, before * strides[dim])


def _others(tensor: torch.Tensor, dim: int) -> tuple[int, ...]:
    return (*tensor.shape[:dim], *tensor.shape[dim + 1 :])


@functools.lru_cache
def _with_rows_outermost(others: tuple[int, ...], dim: int) -> tuple[int, ...]:
    """Strides of a tensor whose dimension `dim` is outermost in memory; `others`: sizes but for that one."""
    counts = [max(each, 1) for each in others]
    inner = [math.prod(counts[place + 1 :]) for place in range(len(counts))]
    return (*inner[:dim], math.prod(counts), *inner[dim:])


class KVState:
    """The buffers, found by the storage of what is to grow.

    Attributes:
        in_place, copied: how many tensors grew in either way; for tests and reports.
    """

    def __init__(self) -> None:
        self.in_place = self.copied = 0
        self._buffers: dict[int, Buffer] = {}
        self._lock = threading.Lock()

    def __len__(self) -> int:
        """How many buffers are alive."""
        self._sweep()
        return len(self._buffers)

    def begin(
        self, tensor: torch.Tensor, dim: int, share: float = 1.0, *, bounded: bool = False
    ) -> torch.Tensor:
        """A copy of `tensor` with room behind its rows along `dim`. The arguments are those of `extend`."""
        return self._with_room(tensor, dim, tensor.shape[dim], share, bounded=bounded).copy_(tensor)

    def extend(
        self,
        past: torch.Tensor,
        dim: int,
        new: int,
        share: float = 1.0,
        *,
        alone: bool,
        bounded: bool = False,
        total: int | None = None,
    ) -> torch.Tensor:
        """The rows of `past` along `dim`, and behind them `new` rows to be written, in one view.

        Args:
            past: what a cache holds.
            dim: not negative.
            new: how many rows.
            share: see `capacity_for`.
            alone: only the cache and the call hold the object `past`.
            bounded: the cache keeps only its newest rows, so that the length of the sequence is not its own.
            total: rows that the memory has to have; those of a new buffer, where it is not given.
        """
        rows = past.shape[dim]
        first = self._extensible(past, dim, new, total) if alone else None
        if first is not None:
            self.in_place += 1
            return first_rows(past, dim, rows + new)
        self.copied += 1
        grown = self._with_room(past, dim, rows + new, share, bounded=bounded)
        first_rows(grown, dim, rows).copy_(past)
        return grown

    def room_behind(self, view: torch.Tensor) -> int | None:
        """How many rows fit behind those of a view; None for what is no view of a buffer."""
        buffer = self._buffers.get(view.untyped_storage()._cdata)
        first = None if buffer is None else buffer.first_row(view)
        if buffer is None or first is None:
            return None
        return buffer.capacity - first - view.shape[buffer.dim]

    def without_room(self, tensor: torch.Tensor) -> torch.Tensor:
        """The rows of a view in memory of their own; any other tensor as it is."""
        buffer = self._buffers.get(tensor.untyped_storage()._cdata)
        is_ours = buffer is not None and not buffer.storage.expired() and buffer.first_row(tensor) is not None
        return tensor.clone() if is_ours else tensor

    def _extensible(self, past: torch.Tensor, dim: int, new: int, total: int | None) -> int | None:
        """The first row of `past` where there is room behind its rows that nobody else can see."""
        buffer = self._buffers.get(past.untyped_storage()._cdata)
        if buffer is None or buffer.dim != dim or total not in (None, buffer.capacity):
            return None
        if not is_alone(past):
            return None
        if past.is_inference() and not torch.is_inference_mode_enabled():
            return None
        first = buffer.first_row(past)
        fits = first is not None and first + past.shape[dim] + new <= buffer.capacity
        return first if fits else None

    def _with_room(
        self, like: torch.Tensor, dim: int, rows: int, share: float, *, bounded: bool
    ) -> torch.Tensor:
        """The first rows of a new buffer.

        If bounded, there is a row in front of them: a window moves through its buffer, and for an offset of 0
        Dynamo would compile a step of its own.
        """
        capacity, before = capacity_for(rows, share, bounded=bounded), int(bounded)
        whole = self._make(like, dim, before + capacity)
        return first_rows(whole, dim, rows, before)

    def _make(self, like: torch.Tensor, dim: int, capacity: int) -> torch.Tensor:
        """All of a new buffer: `like` with another size along `dim`."""
        others = _others(like, dim)
        strides = _with_rows_outermost(others, dim)
        whole = like.new_empty_strided((*others[:dim], capacity, *others[dim:]), strides)
        storage = whole.untyped_storage()
        buffer = Buffer(StorageWeakRef(storage), dim, capacity, strides, others, like.dtype)
        if len(self._buffers) % _SWEEP == _SWEEP - 1:
            self._sweep()
        with self._lock:
            self._buffers[storage._cdata] = buffer
        return whole

    def _sweep(self) -> None:
        with self._lock:
            gone = [key for key, buffer in self._buffers.items() if buffer.storage.expired()]
            for key in gone:
                del self._buffers[key]


STATE = KVState()
