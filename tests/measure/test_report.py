"""The report of benchmarks: what is committed, what is said of a slower row, and two runs side by side."""

from __future__ import annotations

import dataclasses
import json
import re
from pathlib import Path
from typing import Any

import pytest

from benchmarks import report
from benchmarks.report_against import changes
from benchmarks.report_page import MARKS, render
from benchmarks.report_plots import draw_all, quantized
from benchmarks.report_runs import HISTORY, RESULTS, Run, history, record, run_of, runs
from benchmarks.suite import file_name
from fxopt.measure.noise import NOISY, SLOWER
from fxopt.measure.results import Results

COMMITTED = runs()


def ratio(median: float, width: float = 0.01) -> dict[str, float]:
    return {"median": median, "low": median - width, "high": median + width, "best": median}


def written(
    folder: Path, ratios: dict[str, Any], name: str = "hf-tiny-cpu.jsonl", noise: float = 0.01
) -> Run:
    """A file of results, read as the report reads it."""
    kept = Results(folder / name, {"suite": "hf"}, keys=("model",))
    kept.machine = {
        "time": f"2026-01-0{len(list(folder.iterdir())) + 1}", "commit": "c", "command": "m", "gpu": None,
        "cpu": "x", "threads": 1, "torch": "2", "transformers": "5",
    }  # fmt: skip
    for model, found in ratios.items():
        row: dict[str, Any] = {"model": model}
        row |= found if isinstance(found, dict) else {"ratio": ratio(found), "noise": ratio(1.0, noise)}
        kept.add(row)
    return run_of(folder / name)


class TestCommitted:
    def test_the_page_is_what_the_results_say(self) -> None:
        assert report.PAGE.read_text() == report.page()

    def test_every_row_that_is_slower_has_its_reason(self) -> None:
        assert {run.name: report.unexplained(run) for run in COMMITTED if report.unexplained(run)} == {}

    def test_a_reason_is_for_a_run_that_is_there(self) -> None:
        assert set(report.reasons()) <= {run.name for run in COMMITTED}

    def test_the_history_has_every_run(self) -> None:
        known = {(line["run"], line["time"]) for line in history(HISTORY)}
        assert known >= {(run.name, run.machine["time"]) for run in COMMITTED}

    def test_the_pictures_are_there(self) -> None:
        named = re.findall(r"\]\(images/benchmarks/(.+?)\)", report.PAGE.read_text())
        assert set(named) >= {f"{run.name}.png" for run in COMMITTED}
        assert all((report.IMAGES / name).is_file() for name in named)

    @pytest.mark.parametrize("path", sorted(RESULTS.glob("*.json*")), ids=lambda path: path.name)
    def test_no_file_names_a_place_of_the_machine(self, path: Path) -> None:
        assert not re.search(r"[\"\s=]/(tmp|work|home|root|Users)/", path.read_text())

    def test_every_line_that_is_linked_is_that_row(self) -> None:
        for run in COMMITTED:
            text = (RESULTS / run.file).read_text().splitlines()
            for row, line in zip(run.rows, run.lines, strict=bool(run.lines)):
                assert json.loads(text[line - 1])["ratio"] == row["ratio"]


class TestPage:
    def test_a_slower_row_is_red_and_has_its_reason(self, tmp_path: Path) -> None:
        run = written(tmp_path, {"bert": 0.8, "t5": 1.0})
        page = render([run], {run.name: {"bert": "a known loss"}}, [], [])
        assert f"| bert | {MARKS[SLOWER]} 0.800 |" in page
        assert "- bert: a known loss" in page
        assert "| t5 | 1.000 |" in page

    def test_a_reason_that_is_missing_is_an_error(self, tmp_path: Path) -> None:
        run = written(tmp_path, {"bert": 0.8})
        assert report.unexplained(run) == ["bert"]
        assert "- bert: no reason" in render([run], {}, [], [])

    def test_a_noisy_row_is_yellow(self, tmp_path: Path) -> None:
        run = written(tmp_path, {"bert": 0.95}, noise=0.3)
        assert f"| bert | {MARKS[NOISY]} 0.950 |" in render([run], {}, [], [])

    def test_an_error_is_a_row(self, tmp_path: Path) -> None:
        run = written(tmp_path, {"bert": {"error": "ValueError: x"}, "t5": 1.0})
        assert f"| bert | {MARKS[SLOWER]} ValueError: x |" in render([run], {}, [], [])

    def test_a_run_is_recorded_once(self, tmp_path: Path) -> None:
        run, path = written(tmp_path, {"bert": 1.2}), tmp_path / "history.jsonl"
        assert len(record([run], path)) == len(record([run], path)) == 1
        assert history(path)[0]["geomean"] == 1.2


