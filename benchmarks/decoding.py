"""What the benchmarks of decoding share: the loop over their cases, the timing of a step, table and file."""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import track
from rich.table import Table

from fxopt.measure.compiled import compile_with
from fxopt.measure.machine import describe
from fxopt.measure.timing import interleave

BACKENDS = ("eager", "inductor", "inductor again", "fxopt")
Row = dict[str, Any]
Step = Callable[[], torch.Tensor]


def run(
    arguments: argparse.Namespace,
    cases: Sequence[tuple[int, int]],
    measure: Callable[[argparse.Namespace, int, int], Row],
    title: str,
) -> int:
    """Measure all cases, print them as a table, and write them to the file that was asked for.

    The file is written behind each case. Cases that are in it, of the same plan, are not measured again.
    """
    torch.set_num_threads(arguments.threads)
    console = Console()
    rows = measured(arguments)
    there = [row["case"] for row in rows]
    try:
        for case in track(cases, title, console=console, transient=True):
            if list(case) in there:
                continue
            rows.append({**measure(arguments, *case), "case": list(case)})
            if arguments.out:
                write(arguments.out, arguments, rows)
    except KeyboardInterrupt:
        console.print("stopped; what was measured is kept")
    console.print(table(rows, f"one token over {title}, milliseconds"))
    if arguments.out:
        console.print(f"written to {arguments.out}")
    return 0


def measured(arguments: argparse.Namespace) -> list[Row]:
    """The rows of a run of the same plan that was stopped."""
    if not arguments.out or not arguments.out.exists():
        return []
    found = json.loads(arguments.out.read_text())
    rows: list[Row] = [row for row in found["rows"] if "case" in row]
    return rows if found["plan"] == _plan(arguments) else []


def _plan(arguments: argparse.Namespace) -> dict[str, Any]:
    """What decides the figures, as it is in JSON."""
    plan: dict[str, Any] = json.loads(json.dumps(vars(arguments), default=str))
    return plan


def compile_all(model: Any) -> dict[str, Any]:
    """`model` as each backend runs it."""
    torch._dynamo.reset()
    return {name: model if name == "eager" else compile_with(model, name.split()[0]) for name in BACKENDS}


def compared(steps: Mapping[str, Step], seconds: float) -> Row:
    """The times of a step by backend, measured by turns. What is to be compiled is compiled."""
    timings = interleave(steps, budget_seconds=seconds)
    return {
        "seconds": {name: timings.median(name) for name in BACKENDS},
        "over_inductor": timings.ratio("inductor", "fxopt").as_dict(),
        "over_eager": timings.ratio("eager", "fxopt").as_dict(),
        "noise": timings.ratio("inductor again", "inductor").as_dict(),
    }


def table(rows: Sequence[Row], title: str) -> Table:
    """The cases, by whatever their rows begin with, and the figures of `compared`."""
    made = Table(title=title)
    keys = [name for name, value in (rows[0] if rows else {}).items() if isinstance(value, int | str)]
    for name in (*keys, "eager", "inductor", "fxopt", "over Inductor", "over eager", "noise"):
        made.add_column(name, justify="right")
    for row in rows:
        times = [f"{1000 * row['seconds'][name]:.1f}" for name in ("eager", "inductor", "fxopt")]
        ratios = [f"{row[name]['median']:.2f}" for name in ("over_inductor", "over_eager", "noise")]
        made.add_row(*(str(row[name]) for name in keys), *times, *ratios)
    return made


def write(path: Path, arguments: argparse.Namespace, rows: Sequence[Row]) -> None:
    """The rows as JSON, with the machine and the command."""
    found = {"machine": describe(), "plan": _plan(arguments), "rows": rows}
    path.write_text(json.dumps(found, indent=1) + "\n")


def numbers(text: str) -> list[int]:
    """What is given by commas."""
    return [int(part) for part in text.split(",")]


def add_common(parser: argparse.ArgumentParser, *, seconds: float) -> None:
    """The arguments that `run` and `compared` need."""
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--seconds", type=float, default=seconds, help="for the timing of one line")
    parser.add_argument("--out", type=Path, help="a JSON file")
