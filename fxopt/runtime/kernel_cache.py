"""Emitted kernels as files in a directory: content-addressed, validated, bounded, shared by processes.

A file's name ends in the hash of its text and of the versions of torch and triton; its last line holds the
hash of the text before it. A file that is truncated, edited or broken therefore never passes for the kernel:
it is written anew. Files appear by renaming, so a reader sees all of one or nothing. Where nothing can be
written (read-only or full disk) kernels live in memory, after one warning.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import linecache
import os
import sys
import tempfile
import threading
import types
import warnings
from collections.abc import Iterator
from dataclasses import dataclass, field
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import TYPE_CHECKING

from filelock import FileLock, Timeout

if TYPE_CHECKING:
    from fxopt.codegen.kernel_file import KernelFile
    from fxopt.options import Options

_FOOTER = "# sha256 of the text above: "
_CHECK_EVERY = 32
"""Writes between two looks at the size of the directory."""


class KernelCacheWarning(UserWarning):
    """The directory of kernels cannot be written."""


def cache_of(options: Options) -> KernelCache:
    """The cache that the options name. The same options give the same object."""
    import platformdirs

    directory = options.cache_dir or os.path.join(platformdirs.user_cache_dir("fxopt"), "kernels")
    return _cache(os.path.abspath(directory), options.cache_mib << 20)


@functools.cache
def _cache(directory: str, limit: int) -> KernelCache:
    return KernelCache(Path(directory), limit)


@functools.cache
def _versions() -> str:
    """What a text means can depend on these."""
    found = []
    for name in ("torch", "triton"):
        with contextlib.suppress(PackageNotFoundError):
            found.append(f"{name} {version(name)}")
    return ", ".join(found)


def sealed(text: str) -> str:
    """The text as it is stored: with its hash on the last line."""
    return f"{text}{_FOOTER}{hashlib.sha256(text.encode()).hexdigest()}\n"


def unsealed(stored: str) -> str | None:
    """The text of what was stored; None when it is not what was once written."""
    text = stored.rpartition(_FOOTER)[0]
    return text if text and sealed(text) == stored else None


@dataclass
class KernelCache:
    """Kernels' files below `directory`, of together at most `limit` bytes or one more than the last look.

    Attributes:
        modules: what this process has loaded, by file name; held, as compiled graphs call them.
    """

    directory: Path
    limit: int = 1 << 30
    modules: dict[str, types.ModuleType] = field(default_factory=dict)
    _lock: threading.RLock = field(default_factory=threading.RLock, repr=False)
    _writes: int = 0
    _broken: bool = False

    def path(self, name: str, text: str) -> Path:
        """Where the file of this text is, or would be."""
        key = hashlib.sha256(f"{_versions()}\n{text}".encode()).hexdigest()
        return self.directory / f"{name}_{key[:20]}.py"

    def load(self, kernel: KernelFile) -> types.ModuleType:
        """The kernel's file as a module; written if it is not there or not intact."""
        text = kernel.render()
        path = self.path(kernel.name, text)
        with self._lock:
            module = self.modules.get(path.name)
            if module is None:
                self.store(path, text)
                module = self.modules[path.name] = _executed(path, text)
            return module

    def store(self, path: Path, text: str) -> bool:
        """Make sure that the file holds the text, and is the most recently used. False if it cannot be."""
        if self._read(path) == text:
            with contextlib.suppress(OSError):
                os.utime(path)
            return True
        try:
            self.directory.mkdir(parents=True, exist_ok=True)
            _write(path, sealed(text))
        except OSError as error:
            self._warn(error)
            return False
        self._writes += 1
        if self._writes % _CHECK_EVERY == 1:
            self.trim()
        return True

    def entries(self) -> list[tuple[Path, os.stat_result]]:
        """All files with their state, the least recently used first."""
        found = []
        with contextlib.suppress(OSError):
            for path in self.directory.glob("*.py"):
                with contextlib.suppress(OSError):
                    found.append((path, path.stat()))
        return sorted(found, key=lambda entry: (entry[1].st_mtime, entry[0].name))

    def trim(self) -> int:
        """Remove the least recently used files until nine tenths of the limit are met; their number."""
        entries = self.entries()
        size = sum(state.st_size for _, state in entries)
        if size <= self.limit:
            return 0
        removed = 0
        with self._alone() as alone:
            # The newest stays, whatever its size: it is about to be used.
            for path, state in entries[:-1] if alone else ():
                if size <= 0.9 * self.limit:
                    break
                with contextlib.suppress(OSError):
                    path.unlink()
                    removed, size = removed + 1, size - state.st_size
        return removed

    def clear(self) -> int:
        """Remove all files. How many there were. Loaded kernels go on to work."""
        entries = self.entries()
        for path, _ in entries:
            with contextlib.suppress(OSError):
                path.unlink()
        return len(entries)

    def _read(self, path: Path) -> str | None:
        try:
            return unsealed(path.read_text())
        except (OSError, UnicodeDecodeError):
            return None

    def _warn(self, error: OSError) -> None:
        if not self._broken:
            self._broken = True
            warnings.warn(
                f"kernels cannot be written to {self.directory} ({error}); they are kept in memory. "
                "Name another directory by FXOPT_CACHE_DIR.",
                KernelCacheWarning,
                stacklevel=3,
            )

    @contextlib.contextmanager
    def _alone(self) -> Iterator[bool]:
        """True for one process at a time; the others need not do what that one does."""
        try:
            with FileLock(self.directory / ".lock", timeout=0):
                yield True
        except (Timeout, OSError):
            yield False


def _write(path: Path, text: str) -> None:
    """Write to a file beside it and rename: another process sees the old file or the new one."""
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=path.stem, suffix=".tmp")
    try:
        with os.fdopen(handle, "w") as file:
            file.write(text)
        os.replace(temporary, path)
    except BaseException:
        with contextlib.suppress(OSError):
            os.unlink(temporary)
        raise


def _executed(path: Path, text: str) -> types.ModuleType:
    """The text as a module. Its lines are given to `linecache`: Triton reads the source of its functions,
    also of a file that could not be written or is removed later."""
    name = f"fxopt_kernel_{path.stem}"
    module = types.ModuleType(name)
    module.__file__ = str(path)
    linecache.cache[str(path)] = (len(text), None, text.splitlines(keepends=True), str(path))
    sys.modules[name] = module
    try:
        exec(compile(text, str(path), "exec"), module.__dict__)
    except BaseException:
        del sys.modules[name]
        raise
    return module
