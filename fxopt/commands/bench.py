"""`fxopt bench`: fxopt against TorchInductor, side by side in one process."""

from __future__ import annotations

import json
import math
import statistics
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table

Row = dict[str, Any]
# A model slower than this, beyond what the noise row shows, is a regression.
FLOOR = 0.95


@dataclass(frozen=True)
class Plan:
    """What to measure.

    Attributes:
        models: model types, or other targets of `fxopt explain`; empty is the whole suite.
        options: for fxopt, as in `torch.compile(options=...)`.
        seconds: time budget of the timing of one row, compilation not counted.
        out: JSON lines are written there, row by row.
    """

    models: tuple[str, ...] = ()
    size: str = "small"
    infer: bool = True
    train: bool = True
    attention: str | None = None
    dtype: str = "float32"
    device: str = "cpu"
    threads: int = 1
    seconds: float = 4.0
    batch: int | None = None
    seq: int | None = None
    options: Mapping[str, Any] = field(default_factory=dict)
    out: Path | None = None


def run(plan: Plan, console: Console) -> int:
    """Measure, print the table, write the lines. Returns the exit code: 1 for an error or a fault."""
    import torch

    from fxopt.measure import machine

    torch.set_num_threads(plan.threads)
    head = {"kind": "machine", **machine.describe(), "plan": _plain(plan)}
    write = _writer(plan.out)
    write(head)
    rows, interrupted = _measure_all(plan, console, write)
    console.print(_table(rows))
    for row in rows:
        for note in _notes(row):
            console.print(f"{row['model']} {row['phase']}: {note}", highlight=False)
    summary = summarize(rows)
    write({"kind": "summary", **summary, "interrupted": interrupted})
    _print_summary(summary, head, console)
    if interrupted:
        console.print("[yellow]interrupted: the rows above are complete[/yellow]")
    if plan.out is not None:
        console.print(f"written to {plan.out}")
    return 130 if interrupted else int(any(_notes(row) for row in rows))


def _measure_all(plan: Plan, console: Console, write: Callable[[Row], None]) -> tuple[list[Row], bool]:
    import transformers

    from fxopt.measure.suite import SUITE, cases

    transformers.logging.set_verbosity_error()
    todo = list(cases(plan.models or tuple(SUITE), infer=plan.infer, train=plan.train))
    rows: list[Row] = []
    with _progress(console) as progress:
        task = progress.add_task("", total=len(todo))
        for case in todo:
            progress.update(task, description=f"{case.model} {case.phase}")
            start = time.perf_counter()
            try:
                row = _one(plan, case)
            except KeyboardInterrupt:
                return rows, True
            row |= {"wall": round(time.perf_counter() - start, 1)}
            rows.append(row)
            write({"kind": "row", **row})
            progress.console.print(_line(row))
            progress.advance(task)
    return rows, False


def _one(plan: Plan, case: Any) -> Row:
    """One row; what goes wrong becomes a row too, so that the rest is still measured."""
    from fxopt.commands.targets import Request, resolve
    from fxopt.measure.suite import measure, release

    request = Request(plan.size, plan.batch, plan.seq, plan.dtype, plan.attention, case.training, plan.device)
    try:
        subject = resolve(case.model, request, **case.overrides)
        return measure(case, subject, plan.options, budget_seconds=plan.seconds)
    except Exception as error:
        release()
        lines = str(error).strip().splitlines() or [""]
        return {
            "model": case.model,
            "phase": case.phase,
            "error": f"{type(error).__name__}: {lines[0]}",
        }


