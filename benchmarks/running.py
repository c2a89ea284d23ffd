"""What every benchmark does around its figures: arguments, the loop, the table, the file of results."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterable
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table

from fxopt.measure.jobs import Job, finish
from fxopt.measure.jobs import run as measure_all
from fxopt.measure.results import Results, Row

# Arguments that say where results go, and not what is measured.
_NO_PLAN = ("out", "resume", "plot", "draw", "backend")


def run(
    arguments: argparse.Namespace,
    jobs: Iterable[Job],
    table: Callable[[list[Row]], Table],
) -> tuple[list[Row], int]:
    """Measure, print the table, write the file that was asked for.

    Returns:
        The rows that were measured, and the exit code: 1 when one of them went wrong.
    """
    jobs = list(jobs)
    torch.set_num_threads(arguments.threads)
    console = Console()
    plan = {name: value for name, value in vars(arguments).items() if name not in _NO_PLAN}
    results = Results(arguments.out, plan, keys=list(jobs[0].key) if jobs else ())
    stopped = measure_all(jobs, results, console, resume=arguments.resume)
    good = [row for row in results.rows if "error" not in row]
    if good:
        console.print(table(good))
    finish(results, console)
    return good, 130 if stopped else int(len(good) < len(results.rows))


def add_arguments(parser: argparse.ArgumentParser, *, seconds: float | None = None) -> None:
    """The arguments that `run` reads; `seconds` for a benchmark that times."""
    parser.add_argument("--threads", type=int, default=1)
    if seconds is not None:
        parser.add_argument("--seconds", type=float, default=seconds, help="for the timing of one line")
    parser.add_argument("--out", type=Path, help="a file of results: .jsonl or .json")
    parser.add_argument("--resume", action="store_true", help="keep what that file has of the same plan")


def numbers(text: str) -> list[int]:
    """What is given by commas."""
    return [int(part) for part in text.split(",")]
