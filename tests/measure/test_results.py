"""Files of results: written row by row, read back, taken up again by the same plan only."""

from __future__ import annotations

import io
import json
import sys
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from fxopt.measure import machine
from fxopt.measure.jobs import Job, run
from fxopt.measure.results import Results, read

PLAN = {"size": "tiny", "lengths": (1, 2)}
ROOT = Path(machine.__file__).resolve().parents[2]


def results(path: Path, **changes: Any) -> Results:
    return Results(path, {**PLAN, **changes}, keys=("model",))


def job(name: str, value: Any, calls: list[str] | None = None) -> Job:
    def measure() -> dict[str, Any]:
        if calls is not None:
            calls.append(name)
        if isinstance(value, BaseException):
            raise value
        return {"value": value}

    return Job({"model": name}, measure)


@pytest.mark.parametrize("name", ["a.jsonl", "a.json"])
def test_both_forms_are_read_back(tmp_path: Path, name: str) -> None:
    kept = results(tmp_path / "new" / name)
    kept.add({"model": "a", "value": float("inf")})
    kept.summary = {"rows": 1}
    kept.write()
    found = read(tmp_path / "new" / name)
    assert found.rows == [{"model": "a", "value": "inf"}]
    assert found.plan == {"size": "tiny", "lengths": [1, 2]}
    assert (found.summary, found.machine["torch"]) == ({"rows": 1}, kept.machine["torch"])


def test_every_row_is_in_the_file_at_once_and_no_draft_is_left(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    kept = results(path)
    for name in "ab":
        kept.add({"model": name})
        assert read(path).rows[-1] == {"model": name}
    assert list(tmp_path.iterdir()) == [path]


def test_a_row_for_the_same_thing_replaces_the_old_one(tmp_path: Path) -> None:
    kept = results(tmp_path / "a.jsonl")
    for value in (1, 2):
        kept.add({"model": "a", "value": value})
    assert kept.rows == [{"model": "a", "value": 2}]


def test_what_holds_no_results_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    path.write_text(json.dumps({"rows": 3}))
    with pytest.raises(ValueError, match="holds no results"):
        read(path)


def test_resuming_measures_what_is_missing_and_what_went_wrong(tmp_path: Path) -> None:
    path, calls = tmp_path / "a.jsonl", list[str]()
    first = [job("a", 1, calls), job("b", ValueError("no"), calls), job("c", KeyboardInterrupt(), calls)]
    assert run(first, results(path), Console(quiet=True))
    assert [row.get("error") for row in read(path).rows] == [None, "ValueError: no"]
    again = [job(name, 2, calls) for name in "abc"]
    assert not run(again, results(path), Console(quiet=True), resume=True)
    assert calls == ["a", "b", "c", "b", "c"]
    assert {row["model"]: row["value"] for row in read(path).rows} == {"a": 1, "b": 2, "c": 2}


@pytest.mark.parametrize("change", [{"size": "small"}, {"lengths": (1,)}, {"more": 1}])
def test_another_plan_is_not_resumed(tmp_path: Path, change: dict[str, Any]) -> None:
    path = tmp_path / "a.jsonl"
    results(path).add({"model": "a"})
    assert results(path).resume() == 1
    assert results(path, **change).resume() == 0


def test_another_commit_is_not_resumed(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    old = results(path)
    old.machine["commit"] = "another"
    old.add({"model": "a"})
    assert results(path).resume() == 0


def test_a_failed_row_is_told(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run([job("bert", ValueError("[no]\nmore"))], results(tmp_path / "a.jsonl"), Console(width=100))
    assert "bert: ValueError: [no]" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("given", "told"),
    [
        (f"--out={ROOT}/benchmarks/results/a.jsonl", "--out=benchmarks/results/a.jsonl"),
        (f"{ROOT}/docs", "docs"),
        ("/somewhere/else/a.json", "a.json"),
        ("benchmarks/a.json", "benchmarks/a.json"),
        ("--size=tiny", "--size=tiny"),
    ],
)
def test_the_command_names_no_place_of_this_machine(
    monkeypatch: pytest.MonkeyPatch, given: str, told: str
) -> None:
    monkeypatch.setattr(sys, "argv", ["x", "bench", given])
    assert machine.command().split()[-1] == told


def test_it_is_said_when_nothing_is_kept(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    results(path).write()
    data = json.loads(path.read_text().splitlines()[0]) | {"commit": "another"}
    path.write_text(json.dumps(data) + "\n")
    console = Console(record=True, quiet=False, width=400, file=io.StringIO())
    run([], results(path), console, resume=True)
    assert "no rows of the same plan, commit and machine" in console.export_text()
