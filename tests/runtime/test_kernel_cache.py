"""The directory of kernels: the broken is mended, the old goes, processes do not disturb each other."""

from __future__ import annotations

import errno
import os
import subprocess
import sys
import time
import warnings
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from fxopt.codegen.kernel_file import KernelFile
from fxopt.options import Options
from fxopt.runtime import kernel_cache
from fxopt.runtime.kernel_cache import KernelCache, KernelCacheWarning, cache_of
from support import kernels


def _numbered(number: int) -> KernelFile:
    return replace(kernels.add(), name=f"add_{number}")


def _path(cache: KernelCache, kernel: KernelFile) -> Path:
    return cache.path(kernel.name, kernel.render())


def test_a_kernel_is_written_once_and_loaded_once(tmp_path: Path) -> None:
    cache = KernelCache(tmp_path / "new" / "folder")
    module = cache.load(kernels.add())
    assert cache.load(kernels.add()) is module
    path = _path(cache, kernels.add())
    assert module.__file__ == str(path)
    assert path.read_text().startswith(kernels.add().render())
    before = path.stat().st_ino
    assert KernelCache(cache.directory).load(kernels.add()) is not module
    assert path.stat().st_ino == before, "not written again"


@pytest.mark.parametrize(
    "damage",
    [
        lambda text: text[: len(text) // 2],
        lambda text: "",
        lambda text: text.replace("1.5", "2.5"),
        lambda text: text + "import os\n",
        lambda text: text.rpartition("# sha256")[0],
    ],
    ids=["truncated", "empty", "edited", "appended", "without its hash"],
)
def test_a_damaged_file_is_written_anew_and_never_run(tmp_path: Path, damage: Any) -> None:
    path = _path(KernelCache(tmp_path), kernels.add())
    KernelCache(tmp_path).load(kernels.add())
    right = path.read_text()
    path.write_text(damage(right))
    module = KernelCache(tmp_path).load(kernels.add())
    assert path.read_text() == right
    assert "1.5" in module._add_kernel.src


def test_bytes_that_are_no_text_are_damage(tmp_path: Path) -> None:
    path = _path(KernelCache(tmp_path), kernels.add())
    path.write_bytes(b"\xff\xfe\x00")
    KernelCache(tmp_path).load(kernels.add())
    assert path.read_text().startswith(kernels.add().render())


def test_other_versions_have_other_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cache = KernelCache(tmp_path)
    before = _path(cache, kernels.add())
    monkeypatch.setattr(kernel_cache, "_versions", lambda: "torch 99")
    assert _path(cache, kernels.add()) != before


def test_the_least_recently_used_go_first(tmp_path: Path) -> None:
    cache = KernelCache(tmp_path)
    paths = []
    for number in range(4):
        cache.load(_numbered(number))
        paths.append(_path(cache, _numbered(number)))
        os.utime(paths[-1], (1000 + number, 1000 + number))
    KernelCache(tmp_path).load(_numbered(0))  # used again
    cache.limit = sum(path.stat().st_size for path in paths) - 1
    assert cache.trim() == 1
    assert [path.exists() for path in paths] == [True, False, True, True]


def test_writing_trims_but_keeps_what_was_just_written(tmp_path: Path) -> None:
    for number in range(3):
        KernelCache(tmp_path, limit=10).load(_numbered(number))
    assert [path.name for path, _ in KernelCache(tmp_path).entries()] == [
        _path(KernelCache(tmp_path), _numbered(2)).name
    ]


def test_files_of_processes_that_were_ended_go_and_young_ones_stay(tmp_path: Path) -> None:
    old, young = tmp_path / "a.tmp", tmp_path / "b.tmp"
    for path in (old, young):
        path.write_text("half")
    hours_ago = time.time() - 7200
    os.utime(old, (hours_ago, hours_ago))
    KernelCache(tmp_path).trim()
    assert (old.exists(), young.exists()) == (False, True)


def test_a_directory_that_cannot_be_made_is_one_warning(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    cache = KernelCache(tmp_path / "file" / "below")
    with pytest.warns(KernelCacheWarning, match="FXOPT_CACHE_DIR") as caught:
        modules = [cache.load(_numbered(number)) for number in range(3)]
    assert len(caught) == 1
    # Triton reads the source of its functions: it must be there without a file.
    assert "tl.store" in modules[0]._add_kernel.src


def test_a_full_disk_leaves_no_half_of_a_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    cache = KernelCache(tmp_path)
    monkeypatch.setattr(os, "replace", full)
    with pytest.warns(KernelCacheWarning, match="No space left"):
        cache.load(kernels.add())
    assert list(tmp_path.iterdir()) == []
    monkeypatch.undo()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        cache.load(_numbered(1))
    assert _path(cache, _numbered(1)).exists(), "tried again when there is space"


def test_values_are_remembered_across_processes_and_by_their_whole_key(tmp_path: Path) -> None:
    value = {"num_warps": 8, "seconds": [1.5e-6, 2.0]}
    KernelCache(tmp_path).remember(value, "digest", "rows<=4096", "H200")
    later = KernelCache(tmp_path)
    assert later.recall("digest", "rows<=4096", "H200") == value
    assert later.recall("digest", "rows<=4096", "H100") is None
    (path,) = tmp_path.glob("*.json")
    path.write_text(path.read_text().replace("8", "9"))
    assert KernelCache(tmp_path).recall("digest", "rows<=4096", "H200") is None


def test_clearing_leaves_loaded_kernels_alone(tmp_path: Path) -> None:
    cache = KernelCache(tmp_path)
    module = cache.load(kernels.add())
    cache.remember(1, "key")
    assert cache.clear() == 2
    assert (cache.entries(), cache.recall("key")) == ([], None)
    assert "tl.store" in module._add_kernel.src


def test_two_processes_write_and_trim_at_once(tmp_path: Path) -> None:
    """Each writes the same kernels and keeps the directory small; neither ever reads a broken file."""
    code = """
import sys
sys.path[:0] = sys.argv[2:]
from contextlib import suppress
from pathlib import Path
from fxopt.runtime.kernel_cache import KernelCache, unsealed
cache = KernelCache(Path(sys.argv[1]), limit=20_000)
for turn in range(40):
    for number in range(8):
        text = f"# kernel {number}\\n" * 400
        assert cache.store(cache.path("kernel", text), text)
    cache.trim()
    for path, _ in cache.entries():
        with suppress(FileNotFoundError):
            assert unsealed(path.read_text()) is not None
"""
    tests = Path(__file__).parent.parent
    command = [sys.executable, "-c", code, str(tmp_path), str(tests.parent)]
    processes = [subprocess.Popen(command, stderr=subprocess.PIPE, text=True) for _ in range(2)]
    for process in processes:
        _, said = process.communicate(timeout=60)
        assert process.returncode == 0, said
    cache = KernelCache(tmp_path, limit=20_000)
    cache.trim()
    assert cache.entries()
    assert all(cache.read(path) is not None for path, _ in cache.entries())
    assert sum(state.st_size for _, state in cache.entries()) <= 20_000
    assert not list(tmp_path.glob("*.tmp"))


def test_options_name_the_directory(tmp_path: Path) -> None:
    given = Options.parse(environ={"FXOPT_CACHE_DIR": str(tmp_path), "FXOPT_CACHE_MIB": "2"})
    cache = cache_of(given)
    assert (cache.directory, cache.limit) == (tmp_path, 2 << 20)
    assert cache_of(given) is cache
    assert cache_of(Options.parse(environ={})).directory.parts[-2:] == ("fxopt", "kernels")
    assert given.fingerprint == Options.parse(environ={}).fingerprint
