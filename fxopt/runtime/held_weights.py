"""Weights in fxopt's layout beside the tensors that they were made of, as long as those are the same.

A weight is made once for all graphs that read it. A tensor counts as the same while it is the same
object, its memory is at the same place, and nothing was written to it.
"""

from __future__ import annotations

import threading
import weakref
from collections.abc import Callable, Sequence
from operator import attrgetter
from typing import Any

import torch
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from fxopt.ir.sources.found import Found
from fxopt.runtime.packed_weights import stamp


class Seen:
    """A tensor as it was when it was read."""

    def __init__(self, tensor: torch.Tensor) -> None:
        self._tensor = weakref.ref(tensor)
        paths = _leaf_paths(tensor)
        self._leaves = attrgetter(*paths) if paths else None
        self._one = len(paths) == 1
        self._state = self._read(tensor)

    def holds(self, tensor: Any) -> bool:
        """Whether `tensor` is it, and has not changed."""
        return tensor is self._tensor() and self._read(tensor) == self._state

    def _read(self, tensor: Any) -> tuple[Any, ...]:
        if self._leaves is None:
            return stamp(tensor)
        leaves: Any = self._leaves(tensor)
        return stamp(leaves) if self._one else tuple(map(stamp, leaves))


def leaves(tensor: torch.Tensor) -> list[torch.Tensor]:
    """The plain tensors that a tensor subclass is made of; of a plain tensor, itself."""
    return [attrgetter(path)(tensor) for path in _leaf_paths(tensor)] or [tensor]


def _leaf_paths(tensor: Any, before: str = "") -> list[str]:
    """Where the plain tensors are that a tensor subclass is made of; none for a plain tensor."""
    if not is_traceable_wrapper_subclass(tensor):
        return [before.removesuffix(".")] if before else []
    names, _ = tensor.__tensor_flatten__()
    return [path for name in names for path in _leaf_paths(getattr(tensor, name), f"{before}{name}.")]


class Store:
    """Weights by the tensors that they were made of; each goes with the first of these."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._found: dict[tuple[Any, ...], tuple[list[Seen], Found]] = {}

    def get(self, key: Any, tensors: Sequence[torch.Tensor], make: Callable[[], Found]) -> Found:
        """What `make` gives for these tensors.

        Args:
            key: what besides the tensors decides it; hashable.
        """
        where = (key, *map(id, tensors))
        with self._lock:
            known = self._found.get(where)
        if known is not None and all(one.holds(each) for one, each in zip(known[0], tensors, strict=True)):
            return known[1]
        found = make()
        with self._lock:
            self._found[where] = ([Seen(each) for each in tensors], found)
        weakref.finalize(tensors[0], self._found.pop, where, None)
        return found

    def clear(self) -> None:
        with self._lock:
            self._found.clear()

    def __len__(self) -> int:
        return len(self._found)


STORE = Store()
