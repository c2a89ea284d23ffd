"""The report: `python -m benchmarks.report` writes docs/benchmarks.md and its pictures from all results.

`python -m benchmarks.report --against FILE [RUN]` compares a run with an earlier one, by default that of the
same name under benchmarks/results/, and ends with exit code 1 when a row became slower by more than the
noise.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from rich.console import Console

from benchmarks.report_against import changes
from benchmarks.report_page import render
from benchmarks.report_plots import draw_all
from benchmarks.report_runs import RESULTS, Run, history, reasons, record, run_of, runs, slower
from fxopt.measure.results import replace_text

DOCS = Path(__file__).resolve().parents[1] / "docs"
PAGE, IMAGES = DOCS / "benchmarks.md", DOCS / "images" / "benchmarks"


def page(folder: Path = IMAGES) -> str:
    """The text of the page, from the committed files alone."""
    images = sorted(path.stem for path in folder.glob("*.png"))
    return render(runs(), reasons(), history(), images)


def write(console: Console, results: Path, out: Path | None) -> int:
    """Draw the pictures and write the page; 1 when a row is slower than Inductor and nobody says why."""
    found = runs(results)
    past = record(found, results / "history.jsonl")
    place, images = (PAGE, IMAGES) if out is None else (out / "benchmarks.md", out / "images" / "benchmarks")
    drawn = draw_all(found, past, images)
    replace_text(place, render(found, reasons(), past, drawn))
    console.print(f"written to {place}, with {len(drawn)} pictures", soft_wrap=True)
    missing = [f"{run.name}: {name}" for run in found for name in unexplained(run)]
    for name in missing:
        console.print(
            f"[red]slower than Inductor, and reasons.json has no reason: {name}[/red]", soft_wrap=True
        )
    return int(bool(missing))


def unexplained(run: Run) -> list[str]:
    """The rows that are slower than Inductor and have no reason."""
    known = reasons().get(run.name, {})
    return [name for name in slower(run) if not known.get(name)]


def compare(console: Console, old: Path, new: Path) -> int:
    """Print what changed; 1 when something regressed."""
    found = changes(run_of(old), run_of(new))
    for change in found:
        style = "red" if change.regressed else None
        console.print(str(change), style=style, highlight=False, markup=False)
    worse = sum(change.regressed for change in found)
    console.print(f"{worse} of {len(found)} rows became worse by more than the noise")
    return int(worse > 0)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("run", nargs="?", type=Path, help="with --against: the new run")
    parser.add_argument("--against", type=Path, metavar="FILE", help="an earlier run to compare with")
    parser.add_argument("--results", type=Path, default=RESULTS, help="where the runs are")
    parser.add_argument("--out", type=Path, help="write the page and its pictures here instead of docs/")
    arguments = parser.parse_args()
    console = Console()
    if arguments.against is None:
        return write(console, arguments.results, arguments.out)
    try:
        return compare(
            console, arguments.against, arguments.run or arguments.results / arguments.against.name
        )
    except (OSError, ValueError) as error:
        console.print(f"[red]{error}[/red]")
        return 2


if __name__ == "__main__":
    raise SystemExit(main())
