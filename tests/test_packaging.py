"""What gets installed: every package of the source tree, the type marker, working entry points."""

from __future__ import annotations

import runpy
from importlib.metadata import entry_points
from pathlib import Path
from typing import Any

import pytest
import setuptools

ROOT = Path(__file__).resolve().parent.parent


def source_folders() -> dict[str, Path]:
    """Every folder with Python files, by the name of the package that it is."""
    folders = {path.parent for top in ("fxopt", "passes") for path in (ROOT / top).rglob("*.py")}
    found = {}
    for folder in folders:
        parts = folder.relative_to(ROOT).parts
        found[".".join(("fxopt", *parts) if parts[0] == "passes" else parts)] = folder
    return found


def test_every_package_is_installed(monkeypatch: pytest.MonkeyPatch) -> None:
    given: dict[str, Any] = {}
    monkeypatch.setattr(setuptools, "setup", lambda **keywords: given.update(keywords))
    monkeypatch.chdir(ROOT)
    runpy.run_path(str(ROOT / "setup.py"))
    assert given["packages"] == sorted(source_folders())


def test_every_package_has_an_init_file() -> None:
    assert [name for name, folder in source_folders().items() if not (folder / "__init__.py").exists()] == []


def test_type_marker_is_there() -> None:
    assert (ROOT / "fxopt" / "py.typed").exists()


@pytest.mark.parametrize(
    ("group", "target"),
    [
        ("torch_dynamo_backends", "fxopt.backend:backend"),
        ("torch.backends", "fxopt.integrations.autoload:autoload"),
        ("console_scripts", "fxopt.cli:main"),
    ],
)
def test_entry_point_leads_to_a_function(group: str, target: str) -> None:
    (entry,) = entry_points(group=group, name="fxopt")
    assert entry.value == target
    assert callable(entry.load())
