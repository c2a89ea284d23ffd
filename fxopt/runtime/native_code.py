"""Shared libraries from the C++ files beside this one, compiled once and kept beside Inductor's cache."""

from __future__ import annotations

import ctypes
import hashlib
import logging
import os
import sys
import tempfile
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

log = logging.getLogger("fxopt")

# `Number` of wide_numbers.h.
NUMBERS = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}


_builds: list[threading.Thread] = []


def in_background(name: str, build: Callable[[], None]) -> threading.Thread:
    """Run a function that compiles in a thread of its own, which `wait_for_builds` waits for."""
    thread = threading.Thread(target=build, name=f"fxopt-{name}", daemon=True)
    _builds.append(thread)
    thread.start()
    return thread


def wait_for_builds() -> None:
    """Return when all that is compiled in the background is in use: before something is timed."""
    while _builds:
        _builds.pop().join()


def kernels_of(source: Path, without: str) -> Any:
    """The compiled form of a file that has a function `fxopt_has_kernels`, loaded; None where it cannot be
    used. There is no compiler then, which the log says, with what is done `without` it, or this processor has
    not the instructions.
    """
    try:
        library = ctypes.CDLL(str(library_of(source)))
    except Exception as error:
        log.info("fxopt: %s: %s", without, error)
        return None
    return library if library.fxopt_has_kernels() else None


def library_of(source: Path) -> Path:
    """The compiled form of a file, made now unless it is in the cache.

    One that is damaged, by a full disk perhaps, is made anew.

    It may use torch's headers, those beside it, and any instruction of this processor. The key of the cache
    is made of the text, that of the headers beside it, the versions of torch and Python, and the processor.

    Raises:
        Exception: whatever Inductor's builder raises where there is no compiler.
    """
    from filelock import FileLock
    from torch._inductor.runtime.cache_dir_utils import cache_dir

    abi, processor = torch._C._GLIBCXX_USE_CXX11_ABI, torch.backends.cpu.get_cpu_capability()
    texts = [each.read_text() for each in (source, *sorted(source.parent.glob("*.h")))]
    key = (*texts, torch.__version__, sys.version, abi, processor, _features())
    name = hashlib.sha256(repr(key).encode()).hexdigest()[:16]
    path = Path(cache_dir(), "fxopt", f"{source.stem}-{name}.so")
    if _is_intact(path):
        return path
    path.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(path.with_suffix(".lock")):  # others wait for the first process that compiles it
        if not _is_intact(path):
            with tempfile.TemporaryDirectory(dir=path.parent) as folder:
                built = _build_in(source, folder)
                _sum_file(path).write_text(_sum(Path(built)))
                os.replace(built, path)
    return path


def _is_intact(path: Path) -> bool:
    """It is all of what was built. The process would end where a library is loaded that was cut off."""
    try:
        return _sum_file(path).read_text() == _sum(path)
    except (OSError, UnicodeDecodeError):
        return False


def _sum_file(path: Path) -> Path:
    return path.with_suffix(".sha256")


def _sum(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def _features() -> str:
    """What this processor can do, where the system says so: a cache may be shared between machines."""
    try:
        text = Path("/proc/cpuinfo").read_text()
    except OSError:
        return ""
    return next((line for line in text.splitlines() if line.startswith(("flags", "Features"))), "")


def _build_in(source: Path, folder: str) -> str:
    from torch._inductor.cpp_builder import CppBuilder, CppTorchOptions

    options = CppTorchOptions(include_pytorch=True, warning_all=False)
    builder = CppBuilder(source.stem, str(source), options, folder)
    builder.build()
    return str(builder.get_target_file_path())
