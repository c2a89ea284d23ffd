"""Loops over the tensors of a decoding step: in Python, and in C++ once that is compiled.

A step looks at each parameter and each tensor of the cache. In Python one look takes about as long as a small
kernel. `step_loops.cpp` has the same functions in C++. It is compiled once for a version of torch, beside the
first call of `generate`. Until then, and where there is no compiler, those in Python are used.
"""

from __future__ import annotations

import functools
import importlib.util
import logging
import threading
from collections.abc import Callable, Hashable, Sequence
from operator import attrgetter, is_
from pathlib import Path
from sys import getrefcount
from types import FunctionType
from typing import Any, Protocol

import torch
from torch._C._dynamo import guards

from fxopt.runtime.native_code import in_background, library_of

log = logging.getLogger("fxopt")

_SOURCE = Path(__file__).with_suffix(".cpp")

_use_count, _storage_of = torch._C._storage_Use_Count, torch.Tensor.untyped_storage
_data_ptr = torch.Tensor.data_ptr
_CODE = attrgetter("__code__", "__defaults__", "__kwdefaults__")

# alias(tensor, sizes, strides, beyond): other entries of the memory of a tensor, from `beyond` behind its
# first one. No view in autograd's sense, as what eager computes is none, and half as expensive as one.
alias: Callable[..., torch.Tensor] = guards._reinterpret_tensor  # type: ignore[attr-defined]


class Loops(Hashable, Protocol):
    """What both have. All sequences are lists or tuples."""

    def forms(self, tensors: Sequence[torch.Tensor], but: int, /) -> Any:
        """Sizes, strides, dtypes and devices, but for the size of dimension `but` (-1: with all sizes)."""

    def forms_are(self, tensors: Sequence[torch.Tensor], forms: Any, /) -> bool:
        """Whether the tensors have these forms."""

    def types_are(self, objects: Sequence[Any], types: Sequence[type], /) -> bool:
        """Whether these are the types of the objects."""

    def dicts_are(self, objects: Sequence[Any], dicts: Sequence[dict[str, Any]], /) -> bool:
        """Whether these are the objects that hold the attributes of the objects."""

    def codes(self, functions: Sequence[FunctionType], /) -> Any:
        """Their code, defaults, and defaults of keywords; all three are kept."""

    def codes_are(self, functions: Sequence[FunctionType], codes: Any, /) -> bool:
        """Whether the functions have these objects still."""

    def versions(self, dicts: Sequence[dict[Any, Any]], /) -> Any:
        """Something that is another value after a change of any of the dicts."""

    def versions_are(self, dicts: Sequence[dict[Any, Any]], versions: Any, /) -> bool:
        """Whether these are what `versions` gives now."""

    def references(self, tensor: torch.Tensor, /) -> tuple[int, int]:
        """To the storage of a tensor, and to its Python object; how many that are, is compared only."""

    def are_alone(
        self,
        tensors: Sequence[torch.Tensor],
        addresses: Sequence[int],
        sizes: Sequence[int],
        references: tuple[int, int],
        /,
    ) -> bool:
        """Whether the tensors lie at `addresses`, have `sizes` in bytes, and their storages `references`."""

    def aliases(
        self,
        tensors: Sequence[torch.Tensor],
        sizes: Sequence[Sequence[int]],
        strides: Sequence[Sequence[int]],
        beyond: Sequence[int],
        /,
    ) -> list[torch.Tensor]:
        """`alias` of each."""

    def resized(
        self, tensors: Sequence[torch.Tensor], dim: int, rows: Sequence[int], addresses: Sequence[int], /
    ) -> list[torch.Tensor]:
        """Tensors with so many rows along `dim`, from these addresses on, in the memory of those given.

        The same objects, where that is possible and nobody would notice; so nobody may hold them who does not
        know of it. The strides stay.
        """

    def held_once(self, dicts: Sequence[dict[str, Any]], names: Sequence[str], /) -> list[Any] | None:
        """What the dicts have by these names; None where something else holds some of it."""