class TestPictures:
    def test_quantized_weights_are_drawn_with_whoever_was_there(self, tmp_path: Path) -> None:
        read = {"inductor": 0.5, "fxopt": 0.8, "torchao": 0.4}
        size = {"inductor": 100, "fxopt": 30, "torchao": 40}
        row = {"ratio": ratio(2.0), "noise": ratio(1.0), "floor": read, "weight_bytes": size}
        run = written(
            tmp_path, {"int4": row, "int8": {**row, "floor": {**read, "fxopt": 0.6}}}, "quant.jsonl"
        )
        figure = quantized([run, written(tmp_path, {"bert": 1.0})])
        floor, weights = figure.axes
        drawn = {one.get_label(): one.get_offsets().tolist() for one in floor.collections}
        assert set(drawn) == {"inductor", "fxopt", "torchao"}
        assert drawn["fxopt"] == [[80.0, 0.0], [60.0, 1.0]]
        assert weights.collections[-1].get_offsets().tolist() == [[0.3, 0.0], [0.3, 1.0]]

    def test_rows_of_dense_weights_and_of_prompts_are_left_out(self, tmp_path: Path) -> None:
        row = {"ratio": ratio(2.0), "noise": ratio(1.0), "weight_bytes": {"inductor": 100, "fxopt": 100}}
        read = {"floor": {"inductor": 0.5, "fxopt": 0.8}}
        small = {**row, "weight_bytes": {"inductor": 100, "fxopt": 30}}
        rows = {"dense prompt": row, "dense decode": row | read, "int8 prompt": small}
        assert quantized([written(tmp_path, rows, "generate.jsonl")]) is None
        figure = quantized([written(tmp_path, rows | {"int8 decode": small | read}, "generate.jsonl")])
        assert [len(one.get_offsets()) for one in figure.axes[0].collections] == [1, 1]

    def test_pictures_that_cannot_be_drawn_leave_the_old_ones(self, tmp_path: Path) -> None:
        run = written(tmp_path, {"bert": 1.0})
        old = tmp_path / "old.png"
        old.touch()
        with pytest.raises(KeyError):
            draw_all([dataclasses.replace(run, rows=({"ratio": {}},))], [], tmp_path)
        assert old.exists()
        drawn = draw_all([run], [], tmp_path)
        assert drawn and sorted(each.stem for each in tmp_path.glob("*.png")) == drawn

    def test_without_quantized_weights_there_is_no_picture(self, tmp_path: Path) -> None:
        assert quantized([written(tmp_path, {"bert": 1.0})]) is None


class TestAgainst:
    @pytest.mark.parametrize(
        ("now", "worse"),
        [
            ({"a": 1.0, "b": 1.0}, []),
            ({"a": 0.97, "b": 1.0}, []),  # within the noise of both
            ({"a": 0.8, "b": 1.0}, ["a", "geometric mean of the ratios"]),
            ({"a": 1.0}, ["b"]),
            ({"a": 1.0, "b": {"error": "x"}}, ["b"]),
            ({"a": {"ratio": ratio(1.0), "noise": ratio(1.0), "dashboard": False}, "b": 1.0}, ["a"]),
            ({"a": 1.5, "b": 1.5}, []),
        ],
    )
    def test_what_became_worse(self, tmp_path: Path, now: dict[str, Any], worse: list[str]) -> None:
        old = written(tmp_path, {"a": 1.0, "b": 1.0}, "old.jsonl")
        new = written(tmp_path, now, "new.jsonl")
        assert [change.name for change in changes(old, new) if change.regressed] == worse

    def test_noise_is_no_regression(self, tmp_path: Path) -> None:
        old = written(tmp_path, {"a": 1.0}, "old.jsonl", noise=0.2)
        new = written(tmp_path, {"a": 0.75}, "new.jsonl", noise=0.2)
        assert not any(change.regressed for change in changes(old, new))

    @pytest.mark.parametrize(("now", "code"), [(1.0, 0), (0.5, 1)])
    def test_the_exit_code(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, now: float, code: int
    ) -> None:
        written(tmp_path, {"a": 1.0}, "old.jsonl")
        written(tmp_path, {"a": now}, "new.jsonl")
        words = ["report", str(tmp_path / "new.jsonl"), "--against", str(tmp_path / "old.jsonl")]
        monkeypatch.setattr("sys.argv", words)
        assert report.main() == code

    def test_other_things_are_not_compared(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        written(tmp_path, {"a": 1.0}, "old.jsonl")
        monkeypatch.setattr("sys.argv", ["report", "--against", str(tmp_path / "old.jsonl"), "nothing.jsonl"])
        assert report.main() == 2


@pytest.mark.parametrize(
    ("words", "name"),
    [
        ([], "hf-small-cpu.jsonl"),
        (["--size", "tiny"], "hf-tiny-cpu.jsonl"),
        (["--size=full", "--device=cuda:0"], "hf-full-gpu.jsonl"),
    ],
)
def test_the_file_of_a_suite(words: list[str], name: str) -> None:
    assert file_name("hf", words) == name
