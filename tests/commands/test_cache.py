"""`fxopt cache`: look, empty, take elsewhere, bring here."""

from __future__ import annotations

import json
import zipfile
from pathlib import Path

import pytest

from fxopt.commands.cache import NotAnArchive
from fxopt.runtime.kernel_cache import KernelCache
from support import kernels
from support.cli import Run


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> KernelCache:
    """With one kernel, one measurement and one broken file."""
    monkeypatch.setenv("FXOPT_CACHE_DIR", str(tmp_path / "cache"))
    monkeypatch.setenv("COLUMNS", "300")
    cache = KernelCache(tmp_path / "cache")
    cache.load(kernels.add())
    cache.remember(3, "key")
    (cache.directory / "broken.py").write_text("half")
    return cache


def test_info_counts_and_names_what_is_broken(run: Run, cache: KernelCache) -> None:
    facts = json.loads(run("cache", "info", "--json").stdout)
    assert (facts["kernels"], facts["measurements"], facts["broken"]) == (2, 1, ["broken.py"])
    assert facts["bytes"] == sum(path.stat().st_size for path in cache.directory.iterdir() if path.suffix)
    shown = run("cache", "info")
    assert str(cache.directory) in shown.stdout
    assert "1, written anew when needed" in shown.stdout


def test_info_of_an_empty_cache(run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FXOPT_CACHE_DIR", str(tmp_path / "none"))
    assert run("cache", "info").exit_code == 0
    assert not (tmp_path / "none").exists()


def test_clear_removes_all(run: Run, cache: KernelCache) -> None:
    assert "3 files removed" in run("cache", "clear").stdout
    assert cache.entries() == []


def test_what_is_exported_can_be_imported(
    run: Run, cache: KernelCache, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    archive = tmp_path / "kernels.zip"
    assert "2 entries written" in run("cache", "export", str(archive)).stdout
    monkeypatch.setenv("FXOPT_CACHE_DIR", str(tmp_path / "other"))
    result = run("cache", "import", str(archive))
    assert (result.exit_code, "2 entries taken over" in result.stdout) == (0, True)
    other = KernelCache(tmp_path / "other")
    assert other.recall("key") == 3
    assert {path.name for path, _ in other.entries()} == {
        path.name for path, _ in cache.entries() if path.name != "broken.py"
    }


def test_foreign_and_damaged_entries_are_refused(run: Run, cache: KernelCache, tmp_path: Path) -> None:
    archive = tmp_path / "evil.zip"
    (good,) = (path for path, _ in cache.entries() if path.name.startswith("add"))
    with zipfile.ZipFile(archive, "w") as file:
        file.writestr("../outside.py", good.read_text())
        file.writestr("edited.py", good.read_text().replace("1.5", "2.5"))
        file.writestr("note.txt", good.read_text())
        file.writestr("good.py", good.read_text())
    result = run("cache", "import", str(archive))
    assert result.exit_code == 1
    assert "1 entries taken over" in result.stdout
    assert "3 refused" in result.stdout
    assert not (cache.directory.parent / "outside.py").exists()


@pytest.mark.parametrize("content", [None, b"no archive"])
def test_what_is_no_archive_is_an_error_that_says_so(
    run: Run, cache: KernelCache, tmp_path: Path, content: bytes | None
) -> None:
    file = tmp_path / "file"
    if content is not None:
        file.write_bytes(content)
    result = run("cache", "import", str(file))
    assert isinstance(result.exception, NotAnArchive)
    assert "fxopt cache export" in str(result.exception)
