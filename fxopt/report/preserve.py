"""A call that leaves no trace: modes, buffers and random state are put back."""

from __future__ import annotations

import contextlib
import random
import sys
from collections.abc import Iterator
from typing import Any

import torch


@contextlib.contextmanager
def preserved(module: torch.nn.Module | None) -> Iterator[None]:
    """Inside, `module` may be called; afterwards it, the grad mode and the random generators are as before.

    Parameters and their ``.grad`` are not copied: a forward pass does not write to them.
    """
    with contextlib.ExitStack() as stack:
        stack.enter_context(torch.set_grad_enabled(torch.is_grad_enabled()))
        stack.enter_context(_random_state())
        if module is not None:
            stack.enter_context(_modes(module))
            stack.enter_context(_buffers(module))
            stack.enter_context(_not_compiled(module))
        yield


@contextlib.contextmanager
def _random_state() -> Iterator[None]:
    devices = list(range(torch.cuda.device_count())) if torch.cuda.is_initialized() else []
    python = random.getstate()
    numpy: Any = sys.modules.get("numpy")
    theirs = numpy.random.get_state() if numpy is not None else None
    try:
        with torch.random.fork_rng(devices=devices):
            yield
    finally:
        random.setstate(python)
        if numpy is not None:
            numpy.random.set_state(theirs)


@contextlib.contextmanager
def _modes(module: torch.nn.Module) -> Iterator[None]:
    training = [(part, part.training) for part in module.modules()]
    try:
        yield
    finally:
        for part, was in training:
            part.training = was


@contextlib.contextmanager
def _buffers(module: torch.nn.Module) -> Iterator[None]:
    """Running statistics and caches that the module holds itself."""
    kept = [(part, name, buffer) for part in module.modules() for name, buffer in part._buffers.items()]
    copies = [(buffer, buffer.detach().clone()) for _, _, buffer in kept if buffer is not None]
    try:
        yield
    finally:
        for part, name, buffer in kept:
            part._buffers[name] = buffer
        with torch.no_grad():
            for buffer, copy in copies:
                if not buffer.is_meta and not torch.equal(buffer, copy):
                    buffer.copy_(copy)


@contextlib.contextmanager
def _not_compiled(module: torch.nn.Module) -> Iterator[None]:
    """`module.compile()` replaces a module's call; what is to be explained is the call underneath."""
    compiled = [(part, part._compiled_call_impl) for part in module.modules() if part._compiled_call_impl]
    for part, _ in compiled:
        part._compiled_call_impl = None
    try:
        yield
    finally:
        for part, call in compiled:
            part._compiled_call_impl = call
