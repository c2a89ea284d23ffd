"""What the benchmarks of decoding share: the loop over their cases, the timing of a step, the table."""

from __future__ import annotations

import argparse
import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from rich.table import Table

from benchmarks.running import run as run_all
from fxopt.measure.compiled import compile_with
from fxopt.measure.jobs import Job
from fxopt.measure.results import Row
from fxopt.measure.timing import interleave

BACKENDS = ("eager", "inductor", "inductor again", "fxopt")
Step = Callable[[], torch.Tensor]


def run(
    arguments: argparse.Namespace,
    cases: Sequence[Mapping[str, int]],
    measure: Callable[..., Row],
    title: str,
) -> int:
    """Measure all cases, print them as a table, and write them to the file that was asked for."""
    jobs = [Job(case, functools.partial(measure, arguments, **case)) for case in cases]
    return run_all(arguments, jobs, lambda rows: table(rows, f"one token over {title}, milliseconds"))[1]


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
