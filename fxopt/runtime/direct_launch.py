"""Launches of a kernel's file, past what Triton does at each of them.

`JITFunction.run` binds arguments by name, specialises every one of them, makes a text of options for a key,
and looks that up. A file's launches differ in nothing but the tensors and sizes, so here the key is what can
differ: where a pointer is aligned, and of which kind a size is. The first launch of a key goes through
Triton, which compiles it and hands back what it has compiled; the following ones call that.
"""

from __future__ import annotations

from collections.abc import Callable
from operator import itemgetter
from typing import TYPE_CHECKING, Any

import torch

if TYPE_CHECKING:
    from fxopt.codegen.kernel_file import Launch

# How Triton compiles assertions in, without others of its own about the overflow of every sum.
ASSERTING = {"debug": True, "sanitize_overflow": False}
_ALIGNMENT = 15  # bits of an address, or of a size, that Triton asks for
_INT32 = 1 << 31
_TYPES = {
    "*fp64": torch.float64,
    "*fp32": torch.float32,
    "*fp16": torch.float16,
    "*bf16": torch.bfloat16,
    "*i64": torch.int64,
    "*i32": torch.int32,
    "*i16": torch.int16,
    "*i8": torch.int8,
    "*u8": torch.uint8,
    "*i1": torch.bool,
}
Grid = tuple[int, ...]


class DirectLaunch:
    """One launch of a file: ``DirectLaunch(function, launch)[grid](x_ptr=x, ...)``, as the file writes it.

    Pointers that are not aligned, tensors of another dtype, hooks on launches, and arguments that are no
    tensors and integers go through Triton each time.
    """

    def __init__(self, function: Any, launch: Launch) -> None:
        from triton import knobs
        from triton.runtime import driver

        self.function = function
        self._driver, self._knobs = driver, knobs.runtime
        names = [one.name for one in launch.arguments]
        places = list(enumerate(launch.arguments))
        self._pointers = [(place, _TYPES.get(one.type)) for place, one in places if one.type[0] == "*"]
        self._numbers = [place for place, one in places if one.type[0] != "*"]
        named = [*names, *dict(launch.constants)]
        # Of what a file gives, in the order of the function's parameters.
        order = [named.index(name) for name in function.arg_names if name in named]
        is_complete = 1 < len(order) == len(named) == len(function.arg_names)
        self._in_order: Any = itemgetter(*order) if is_complete else None
        self._compiled: dict[tuple[Any, ...], Any] = {}

    def __getitem__(self, grid: Grid) -> Callable[..., None]:
        def run(**given: Any) -> None:
            self.run(grid, given)

        return run

    def run(self, grid: Grid, given: dict[str, Any]) -> None:
        """Launch on the current stream of the current device. `given`: as the file gives it, in its order."""
        driver = self._driver.active
        device = driver.get_current_device()
        values = tuple(given.values())
        key = self._key(device, values)
        compiled = self._compiled.get(key) if key is not None else None
        if compiled is None:
            compiled = self.function[grid](**given)
            if key is not None and compiled is not None:
                self._compiled[key] = compiled
            return
        height = grid[1] if len(grid) > 1 else 1
        depth = grid[2] if len(grid) > 2 else 1
        stream, function = driver.get_current_stream(device), compiled.function
        hooks = None, None
        described = compiled.packed_metadata, None
        ordered = self._in_order(values)
        compiled.run(grid[0], height, depth, stream, function, *described, *hooks, *ordered)

    def _key(self, device: int, values: tuple[Any, ...]) -> tuple[Any, ...] | None:
        """What Triton would compile for; None where it is to look for itself."""
        if self._in_order is None or _is_watched(self._knobs, self.function):
            return None
        addresses = 0
        for place, dtype in self._pointers:
            tensor = values[place]
            if type(tensor) not in _TENSORS or tensor.dtype is not dtype:
                return None
            addresses |= tensor.data_ptr()
        if addresses & _ALIGNMENT:
            return None
        if not self._numbers:
            return (device,)
        kinds = [_kind(values[place]) for place in self._numbers]
        return None if None in kinds else (device, *kinds)


_TENSORS = (torch.Tensor, torch.nn.Parameter)


def _kind(number: Any) -> int | None:
    """Numbers of one kind are compiled for together: one, or others of 32 bits by divisibility."""
    if type(number) is not int:
        return None
    if number == 1:
        return 1
    if not -_INT32 <= number < _INT32:
        return None
    return 2 if number & _ALIGNMENT else 3


def _is_watched(runtime: Any, function: Any) -> bool:
    """Whether somebody, such as a profiler, wants to know of every launch, or has changed how to compile."""
    if runtime.debug or function.pre_run_hooks:
        return True
    return _is_called(runtime.launch_enter_hook) or _is_called(runtime.launch_exit_hook)


def _is_called(hook: Any) -> bool:
    """Triton has a chain of hooks, or one or none before it had chains."""
    return hook is not None and bool(getattr(hook, "calls", True))