class PythonLoops:
    """In Python."""

    @staticmethod
    def forms(tensors: Sequence[torch.Tensor], but: int, /) -> Any:
        """As in `Loops`."""
        sizes: Any = [[*each.shape] for each in tensors]
        for each in sizes:
            each[but : but + 1] = [None] * (but >= 0)
        strides: Any = [[*each.stride()] for each in tensors]
        return guards.TensorGuards(*tensors, dynamic_dims_sizes=sizes, dynamic_dims_strides=strides)

    @staticmethod
    def forms_are(tensors: Sequence[torch.Tensor], forms: Any, /) -> bool:
        """As in `Loops`."""
        return bool(forms.check(*tensors))

    @staticmethod
    def types_are(objects: Sequence[Any], types: Sequence[type], /) -> bool:
        """As in `Loops`."""
        return list(map(type, objects)) == list(types)

    @staticmethod
    def dicts_are(objects: Sequence[Any], dicts: Sequence[dict[str, Any]], /) -> bool:
        """As in `Loops`."""
        return all(map(is_, map(vars, objects), dicts))

    @staticmethod
    def codes(functions: Sequence[FunctionType], /) -> Any:
        """As in `Loops`."""
        return [part for each in functions for part in _CODE(each)]

    @staticmethod
    def codes_are(functions: Sequence[FunctionType], codes: Any, /) -> bool:
        """As in `Loops`."""
        return all(map(is_, (part for each in functions for part in _CODE(each)), codes))

    @staticmethod
    def versions(dicts: Sequence[dict[Any, Any]], /) -> Any:
        """As in `Loops`. From Python 3.12 on an empty dict that is filled from another keeps its version."""
        return [*map(guards.dict_version, dicts), *map(len, dicts)]

    @staticmethod
    def versions_are(dicts: Sequence[dict[Any, Any]], versions: Any, /) -> bool:
        """As in `Loops`."""
        return bool(PythonLoops.versions(dicts) == versions)

    @staticmethod
    def references(tensor: torch.Tensor, /) -> tuple[int, int]:
        """As in `Loops`."""
        shared, held = _references([tensor])
        return shared[0], held[0]

    @staticmethod
    def are_alone(
        tensors: Sequence[torch.Tensor],
        addresses: Sequence[int],
        sizes: Sequence[int],
        references: tuple[int, int],
        /,
    ) -> bool:
        """As in `Loops`."""
        if list(map(_data_ptr, tensors)) != list(addresses) or [each.nbytes for each in tensors] != list(
            sizes
        ):
            return False
        shared, held = _references(tensors)
        return shared.count(references[0]) == held.count(references[1]) == len(tensors)

    @staticmethod
    def aliases(
        tensors: Sequence[torch.Tensor],
        sizes: Sequence[Sequence[int]],
        strides: Sequence[Sequence[int]],
        beyond: Sequence[int],
        /,
    ) -> list[torch.Tensor]:
        """As in `Loops`."""
        return list(map(alias, tensors, sizes, strides, beyond))

    @staticmethod
    def resized(
        tensors: Sequence[torch.Tensor], dim: int, rows: Sequence[int], addresses: Sequence[int], /
    ) -> list[torch.Tensor]:
        """As in `Loops`. Python cannot change a tensor without others noticing: these are always new ones."""
        return [
            alias(
                tensor, (*tensor.shape[:dim], size, *tensor.shape[dim + 1 :]), tensor.stride(),
                (address - tensor.data_ptr()) // tensor.element_size(),
            )
            for tensor, size, address in zip(tensors, rows, addresses, strict=True)
        ]  # fmt: skip

    @staticmethod
    def held_once(dicts: Sequence[dict[str, Any]], names: Sequence[str], /) -> list[Any] | None:
        """As in `Loops`."""
        found = list(map(dict.get, dicts, names))
        return found if list(map(getrefcount, found)).count(_when_held_once()) == len(found) else None


def _references(tensors: Sequence[torch.Tensor]) -> tuple[list[int], list[int]]:
    storages = list(map(_storage_of, tensors))
    return [_use_count(storage._cdata) for storage in storages], list(map(getrefcount, storages))


@functools.cache
def _when_held_once() -> int:
    """What `getrefcount` gives in `PythonLoops.held_once`: how long a caller keeps an argument differs."""
    held = [{"tensor": torch.zeros(1)}]
    found = list(map(dict.get, held, ["tensor"]))
    return list(map(getrefcount, found))[0]


class Current:
    """Which loops are used.

    Attributes:
        loops: these.
    """

    def __init__(self) -> None:
        self.loops: Loops = PythonLoops()
        self._build: threading.Thread | None = None

    def build(self, *, wait: bool = False) -> None:
        """Compile those in C++ once, in a thread of its own, and use them from then on."""
        if self._build is None:
            self._build = in_background("step-loops", self._use_compiled)
        if wait:
            self._build.join()

    def _use_compiled(self) -> None:
        try:
            self.loops = _compiled()
        except Exception as error:
            log.debug("loops over a step's tensors stay in Python: %s: %s", type(error).__name__, error)


CURRENT = Current()


def _compiled() -> Any:
    """The module of `step_loops.cpp`, from Inductor's cache where it is there."""
    path = library_of(_SOURCE)
    spec = importlib.util.spec_from_file_location(_SOURCE.stem, path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    for name in ("versions", "versions_are"):
        if not hasattr(module, name):  # from Python 3.12 on, where only torch can tell
            setattr(module, name, getattr(PythonLoops, name))
    return module
