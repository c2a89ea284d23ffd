"""`fxopt bench`: fxopt beside TorchInductor and others, side by side in one process."""

from __future__ import annotations

from collections.abc import Sequence

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from fxopt.commands.outputs import check_output
from fxopt.measure import jobs
from fxopt.measure.noise import FASTER, NOISY, SLOWER, TOO_NOISY, name_of, summarize, verdict
from fxopt.measure.results import Results, Row
from fxopt.suites.plan import Plan, Suite, load

# Of the table where there is no terminal.
_WIDTH = 180
_COLOURS = {SLOWER: "red", FASTER: "green", NOISY: "yellow"}


def run(plan: Plan, console: Console) -> int:
    """Measure, print the table, write the lines. Returns the exit code: 1 for an error or a fault."""
    import torch
    import transformers

    from fxopt.measure.compiled import caches_in, empty_folder, warm_up
    from fxopt.measure.suite import release

    suite = load(plan.suite)
    plan.validate()
    check_output(plan.out)
    transformers.logging.set_verbosity_error()
    torch.set_num_threads(plan.threads)
    todo = suite.jobs(plan)
    keys = list(todo[0].key) if todo else []
    results = Results(plan.out, plan.plain(), keys)
    warm_up()
    with empty_folder() as folder, caches_in(folder):
        stopped = jobs.run(
            todo, results, console, resume=plan.resume, line=lambda row: _line(row, keys), failed=release
        )
    wide = console if console.is_terminal else Console(width=_WIDTH)
    if any("ratio" in row for row in results.rows):
        wide.print(_table(suite, results.rows, keys))
    for row in results.rows:
        for note in _notes(row):
            console.print(f"{name_of(row, keys)}: {note}", highlight=False)
    results.summary = {**summarize(results.rows, keys), "interrupted": stopped}
    _print_summary(results, console)
    jobs.finish(results, console)
    return 130 if stopped else int(any(_notes(row) for row in results.rows))


def _table(suite: Suite, rows: Sequence[Row], keys: Sequence[str]) -> Table:
    table = Table(title=suite.TITLE)
    for key in keys:
        table.add_column(key, no_wrap=True)
    for name in ("ratio", "95 %", "noise"):
        table.add_column(name, justify="right", no_wrap=True)
    for name in suite.COLUMNS:
        table.add_column(name, justify="right")
    for row in rows:
        if "ratio" in row:
            own = [str(row[key]) for key in keys]
            table.add_row(*own, *_ratio(row), *(cell(row) for cell in suite.COLUMNS.values()))
    return table


def _ratio(row: Row) -> tuple[str, str, str]:
    ratio, colour = row["ratio"], _COLOURS.get(verdict(row), "default")
    interval = f"{ratio['low']:.2f}-{ratio['high']:.2f}"
    return f"[{colour}]{ratio['median']:.3f}[/{colour}]", interval, f"{row['noise']['median']:.3f}"


def _notes(row: Row) -> list[str]:
    """What a reader of the row must know beside its numbers."""
    if "error" in row:
        return [f"[red]{escape(row['error'][:200])}[/red]"]
    told = row.get("errors", "other tokens")
    wrong = [] if row.get("accepted", True) else [f"[red]differs from eager: {told}[/red]"]
    wrong += [] if row.get("dashboard", True) else ["[red]fails the dashboard's rule of accuracy[/red]"]
    return wrong + [f"[yellow]fault: {escape(fault[:200])}[/yellow]" for fault in row.get("faults", ())]


def _line(row: Row, keys: Sequence[str]) -> str:
    head = f"{name_of(row, keys):<28}"
    if "ratio" not in row:
        return f"{head} {' '.join(_notes(row))}"
    ratio, interval, noise = _ratio(row)
    return "  ".join([head, ratio, f"({interval}, noise {noise})", *_notes(row)])


def _print_summary(results: Results, console: Console) -> None:
    from fxopt.measure.timing import clock_name

    summary, head = results.summary, results.machine
    if not summary["rows"]:
        console.print("nothing was measured")
        return
    console.print(
        f"[bold]geomean {summary['geomean']:.3f}[/bold], min {summary['min']:.3f} ({summary['min_row']}), "
        f"{len(summary['slower'])} of {summary['rows']} rows slower than Inductor; "
        f"noise (inductor against itself): geomean {summary['noise_geomean']:.3f}, "
        f"{summary['noise_min']:.3f} to {summary['noise_max']:.3f}"
    )
    for name, ratio in summary["over"].items():
        console.print(f"over {name}: geomean {ratio:.3f}")
    if not summary["conclusive"]:
        console.print(
            f"[yellow]too noisy to conclude: in {len(summary['too_noisy'])} of {summary['rows']} rows a "
            f"candidate differs from itself by more than {TOO_NOISY:.0%}[/yellow]"
        )
    console.print(
        f"{head['gpu'] or head['cpu']}, {head['threads']} thread(s), {clock_name()}; torch {head['torch']}, "
        f"transformers {head['transformers']}, fxopt {head['fxopt']} {head['commit'] or ''}"
    )
