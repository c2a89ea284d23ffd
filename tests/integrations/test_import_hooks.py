"""Hooks that run after an import: when, how often, and that imports are otherwise as they were."""

from __future__ import annotations

import importlib
import importlib.machinery
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pytest

from fxopt.integrations.import_hooks import PostImportFinder

PACKAGE = "hooked_package"
MODULE = f"{PACKAGE}.part"


class Calls(list[str]):
    """A hook that writes down whether the module was complete when it was called."""

    def __call__(self, module: ModuleType) -> None:
        self.append(f"{module.__name__} {'complete' if hasattr(module, 'LAST') else 'half'}")


@pytest.fixture
def package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    folder = tmp_path / PACKAGE
    folder.mkdir()
    (folder / "__init__.py").write_text("")
    (folder / "part.py").write_text("FIRST = 1\nLAST = 2\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    before = list(sys.meta_path)
    yield folder
    sys.meta_path[:] = before
    for name in [name for name in sys.modules if name.partition(".")[0] == PACKAGE]:
        del sys.modules[name]


def test_hook_runs_after_the_import_and_not_before(package: Path) -> None:
    calls = Calls()
    PostImportFinder().when_imported(MODULE, calls)
    importlib.import_module(PACKAGE)
    assert calls == []
    importlib.import_module(MODULE)
    assert calls == [f"{MODULE} complete"]


def test_hook_runs_at_once_for_a_module_that_is_there(package: Path) -> None:
    importlib.import_module(MODULE)
    calls = Calls()
    PostImportFinder().when_imported(MODULE, calls)
    assert calls == [f"{MODULE} complete"]


def test_hook_of_a_half_loaded_module_runs_at_the_next_import(
    package: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls = Calls()
    register = ModuleType("registers_the_hook")
    register.now = lambda: PostImportFinder().when_imported(MODULE, calls)  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "registers_the_hook", register)
    (package / "part.py").write_text("import registers_the_hook\nregisters_the_hook.now()\nLAST = 2\n")
    importlib.import_module(MODULE)
    assert calls == []
    (package / "other.py").write_text("")
    importlib.import_module(f"{PACKAGE}.other")
    assert calls == [f"{MODULE} complete"]


def test_hook_runs_again_on_reload(package: Path) -> None:
    calls = Calls()
    PostImportFinder().when_imported(MODULE, calls)
    module = importlib.import_module(MODULE)
    importlib.reload(module)
    assert calls == [f"{MODULE} complete"] * 2


def test_module_keeps_its_own_loader(package: Path) -> None:
    PostImportFinder().when_imported(MODULE, Calls())
    module = importlib.import_module(MODULE)
    assert module.__spec__ is not None
    assert type(module.__spec__.loader) is importlib.machinery.SourceFileLoader
    assert type(module.__loader__) is importlib.machinery.SourceFileLoader


def test_module_can_be_looked_up_without_being_loaded(package: Path) -> None:
    """What `runpy` and `inspect` do: find the specification and ask its loader for the code."""
    calls = Calls()
    PostImportFinder().when_imported(MODULE, calls)
    spec = importlib.util.find_spec(MODULE)
    assert spec is not None
    assert spec.loader is not None
    assert spec.loader.get_code(MODULE).co_filename == str(package / "part.py")  # type: ignore[attr-defined]
    assert calls == []


def test_failing_module_fails_as_before_and_runs_no_hook(package: Path) -> None:
    (package / "part.py").write_text("raise ZeroDivisionError('its own fault')\n")
    calls = Calls()
    PostImportFinder().when_imported(MODULE, calls)
    with pytest.raises(ZeroDivisionError, match="its own fault"):
        importlib.import_module(MODULE)
    assert calls == []


def test_absent_module_is_absent_as_before(package: Path) -> None:
    calls = Calls()
    PostImportFinder().when_imported(f"{PACKAGE}.nothing", calls)
    with pytest.raises(ModuleNotFoundError, match=f"No module named '{PACKAGE}.nothing'"):
        importlib.import_module(f"{PACKAGE}.nothing")
    assert calls == []


def test_two_finders_of_this_kind_do_not_chase_each_other(package: Path) -> None:
    first, second = Calls(), Calls()
    PostImportFinder().when_imported(MODULE, first)
    PostImportFinder().when_imported(MODULE, second)
    importlib.import_module(MODULE)
    assert set(first) == set(second) == {f"{MODULE} complete"}


def test_other_modules_are_left_to_the_other_finders(package: Path) -> None:
    finder = PostImportFinder()
    finder.when_imported(MODULE, Calls())
    assert finder.find_spec("json", None) is None
