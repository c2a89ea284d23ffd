"""Compiled extensions in the cache: what is damaged is made anew, and what cannot be made is done without."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from fxopt.runtime import native_code

SOURCE = 'extern "C" int fxopt_has_kernels() { return 1; }\n'


@pytest.fixture
def source(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path / "cache"))
    path = tmp_path / "kernels.cpp"
    path.write_text(SOURCE)
    return path


def works(library: Any) -> bool:
    return library is not None and library.fxopt_has_kernels() == 1


@pytest.mark.parametrize("kept", [0, 7, 600])
def test_a_damaged_library_is_made_anew(source: Path, kept: int) -> None:
    """A file that is cut off, by a full disk perhaps, ends the process that loads it."""
    path = native_code.library_of(source)
    content = path.read_bytes()
    path.unlink()
    path.write_bytes(content[:kept])
    assert works(native_code.kernels_of(source, "slowly"))
    assert len(path.read_bytes()) == len(content)


def test_a_cache_that_cannot_be_written_is_done_without(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path / "file" / "cache"))
    assert native_code.kernels_of(source, "slowly") is None


def test_a_cache_that_may_only_be_read_is_used(source: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """That of an image, say: nobody can lock a file in it."""
    native_code.library_of(source)

    def lock(path: Path) -> None:
        raise PermissionError(path)

    monkeypatch.setattr("filelock.FileLock", lock)
    assert works(native_code.kernels_of(source, "slowly"))


def test_a_source_that_cannot_be_compiled_is_done_without(source: Path) -> None:
    source.write_text("no C++")
    assert native_code.kernels_of(source, "slowly") is None
