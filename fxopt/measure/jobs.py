"""The loop of every benchmark: one row after another, the time left, and what was measured kept.

A run that is stopped has its rows, in its file too; with `resume` the next one measures the others.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)

from fxopt.measure.noise import name_of
from fxopt.measure.results import Results, Row


@dataclass(frozen=True)
class Job:
    """One row to be measured.

    Attributes:
        key: what is measured, as the first fields of the row.
        measure: the other fields.
    """

    key: Mapping[str, Any]
    measure: Callable[[], Row]

    @property
    def name(self) -> str:
        return name_of(self.key, list(self.key))


def run(
    jobs: Sequence[Job],
    results: Results,
    console: Console,
    *,
    resume: bool = False,
    line: Callable[[Row], str] | None = None,
    failed: Callable[[], None] | None = None,
) -> bool:
    """Measure what `results` does not have yet. True when it was stopped from the keyboard.

    What goes wrong becomes a row with an `error`, so that the others are still measured.

    Args:
        resume: take over what the file has from an earlier run of the same plan.
        line: what is printed of a row when it is there.
        failed: called after a row that went wrong.
    """
    if resume and results.resume():
        console.print(f"{len(results.rows)} rows of an earlier run are kept")
    elif resume and results.path is not None and results.path.is_file():
        console.print(f"[yellow]{results.path} has no rows of the same plan, commit and machine[/yellow]")
    todo = [job for job in jobs if not results.has(job.key)]
    results.write()
    with progress(console) as bar:
        task = bar.add_task("", total=len(todo))
        for job in todo:
            bar.update(task, description=job.name)
            try:
                row = _one(job, failed)
            except KeyboardInterrupt:
                console.print("[yellow]stopped; what was measured is kept[/yellow]")
                return True
            results.add(row)
            if line is not None or "error" in row:
                bar.console.print(_told(job, row, line), highlight=False)
            bar.advance(task)
    return False


def finish(results: Results, console: Console) -> None:
    """Write the file with all that is known, and say where it is."""
    results.write()
    if results.path is not None:
        console.print(f"written to {results.path}")


def progress(console: Console) -> Progress:
    """A bar with what is being done, what is done, the time spent and the time left."""
    columns = (BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(), TimeRemainingColumn())
    return Progress(TextColumn("{task.description:<28}"), *columns, console=console, transient=True)


def _one(job: Job, failed: Callable[[], None] | None) -> Row:
    start = time.perf_counter()
    try:
        found = job.measure()
    except Exception as error:
        if failed is not None:
            failed()
        lines = str(error).strip().splitlines() or [""]
        found = {"error": f"{type(error).__name__}: {lines[0][:300]}"}
    return {**job.key, **found, "wall": round(time.perf_counter() - start, 1)}


def _told(job: Job, row: Row, line: Callable[[Row], str] | None) -> str:
    if "error" in row:
        return f"{job.name}: [red]{escape(row['error'])}[/red]"
    return line(row) if line is not None else job.name
