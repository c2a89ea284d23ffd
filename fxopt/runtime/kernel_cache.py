"""Emitted kernels, and what was measured of them, as files in a directory that processes share.

A kernel's file is named by the hash of its text and of the versions of torch and triton; what was measured is
named by the hash of its key. The last line of each file holds the hash of all before it, so a file that is
truncated, edited or broken never passes for what was written: it is written anew. Files appear by renaming: a
reader sees all of one or nothing. The least recently used go when the directory has grown too large. Where
nothing can be written (read-only or full disk) all stays in memory, after one warning.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import json
import linecache
import os
import sys
import tempfile
import threading
import time
import types
import warnings
from collections.abc import Iterator
from dataclasses import dataclass, field
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import TYPE_CHECKING, Any

from filelock import FileLock, Timeout

if TYPE_CHECKING:
    from fxopt.codegen.kernel_file import KernelFile
    from fxopt.options import Options

_FOOTER = "# sha256 of the text above: "
# Writes between two looks at the size of the directory.
_CHECK_EVERY = 32
# Seconds after which a temporary file is taken for one of a process that was ended.
_ABANDONED = 3600


class KernelCacheWarning(UserWarning):
    """The directory of kernels cannot be written."""


def cache_of(options: Options) -> KernelCache:
    """The cache that the options name. The same options give the same object."""
    directory = options.cache_dir or os.path.join(_user_cache_directory(), "kernels")
    return _cache(os.path.abspath(os.path.expanduser(directory)), options.cache_mib << 20)


def _user_cache_directory() -> str:
    """Asked for only where no directory is given, which needs no more than torch and triton."""
    import platformdirs

    return platformdirs.user_cache_dir("fxopt")


def default_cache() -> KernelCache:
    """The cache of the default options, in which the environment has its say."""
    from fxopt.options import Options

    return cache_of(Options.parse())


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
        values: what this process has remembered, by file name.
    """

    directory: Path
    limit: int = 1 << 30
    modules: dict[str, types.ModuleType] = field(default_factory=dict)
    values: dict[str, Any] = field(default_factory=dict)
    _lock: threading.RLock = field(default_factory=threading.RLock, repr=False)
    _writes: int = 0
    _broken: bool = False

    def path(self, name: str, text: str) -> Path:
        """Where the file of this text is, or would be."""
        return self.directory / f"{name}_{_short_hash(_versions(), text)}.py"

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

    def recall(self, *key: str) -> Any | None:
        """What was remembered under the key, by this process or an earlier one; None if nothing was."""
        path = self._value_path(key)
        with self._lock:
            if path.name not in self.values:
                with contextlib.suppress(ValueError, KeyError, TypeError):
                    entry = json.loads(self.read(path) or "{}")
                    if entry["key"] == list(key):
                        self.values[path.name] = entry["value"]
                        _touch(path)
            return self.values.get(path.name)

    def remember(self, value: Any, *key: str) -> None:
        """Keep a value (numbers, texts, lists and dicts of them) under a key."""
        path = self._value_path(key)
        with self._lock:
            self.values[path.name] = value
            self.store(path, json.dumps({"key": key, "value": value}, sort_keys=True) + "\n")

    def _value_path(self, key: tuple[str, ...]) -> Path:
        return self.directory / f"value_{_short_hash(*key)}.json"

    def store(self, path: Path, text: str) -> bool:
        """Make sure that the file holds the text, and is the most recently used. False if it cannot be."""
        if self.read(path) == text:
            _touch(path)
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
            for path in self.directory.iterdir():
                if path.suffix in (".py", ".json"):
                    with contextlib.suppress(OSError):
                        found.append((path, path.stat()))
        return sorted(found, key=lambda entry: (entry[1].st_mtime, entry[0].name))

    def trim(self) -> int:
        """Remove the least recently used files until nine tenths of the limit are met; their number."""
        self._remove_abandoned()
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
                removed, size = removed + _unlink(path), size - state.st_size
        return removed

    def _remove_abandoned(self) -> None:
        with contextlib.suppress(OSError):
            for path in self.directory.glob("*.tmp"):
                if time.time() - path.stat().st_mtime > _ABANDONED:
                    _unlink(path)

    def clear(self) -> int:
        """Remove all files. How many there were. Loaded kernels go on to work."""
        with self._lock:
            self.values.clear()
        return sum(_unlink(path) for path, _ in self.entries())

    def read(self, path: Path) -> str | None:
        """The text that was stored there; None if there is none or it is not intact."""
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
        lock = FileLock(self.directory / ".lock", timeout=0)
        try:
            lock.acquire()
        except (Timeout, OSError):
            yield False
            return
        try:
            yield True
        finally:
            lock.release()


def _short_hash(*texts: str) -> str:
    return hashlib.sha256("\n".join(texts).encode()).hexdigest()[:20]


def _touch(path: Path) -> None:
    """Make it the most recently used."""
    with contextlib.suppress(OSError):
        os.utime(path)


def _unlink(path: Path) -> int:
    """Remove a file, and count it; another process may have been first."""
    try:
        path.unlink()
    except OSError:
        return 0
    return 1


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
