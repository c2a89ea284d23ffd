"""The runs under benchmarks/results/ as the report needs them, whichever benchmark wrote them."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fxopt.measure.noise import SLOWER, name_of, summarize, verdict
from fxopt.measure.results import Results, Row, read

RESULTS = Path(__file__).resolve().parent / "results"
HISTORY = RESULTS / "history.jsonl"
REASONS = RESULTS.parent / "reasons.json"
# Figures that stand among the fields that name a row.
_NO_KEYS = ("parameters",)


@dataclass(frozen=True)
class Run:
    """One file of results.

    Attributes:
        name: the file's, without what is behind the dot. file: with it.
        keys: the fields that name a row.
        lines: the row's line in the file, where it has one.
    """

    name: str
    file: str
    machine: Row
    plan: Row
    rows: tuple[Row, ...]
    keys: tuple[str, ...]
    lines: tuple[int, ...] = ()

    @property
    def suite(self) -> str:
        """The suite that the plan names, else the first part of the file's name."""
        return str(self.plan.get("suite") or self.name.removesuffix("-cpu").removesuffix("-gpu"))

    @property
    def hardware(self) -> str:
        """What it was measured on, in words."""
        threads = self.machine["threads"]
        return str(self.machine["gpu"] or f"{self.machine['cpu']}, {threads} thread{'s' * (threads > 1)}")

    @property
    def good(self) -> list[Row]:
        return [row for row in self.rows if "ratio" in row]

    def title(self, row: Row) -> str:
        """The row in words; what is the same in all rows is left out."""
        told = [key for key in self.keys if len({str(each.get(key)) for each in self.rows}) > 1]
        return name_of(row, told or self.keys) or self.name

    def summary(self) -> Row:
        return summarize(self.rows, self.keys)


def runs(folder: Path = RESULTS) -> list[Run]:
    """All files whose rows compare fxopt with Inductor, by name."""
    paths = sorted(path for path in folder.glob("*.json*") if path.name != HISTORY.name)
    found = [run_of(path) for path in paths if _is_run(path)]
    return [run for run in found if run.good]


def run_of(path: Path) -> Run:
    """The run in a file.

    Raises:
        OSError: there is no such file.
        ValueError: it holds no results.
    """
    kept: Results = read(path)
    rows = tuple(map(_named_alike, kept.rows))
    lines = tuple(range(2, 2 + len(rows))) if path.suffix == ".jsonl" else ()
    return Run(path.stem, path.name, kept.machine, dict(kept.plan), rows, _keys(rows), lines)


def _is_run(path: Path) -> bool:
    try:
        read(path)
    except ValueError:
        return False
    return True


def _named_alike(row: Row) -> Row:
    """The benchmarks of decoding call the ratio by what it is over."""
    if "over_inductor" not in row:
        return row
    row = dict(row)
    over = {"eager": row.pop("over_eager")}
    return {**row, "ratio": row.pop("over_inductor"), "over": over}


def _keys(rows: Sequence[Row]) -> tuple[str, ...]:
    """The fields that stand before the first figure."""
    found: list[str] = []
    for name, value in (rows[0] if rows else {}).items():
        if isinstance(value, dict | list) or name == "error":
            break
        found.append(name)
    return tuple(name for name in found if name not in _NO_KEYS)


def reasons(path: Path = REASONS) -> dict[str, dict[str, str]]:
    """Why a row is slower than Inductor: run -> row -> reason."""
    found: dict[str, dict[str, str]] = json.loads(path.read_text())
    return found


def slower(run: Run) -> Iterator[str]:
    """The rows that are slower than Inductor beyond the noise."""
    return (name_of(row, run.keys) for row in run.good if verdict(row) == SLOWER)


def record(found: Sequence[Run], path: Path = HISTORY) -> list[Row]:
    """Add the runs that the history lacks; all its lines."""
    kept = history(path)
    known = {(line["run"], line["time"]) for line in kept}
    new = [_line(run) for run in found if (run.name, run.machine["time"]) not in known]
    kept = sorted([*kept, *new], key=lambda line: (line["run"], line["time"]))
    path.write_text("".join(json.dumps(line) + "\n" for line in kept))
    return kept


def history(path: Path = HISTORY) -> list[Row]:
    """One line for each run that was ever reported."""
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def _line(run: Run) -> Row:
    told: dict[str, Any] = {name: run.machine[name] for name in ("time", "commit", "command")}
    summary = run.summary()
    figures = {name: summary[name] for name in ("rows", "geomean", "min", "noise_min", "noise_max")}
    return {"run": run.name, **told, "hardware": run.hardware, **figures, "slower": len(summary[SLOWER])}
