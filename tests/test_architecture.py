"""The shape of the source tree: who may import whom, how long things may be, what every pass must bring."""

from __future__ import annotations

import ast
import functools
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from fxopt.options import environment_without

ROOT = Path(__file__).resolve().parent.parent

# Lower numbers know nothing of higher ones. Siblings of a level may import each other unless listed in APART.
LEVELS = {
    "errors": 0,
    "options": 0,
    "ir": 1,
    "passes": 2,
    "codegen": 2,
    "kernels": 2,
    "runtime": 2,
    "hosts": 3,
    "report": 3,
    "integrations": 3,
    "frontend": 4,
    "pipeline": 4,
    "backend": 4,
    "measure": 5,
    "suites": 5,
    "commands": 5,
    "cli": 5,
    "__main__": 5,
}
APART = {("passes", "codegen"), ("passes", "kernels"), ("codegen", "passes"), ("kernels", "passes")}
MAX_FILE, MAX_FUNCTION = 400, 50  # the length of lines is the linter's

SOURCES = sorted([*(ROOT / "fxopt").rglob("*.py"), *(ROOT / "passes").rglob("*.py")])
ALL_PYTHON = sorted([*SOURCES, *(ROOT / "tests").rglob("*.py"), *(ROOT / "benchmarks").rglob("*.py")])
PASS_FILES = sorted(p for p in (ROOT / "passes").glob("*.py") if "name: ClassVar" in p.read_text())


def _name(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


def _component(path: Path) -> str:
    parts = path.relative_to(ROOT).with_suffix("").parts
    return "passes" if parts[0] == "passes" else parts[1]


def _imported(path: Path) -> Iterator[tuple[str, int]]:
    """Absolute names of the modules that a file imports, outside of TYPE_CHECKING blocks."""
    tree = ast.parse(path.read_text())
    skipped = {
        id(inner)
        for node in ast.walk(tree)
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test)
        for inner in ast.walk(node)
    }
    for node in ast.walk(tree):
        if id(node) in skipped:
            continue
        if isinstance(node, ast.Import):
            yield from ((alias.name, node.lineno) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield from ((name, node.lineno) for name in _from_names(path, node))


def _from_names(path: Path, node: ast.ImportFrom) -> list[str]:
    if node.level == 0:
        return [f"{node.module}.{alias.name}" for alias in node.names]
    package = ("fxopt", *path.relative_to(ROOT).parts) if _component(path) == "passes" else ()
    parts = list((package or path.relative_to(ROOT).parts)[: -node.level])
    return [".".join([*parts, *([node.module] if node.module else []), alias.name]) for alias in node.names]


def _target_component(name: str) -> str | None:
    parts = name.split(".")
    return parts[1] if parts[0] == "fxopt" and len(parts) > 1 and parts[1] in LEVELS else None


@pytest.mark.parametrize("path", SOURCES, ids=_name)
def test_imports_point_downwards(path: Path) -> None:
    own = _component(path)
    if own == "__init__":
        return
    assert own in LEVELS, f"{own} has no level: add it to LEVELS where it belongs"
    wrong = [
        f"line {line}: {name}"
        for name, line in _imported(path)
        if (other := _target_component(name)) is not None
        and (LEVELS[other] > LEVELS[own] or (own, other) in APART)
    ]
    assert not wrong, f"{_name(path)} ({own}) imports upwards: {wrong}"


def test_only_the_pipeline_loads_passes() -> None:
    loaders = [
        _name(path)
        for path in SOURCES
        if _component(path) not in ("passes", "pipeline")
        and re.search(r"fxopt\.passes[.:]", path.read_text())
    ]
    assert loaders == []


@pytest.mark.parametrize("path", ALL_PYTHON, ids=_name)
def test_files_and_functions_are_short(path: Path) -> None:
    text = path.read_text()
    lines = text.splitlines()
    assert len(lines) <= MAX_FILE, f"{len(lines)} lines"
    long = [
        f"{node.name}: {node.end_lineno - node.lineno + 1} lines"
        for node in ast.walk(ast.parse(text))
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef))
        and node.end_lineno is not None
        and node.end_lineno - node.lineno + 1 > MAX_FUNCTION
    ]
    assert not long


