"""How much of the attention in transformers' models is recovered: `python -m benchmarks.attention_coverage`.

Forty and more architectures, in all forms in which they are called; beside it what Inductor's own patterns
find. Writes one JSON line for each call, and docs/attention_coverage.md from them. Compiles no code.
"""

from __future__ import annotations

import itertools
import json
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from rich.console import Console
from rich.progress import Progress

from benchmarks.coverage_count import count
from benchmarks.coverage_models import ENTRIES, Entry
from benchmarks.coverage_page import FORMS, Row, render
from fxopt.measure.machine import commit, describe
from fxopt.measure.models import CannotBuild
from fxopt.measure.results import Results
from fxopt.measure.suite import release

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "benchmarks" / "results" / "attention-coverage.jsonl"
PAGE = ROOT / "docs" / "attention_coverage.md"


@dataclass(frozen=True)
class Call:
    """One way to call a model."""

    attention: str
    dtype: str
    training: bool
    padded: bool


def calls(entry: Entry) -> Iterator[Call]:
    padding = (False, True) if entry.padding else (False,)
    for values in itertools.product(FORMS, ("float32", "bfloat16"), (False, True), padding):
        yield Call(*values)


# What Inductor finds, and the commit at which it was counted.
Counted = tuple[int, str]


def measure(entry: Entry, call: Call, inductor: Counted | None = None) -> Row | None:
    """One line; None when the model has no such form. `inductor`: what Inductor finds, where it is known."""
    dtype = getattr(torch, call.dtype)
    try:
        subject = entry.subject(call.attention, dtype, training=call.training, padded=call.padded)
    except CannotBuild:
        if call.attention == "eager":
            raise
        return None
    with torch.set_grad_enabled(call.training):
        found = count(subject.model, subject.kwargs, inductor=inductor is None)
    release()
    here = commit()
    found.inductor, counted = (found.inductor, here) if inductor is None else inductor
    head = {
        "kind": "row",
        "commit": here,
        "inductor_commit": counted,
        "model": entry.name,
        "class": entry.kind,
    }
    return head | vars(call) | found.as_dict()


def main(
    models: Annotated[str, typer.Option(help="Names, separated by commas; default: all.")] = "",
    out: Annotated[Path, typer.Option(help="The JSON lines. Other models' lines are kept.")] = RESULTS,
    page: Annotated[Path, typer.Option(help="The page rendered from them.")] = PAGE,
    page_only: Annotated[bool, typer.Option("--page-only", help="Render the page, measure nothing.")] = False,
    keep_inductor: Annotated[
        bool, typer.Option("--keep-inductor", help="Take Inductor's figures from the file: half the time.")
    ] = False,
    threads: Annotated[int, typer.Option(min=1)] = 1,
) -> None:
    """Count the attention layers that fxopt recovers, and those that Inductor's patterns match."""
    console = Console()
    if not page_only:
        torch.set_num_threads(threads)
        warnings.filterwarnings("ignore")
        _measure_all(models.split(",") if models else list(ENTRIES), out, keep_inductor, console)
    page.write_text(render(*read(out)))
    console.print(f"written to {page}")


def _measure_all(names: list[str], out: Path, keep_inductor: bool, console: Console) -> None:
    unknown = [name for name in names if name not in ENTRIES]
    if unknown:
        raise typer.BadParameter(f"no such architecture: {', '.join(unknown)}; known: {', '.join(ENTRIES)}")
    rows = read(out)[1] if out.exists() else []
    known = {(row["model"], call_of(row)): counted(row) for row in rows} if keep_inductor else {}
    with Progress(console=console, transient=True) as progress:
        task = progress.add_task("attention", total=sum(len([*calls(ENTRIES[name])]) for name in names))
        for name in names:
            found: list[Row] = []
            for call in calls(ENTRIES[name]):
                progress.update(task, advance=1, description=name)
                row = measure(ENTRIES[name], call, known.get((name, call)))
                found += [row] if row is not None else []
            rows = [row for row in rows if row["model"] != name] + found
            write(out, describe(), rows)
    faults = [(row["model"], fault) for row in rows for fault in row["faults"]]
    for model, fault in faults:
        console.print(f"{model}: {fault}", style="red", markup=False)


def call_of(row: Row) -> Call:
    return Call(row["attention"], row["dtype"], row["training"], row["padded"])


def counted(row: Row) -> Counted | None:
    """Inductor's figure of an earlier run; none where that run does not say at which commit it counted."""
    where = row.get("inductor_commit")
    return (row["inductor"], where) if where else None


def read(path: Path) -> tuple[dict[str, Any], list[Row]]:
    """The machine, and one row for each call, in the order of the table."""
    machine, *rows = map(json.loads, path.read_text().splitlines())
    places = {name: place for place, name in enumerate(ENTRIES)}
    return machine, sorted(rows, key=lambda row: places[row["model"]])


def write(path: Path, machine: dict[str, Any], rows: list[Row]) -> None:
    Results(path, {}, rows=rows, machine=machine).write()


if __name__ == "__main__":
    typer.run(main)