def summarize(rows: Iterable[Row]) -> Row:
    """Geometric means, the slowest row, and what the same comparison gives for Inductor against itself."""
    good = [row for row in rows if "ratio" in row]
    if not good:
        return {"rows": 0}
    ratios, noise = ([row[kind]["median"] for row in good] for kind in ("ratio", "noise"))
    worst = min(good, key=lambda row: row["ratio"]["median"])
    return {
        "rows": len(good),
        "models": len({row["model"] for row in good}),
        "geomean": round(statistics.geometric_mean(ratios), 4),
        "geomean_best": round(statistics.geometric_mean([row["ratio"]["best"] for row in good]), 4),
        "min": round(min(ratios), 4),
        "min_row": f"{worst['model']} {worst['phase']}",
        "below_floor": [f"{row['model']} {row['phase']}" for row in good if row["ratio"]["median"] < FLOOR],
        "noise_geomean": round(statistics.geometric_mean(noise), 4),
        "noise_min": round(min(noise), 4),
        "noise_max": round(max(noise), 4),
    }


def _table(rows: Sequence[Row]) -> Table:
    table = Table(title="time of inductor / time of fxopt: more than 1 means that fxopt is faster")
    table.add_column("model", no_wrap=True)
    table.add_column("phase", no_wrap=True)
    for name in ("inductor ms", "fxopt ms", "ratio", "95 %", "noise", "sites"):
        table.add_column(name, justify="right", no_wrap=name not in ("inductor ms", "fxopt ms"))
    for row in rows:
        if "ratio" in row:
            table.add_row(*_cells(row))
    return table


def _cells(row: Row) -> list[str]:
    ratio, seconds = row["ratio"], row["seconds"]
    colour = "red" if ratio["median"] < FLOOR else "green" if ratio["low"] > 1 else "default"
    return [
        row["model"],
        row["phase"],
        f"{1e3 * seconds['inductor']:.2f}",
        f"{1e3 * seconds['fxopt']:.2f}",
        f"[{colour}]{ratio['median']:.3f}[/{colour}]",
        f"{ratio['low']:.2f}-{ratio['high']:.2f}",
        f"{row['noise']['median']:.3f}",
        str(sum(row["sites"].values())),
    ]


def _notes(row: Row) -> list[str]:
    """What a reader of the row must know beside its numbers."""
    if "error" in row:
        return [f"[red]{escape(row['error'][:200])}[/red]"]
    wrong = [] if row["accepted"] else [f"[red]differs from eager: {row['errors']}[/red]"]
    return wrong + [f"[yellow]fault: {escape(fault[:200])}[/yellow]" for fault in row["faults"]]


def _line(row: Row) -> str:
    head = f"{row['model']:<12} {row['phase']:<6}"
    if "ratio" not in row:
        return f"{head} {' '.join(_notes(row))}"
    cells = _cells(row)
    return "  ".join([head, cells[4], f"({cells[5]}, noise {cells[6]})", *_notes(row)])


def _print_summary(summary: Row, head: Row, console: Console) -> None:
    from fxopt.measure.timing import clock_name

    if not summary["rows"]:
        console.print("nothing was measured")
        return
    console.print(
        f"[bold]geomean {summary['geomean']:.3f}[/bold], min {summary['min']:.3f} ({summary['min_row']}), "
        f"{len(summary['below_floor'])} of {summary['rows']} rows below {FLOOR}; "
        f"noise (inductor against itself): geomean {summary['noise_geomean']:.3f}, "
        f"{summary['noise_min']:.3f} to {summary['noise_max']:.3f}"
    )
    console.print(
        f"{head['cpu']}, {head['threads']} thread(s), {clock_name()}; torch {head['torch']}, "
        f"transformers {head['transformers']}, fxopt {head['fxopt']} {head['commit'] or ''}"
    )


def _progress(console: Console) -> Progress:
    return Progress(
        TextColumn("{task.description:<24}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeRemainingColumn(),
        console=console,
        transient=True,
    )


def _writer(out: Path | None) -> Callable[[Row], None]:
    if out is None:
        return lambda _: None
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text("")

    def write(entry: Row) -> None:
        with out.open("a") as file:
            file.write(json.dumps(_finite(entry)) + "\n")

    return write


def _finite(value: Any) -> Any:
    """JSON has no infinity."""
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    if isinstance(value, dict):
        return {key: _finite(entry) for key, entry in value.items()}
    return value


def _plain(plan: Plan) -> Row:
    return {name: value for name, value in vars(plan).items() if name != "out"}
