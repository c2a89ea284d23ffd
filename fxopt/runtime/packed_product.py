"""Calls of ``fxopt::packed_product`` that go to a C++ function without Python in between.

Python needs some 30 us a call around a product, more than many products take. `packed_product.cpp` takes the
op over in torch's dispatcher. It is compiled once, in a thread of its own, beside the first products; until
then, and where there is no compiler, all of them are called from Python.
"""

from __future__ import annotations

import ctypes
import logging
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from fxopt.ir.ops.op import NAMESPACE
from fxopt.runtime.native_code import in_background, library_of

log = logging.getLogger("fxopt")

_SOURCE = Path(__file__).with_suffix(".cpp")
# How many kinds `packed_product.cpp` has room for.
_MOST = 64


class Kind(ctypes.Structure):
    """`Kind` of packed_product.cpp."""

    _fields_ = (
        ("format", ctypes.c_char_p),
        ("activation", ctypes.c_char_p),
        ("table", ctypes.c_void_p),
        ("compute", ctypes.c_void_p),
        *((name, ctypes.c_int64) for name in ("least_tokens", "most_tokens")),
        *((name, ctypes.c_int32) for name in ("x_number", "code", "bits", "whole", "in_blocks")),
    )


class Shortcut:
    """The op as Python registers it, until it is taken over, and the kinds that are allowed."""

    def __init__(self, implementation: Callable[..., Any]) -> None:
        self._implementation = implementation
        self._library = self._in_python()
        self._native: Any = None
        self._build: threading.Thread | None = None
        self._kinds: dict[tuple[Any, ...], Kind] = {}
        self._lock = threading.Lock()

    def allow(self, key: tuple[Any, ...], make: Callable[[], Kind]) -> None:
        """Calls of a kind may go to its function. `key`: what it is called for.

        The first one has `packed_product.cpp` compiled.
        """
        if key in self._kinds:
            return
        with self._lock:
            if key in self._kinds or len(self._kinds) == _MOST:
                return
            self._kinds[key] = make()
            if self._native is not None:
                self._native.fxopt_allow(ctypes.byref(self._kinds[key]))
            elif self._build is None:
                self._build = in_background("products", self._take_over)

    def wait(self) -> bool:
        """Until it is compiled; whether calls go there."""
        if self._build is not None:
            self._build.join()
        return self._native is not None

    def _take_over(self) -> None:
        try:
            path = library_of(_SOURCE)
        except Exception as error:
            log.debug("products are called from Python: %s: %s", type(error).__name__, error)
            return
        with self._lock:
            self._library._destroy()
            try:
                native = ctypes.CDLL(str(path))
            except OSError as error:
                log.debug("products are called from Python: %s", error)
                self._library = self._in_python()
                return
            for kind in self._kinds.values():
                native.fxopt_allow(ctypes.byref(kind))
            self._native = native

    def _in_python(self) -> torch.library.Library:
        library = torch.library.Library(NAMESPACE, "IMPL")
        library.impl("packed_product", self._implementation, "CPU")
        return library
