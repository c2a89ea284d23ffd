"""`fxopt demo`: the main job on real input, by eager, TorchInductor and fxopt side by side."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn
from rich.table import Table

from fxopt.commands.outputs import CannotWrite, check_output, writing

if TYPE_CHECKING:
    from fxopt.commands.demo_jobs import Outcome

_MORE = (
    "README.md                          what fxopt is, and its limits",
    "docs/getting_started.md            use it in your own code",
    "fxopt explain llama --attn eager   every site and the reason for what was done or not done",
    "fxopt bench                        25 architectures against TorchInductor",
)


def run(
    console: Console,
    *,
    out: Path = Path("fxopt_demo.png"),
    as_json: bool = False,
    threads: int = 1,
) -> int:
    """Run the jobs, print the table, write the picture.

    Returns the exit code: 1 when an answer of fxopt differs from eager's by more than rounding, a generated
    token differs, or a stage of fxopt failed.

    Raises:
        WeightsMissing: the package with the weights is not installed.
        CannotWrite: the picture cannot be written to `out`.
    """
    # No model is fetched, and the tokenizer's threads would disturb the timing.
    os.environ["HF_HUB_OFFLINE"] = "1"
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    start = time.perf_counter()
    if not as_json:
        _check_picture(out)
    outcomes, subtitle = _run_jobs(Console(stderr=True) if as_json else console, threads)
    wrong = [one for one in outcomes if not one.right or one.faults]
    if as_json:
        print(json.dumps([_plain(one) for one in outcomes], indent=2))
        return int(bool(wrong))
    _print(outcomes, console)
    picture = _picture(outcomes, out, subtitle, console)
    if picture is not None:
        console.print(f"Picture: [bold]{picture}[/bold]")
    console.print(f"{subtitle}; {time.perf_counter() - start:.0f} s in all")
    console.print("\nRead more:", *(f"  {line}" for line in _MORE), sep="\n", highlight=False)
    return int(bool(wrong))


def _run_jobs(console: Console, threads: int) -> tuple[list[Outcome], str]:
    with _progress(console) as progress:
        task = progress.add_task("importing torch and transformers", total=None)
        import torch
        import transformers

        from fxopt.commands import demo_jobs
        from fxopt.measure.machine import cpu_name
        from fxopt.measure.timing import clock_name

        transformers.logging.set_verbosity_error()
        transformers.logging.disable_progress_bar()
        demo_jobs.weights()
        torch.set_num_threads(threads)
        jobs: tuple[tuple[str, Callable[..., Outcome]], ...] = (
            ("embeddings", demo_jobs.embeddings),
            ("generate", demo_jobs.generation),
            ("training", demo_jobs.training),
        )
        progress.update(task, total=len(jobs))
        outcomes = []
        for name, job in jobs:
            torch._dynamo.reset()
            outcomes.append(
                job(lambda doing, name=name: progress.update(task, description=f"{name}: {doing}"))
            )
            progress.advance(task)
    where = f"{cpu_name()}, {threads} thread(s), {clock_name()}"
    return outcomes, f"{where}, float32, torch {torch.__version__}"


def _print(outcomes: Sequence[Outcome], console: Console) -> None:
    console.print(_table(outcomes))
    for one in outcomes:
        console.print(f"[bold]{one.name}[/bold]: {one.what}", highlight=False)
        for fact in one.facts:
            console.print(f"    {escape(fact)}", highlight=False, overflow="ellipsis", no_wrap=True)
        first = ", ".join(f"{name} {seconds:.1f} s" for name, seconds in one.compiling.items())
        console.print(f"    first run with compilation: {first}", highlight=False)
        for fault in one.faults:
            console.print(f"    [red]fault of fxopt:[/red] {escape(fault)}")
    console.print()
    for one in outcomes:
        console.print(_verdict(one), highlight=False)
    console.print()


def _table(outcomes: Sequence[Outcome]) -> Table:
    table = Table(title="milliseconds, side by side; largest error against float64", title_justify="left")
    table.add_column("job")
    for name in ("eager", "inductor", "fxopt", "inductor / fxopt", "sites"):
        table.add_column(name, justify="right")
    for one in outcomes:
        colour = "green" if one.speed.low > 1 else "red" if one.speed.high < 1 else "default"
        ratio = f"[{colour}]{one.speed.median:.2f}[/] ({one.speed.low:.2f}-{one.speed.high:.2f})"
        times = [f"{1e3 * one.seconds[name]:.2f}" for name in ("eager", "inductor", "fxopt")]
        table.add_row(one.name, *times, ratio, str(one.sites))
        errors = [f"{one.errors[name]:.1e}" for name in ("eager", "inductor", "fxopt")]
        mark = "[green]same answer[/]" if one.right else "[red]differs[/]"
        table.add_row("[dim]  error against float64[/]", *(f"[dim]{error}[/]" for error in errors), mark, "")
    return table


def _verdict(one: Outcome) -> str:
    if not one.comparable:
        return f"[red]{one.name}: eager itself is {one.errors['eager']:.2g} away from float64[/red]"
    if one.errors["fxopt"] > one.allowed:
        return f"[red]{one.name}: fxopt's error is {one.errors['fxopt']:.2g}, allowed {one.allowed:.2g}[/red]"
    if one.same is False:
        return f"[red]{one.name}: fxopt's tokens differ from eager's[/red]"
    speed = one.speed
    if speed.low > 1:
        word = f"[green]{speed.median:.2f} times as fast as inductor[/green]"
    elif speed.high < 1:
        word = f"[red]slower than inductor: {speed.median:.2f} of its speed[/red]"
    else:
        word = f"as fast as inductor within the noise ({speed.median:.2f})"
    beside_eager = one.seconds["eager"] / one.seconds["fxopt"]
    return f"{one.name}: fxopt is {word}; {beside_eager:.2f} times as fast as eager"


def _check_picture(out: Path) -> None:
    """Raise `CannotWrite` for a place, or a format by its name, in which no picture can be."""
    check_output(out)
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
    except ImportError:  # there will be no picture
        return
    formats = FigureCanvasAgg.get_supported_filetypes()
    if out.suffix and out.suffix[1:].lower() not in formats:
        raise CannotWrite(path=out, reason=f"pictures end in .{', .'.join(sorted(formats))}")


def _picture(outcomes: Sequence[Outcome], out: Path, subtitle: str, console: Console) -> Path | None:
    try:
        from fxopt.commands.demo_picture import draw

        with writing(out):
            return draw(outcomes, out, subtitle)
    except ImportError as missing:
        console.print(f"[yellow]no picture: {missing}; pip install 'fxopt[demo]'[/yellow]")
        return None


def _plain(one: Outcome) -> dict[str, Any]:
    return {**vars(one), "speed": one.speed.as_dict(), "right": one.right}


def _progress(console: Console) -> Progress:
    return Progress(
        SpinnerColumn(),
        TextColumn("{task.description:<54}"),
        BarColumn(bar_width=20),
        TimeElapsedColumn(),
        console=console,
        transient=True,
    )
