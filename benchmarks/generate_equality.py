"""Tokens of compiled models beside those of eager ones: `python -m benchmarks.generate_equality`.

`torch.compile(model, backend="fxopt").generate`, many architectures with random weights in float32, in all
ways of generating. Writes one JSON line for each, and docs/generate_equality.md from them. Graphs run through
the eager host: what is judged is what fxopt makes of a model and its caches.
"""

from __future__ import annotations

import json
import logging
import warnings
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from rich.console import Console
from rich.progress import Progress

from benchmarks.equality_models import MODELS, SCALE, Writer, writer
from benchmarks.equality_page import render
from benchmarks.equality_scenarios import SCENARIOS, write
from fxopt.ir.contract import Status
from fxopt.measure.compiled import compile_with
from fxopt.measure.machine import describe
from fxopt.measure.results import Results
from fxopt.measure.suite import release
from fxopt.report.record import GraphRecord, collect
from fxopt.runtime.kv_state import STATE

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "benchmarks" / "results" / "generate-equality.jsonl"
PAGE = ROOT / "docs" / "generate_equality.md"
NEW = 200
# Tokens of the text whose appends are counted.
LONG = 2000
# Prompts by turns; the first one is the first call.
LENGTHS = (9, 20, 31, 14)
Row = dict[str, Any]


def measure(writer: Writer, compiled: Any, scenario: str, new: int = NEW) -> Row:
    """One way of generating, eager and compiled. The graphs are those that were not there before."""
    eager = SCENARIOS[scenario](writer.model, writer, new)
    in_place, copied = STATE.in_place, STATE.copied
    with collect() as records:
        found = SCENARIOS[scenario](compiled, writer, new)
    return {
        "kind": "scenario",
        "model": writer.subject.name,
        "scenario": scenario,
        "tokens": sum(text.numel() for text in eager),
        "equal": sum(map(_equal_tokens, found, eager)),
        "distinct": len(torch.cat([text.flatten() for text in eager]).unique()),
        "graphs": len(records),
        "in_place": STATE.in_place - in_place,
        "copied": STATE.copied - copied,
        "faults": faults(records),
    }


def grow(writer: Writer, compiled: Any, new: int = LONG) -> Row:
    """The graphs that prompts of several lengths need, and how many appends of a long text are in place.

    Args:
        compiled: nothing was called with it yet.
    """
    graphs = []
    with collect() as records:
        for length in LENGTHS:
            before = len(records)
            write(compiled, writer.prompt(length=length), 30)
            graphs.append(len(records) - before)
    in_place, copied = STATE.in_place, STATE.copied
    write(compiled, writer.prompt(), new)
    return {
        "kind": "growth",
        "model": writer.subject.name,
        "graphs": graphs,
        "tokens": new,
        "appends": 2 * SCALE.layers * (new - 1),
        "in_place": STATE.in_place - in_place,
        "copied": STATE.copied - copied,
        "faults": faults(records),
    }


def compiled(writer: Writer) -> Any:
    """The model as a user compiles it, but that a fault of fxopt raises, and the host is the cheap one."""
    release()
    return compile_with(writer.model, "fxopt", {"host": "eager", "strict": True})


def _equal_tokens(found: torch.Tensor, eager: torch.Tensor) -> int:
    return int((found == eager).sum()) if found.shape == eager.shape else 0


def faults(records: list[GraphRecord]) -> list[str]:
    """What went wrong in these graphs."""
    found = [f"{stage}: {message}" for record in records for stage, message in record.failures]
    found += [
        f"{entry.rewrite}: {entry.reason}"
        for record in records
        for entry in record.evidence
        if entry.status is Status.ERROR
    ]
    return found


def main(
    models: Annotated[str, typer.Option(help="Names, separated by commas; default: all.")] = "",
    out: Annotated[Path, typer.Option(help="The JSON lines. Other models' lines are kept.")] = RESULTS,
    page: Annotated[Path, typer.Option(help="The page rendered from them.")] = PAGE,
    page_only: Annotated[bool, typer.Option("--page-only", help="Render the page, run nothing.")] = False,
    new: Annotated[int, typer.Option(min=8, help="Tokens to write in each way.")] = NEW,
    long: Annotated[int, typer.Option(min=8, help="Tokens of the text whose appends are counted.")] = LONG,
) -> None:
    """Compare the tokens of compiled and eager models in all ways of generating."""
    console = Console()
    if not page_only:
        torch.set_num_threads(1)
        warnings.filterwarnings("ignore")
        logging.getLogger("transformers").setLevel(logging.ERROR)
        _measure_all(models.split(",") if models else list(MODELS), out, (new, long), console)
    page.write_text(render(*read(out)))
    console.print(f"written to {page}")


def _measure_all(names: list[str], out: Path, lengths: tuple[int, int], console: Console) -> None:
    unknown = [name for name in names if name not in MODELS]
    if unknown:
        raise typer.BadParameter(f"no such model: {', '.join(unknown)}; known: {', '.join(MODELS)}")
    rows = read(out)[1] if out.exists() else []
    new, long = lengths
    with Progress(console=console, transient=True) as progress, torch.no_grad():
        task = progress.add_task("tokens", total=len(names) * (len(SCENARIOS) + 1))
        for name in names:
            one = writer(name)
            model = compiled(one)
            progress.update(task, advance=1, description=f"{name}, growth")
            found = [grow(one, model, long)]
            for scenario in SCENARIOS:
                progress.update(task, advance=1, description=f"{name}, {scenario}")
                found.append(measure(one, model, scenario, new))
            rows = [row for row in rows if row["model"] != name] + found
            write_rows(out, describe(), rows)
    for row in rows:
        for fault in row["faults"]:
            console.print(f"{row['model']}: {fault}", style="red", markup=False)


def read(path: Path) -> tuple[Row, list[Row]]:
    """The machine, and the rows in the order of the table."""
    machine, *rows = map(json.loads, path.read_text().splitlines())
    places = {name: place for place, name in enumerate(MODELS)}
    return machine, sorted(rows, key=lambda row: places[row["model"]])


def write_rows(path: Path, machine: Row, rows: list[Row]) -> None:
    Results(path, {}, rows=rows, machine=machine).write()


if __name__ == "__main__":
    typer.run(main)
