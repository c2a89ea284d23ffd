"""A driver for Triton that launches nothing: what is left of a launch is what the host does for it.

Kernels are compiled as ever, for a GPU that need not be there; tensors may lie on the CPU.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from fxopt.ir.target import Target


@dataclass
class StubDriver:
    """As much of Triton's driver as compilation and launches ask for.

    Attributes:
        launched: the arguments of every launch, in order, if `keeps`: grid, stream, function, and so on.
        loaded: the binaries that were loaded, by the number that stands for their function.
    """

    target: Target
    keeps: bool = True
    launched: list[tuple[Any, ...]] = field(default_factory=list)
    loaded: dict[int, bytes] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self._numbers = itertools.count(1)
        self.utils = SimpleNamespace(
            load_binary=self._load,
            get_device_properties=lambda device: {
                "max_shared_mem": self.target.shared_per_block,
                "multiprocessor_count": self.target.sms,
            },
        )

    def launcher_cls(self, source: Any, metadata: Any) -> Any:
        return self._launch if self.keeps else _nothing

    def get_current_target(self) -> Any:
        from triton.backends.compiler import GPUTarget

        return GPUTarget(self.target.backend, self.target.arch, self.target.warp_size)

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int) -> int:
        return 0

    def _load(self, name: str, binary: bytes, shared: int, device: int) -> tuple[int, int, int, int, int]:
        function = next(self._numbers)
        self.loaded[function] = binary
        return function, function, 0, 0, 1024

    def _launch(self, *arguments: Any) -> None:
        self.launched.append(arguments)


def _nothing(*arguments: Any) -> None:
    pass


@contextmanager
def stubbed(target: Target, *, keeps: bool = True) -> Iterator[StubDriver]:
    """Meanwhile Triton launches through a stub."""
    from triton.runtime import driver

    kept, stub = driver._active, StubDriver(target, keeps)
    driver._active = stub
    try:
        yield stub
    finally:
        driver._active = kept