@pytest.mark.parametrize("path", PASS_FILES, ids=_name)
def test_every_pass_has_its_test_its_page_and_its_near_misses(path: Path) -> None:
    from fxopt.pipeline import PASSES

    name = path.stem.replace("_", "-")
    assert name in [listed for listed, _ in PASSES], "not in the pipeline"
    page = ROOT / "docs" / "passes" / f"{name}.md"
    assert page.exists(), f"no {page.name}"
    test = ROOT / "tests" / "passes" / f"test_{path.stem}.py"
    cases = _parametrized_cases(test)
    assert cases["fires"] >= 3, f"{test.name} has {cases['fires']} spellings that fire"
    assert cases["refuses"] >= 3, f"{test.name} has {cases['refuses']} near-misses"
    assert list((ROOT / "tests" / "golden" / path.stem).glob("*.txt")), "no golden graph"


FIRES = re.compile(r"fire|appl|fold|fuse|rewrit|remov|eliminat|match|adopt", re.IGNORECASE)
REFUSES = re.compile(
    r"near_?miss|must_not|refus|not_|keeps|illegal|unprof|stay|untouched|alone", re.IGNORECASE
)


@functools.cache
def _collected() -> tuple[str, ...]:
    """The tests of all passes, collected once: `path::name`."""
    listing = subprocess.run(
        [sys.executable, "-m", "pytest", "--collect-only", "-q", "-p", "no:xdist", "tests/passes"],
        capture_output=True,
        text=True,
        cwd=ROOT,
        env=environment_without("PYTEST_ADDOPTS"),  # what is printed must not depend on it
        check=False,
    ).stdout
    return tuple(line for line in listing.splitlines() if "::" in line)


def _parametrized_cases(test: Path) -> dict[str, int]:
    """Counts tests, parametrized cases included, by what their names say they show."""
    split = (line.split("::", 1) for line in _collected())
    names = [name for path, name in split if Path(path).name == test.name]
    refusing = [name for name in names if REFUSES.search(name)]
    firing = [name for name in names if FIRES.search(name) and name not in refusing]
    return {"fires": len(firing), "refuses": len(refusing)}


def test_private_torch_modules_are_listed() -> None:
    """A private torch module in use is named in the page that says with which versions it was tried."""
    page = (ROOT / "docs" / "torch_apis.md").read_text()
    used: dict[str, set[str]] = {}
    for path in SOURCES:
        for name, _ in _imported(path):
            if re.match(r"torch\.(?:\w+\.)*_\w|torch\.fx\.experimental", name):
                used.setdefault(name, set()).add(_name(path))
    missing = {
        name: files
        for name, files in used.items()
        if f"`{name}`" not in page and f"`{name.rsplit('.', 1)[0]}`" not in page
    }
    assert not missing


def test_importing_fxopt_loads_nothing() -> None:
    code = "import sys, fxopt; print(sorted({'torch', 'triton', 'sympy', 'transformers'} & set(sys.modules)))"
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, check=True)
    assert found.stdout.strip() == "[]"


def test_environment_is_read_in_one_place() -> None:
    readers = [
        _name(path)
        for path in SOURCES
        if re.search(r"os\.(environ|getenv)", path.read_text()) and _component(path) != "options"
    ]
    assert set(readers) <= ENVIRONMENT_READERS


# Besides options.py: who sets or shows variables of other programs, or writes files that do.
ENVIRONMENT_READERS = {
    "fxopt/codegen/kernel_file.py",
    "fxopt/measure/compiled.py",
    "fxopt/measure/memory.py",
    "fxopt/suites/train.py",
    "fxopt/integrations/autoload.py",
    "fxopt/commands/doctor.py",
    "fxopt/commands/demo.py",
    "fxopt/commands/demo_jobs.py",
}
