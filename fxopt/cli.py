"""The `fxopt` program: parses the command line. Each command is a module of `fxopt.commands`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, NoReturn

import typer
from rich.console import Console

app = typer.Typer(
    name="fxopt",
    help="The transformer-aware torch.compile backend: look at it, try it, measure it.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)

Batch = Annotated[int | None, typer.Option(min=1, help="Batch size of generated inputs.")]
Seq = Annotated[int | None, typer.Option(min=1, help="Sequence length of generated inputs.")]
Dtype = Annotated[str, typer.Option(help="float32, bfloat16, float16 or float64.")]
Attention = Annotated[str | None, typer.Option("--attn", help="eager or sdpa; default: transformers' own.")]
Device = Annotated[str, typer.Option(help="cpu, cuda, cuda:1, ...")]
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON instead of a table.")]
Disable = Annotated[str | None, typer.Option(help="Passes not to run, separated by commas; or all.")]


def main() -> None:
    """Entry point of the console script. Errors that the user can put right end with exit code 2."""
    from fxopt.errors import UserError

    try:
        app()
    except UserError as error:
        fail(str(error))


def fail(message: str, code: int = 2) -> NoReturn:
    """Print to stderr and exit."""
    Console(stderr=True).print(f"[red]error:[/red] {message}", highlight=False, markup=True)
    raise SystemExit(code)


@app.callback(invoke_without_command=True)
def options(
    version: Annotated[bool, typer.Option("--version", help="Print the version and exit.")] = False,
) -> None:
    if version:
        from fxopt import __version__

        print(f"fxopt {__version__}")
        raise typer.Exit


@app.command()
def doctor(
    as_json: AsJson = False,
    full: Annotated[bool, typer.Option("--full", help="Also compile with Inductor.")] = False,
) -> None:
    """What fxopt finds here, what it will use and what is missing; exit code 1 if it cannot work."""
    from fxopt.commands import doctor as command

    raise typer.Exit(command.run(Console(), as_json=as_json, full=full))


@app.command()
def explain(
    target: Annotated[
        str, typer.Argument(help="module:function, a saved model's directory, a model type, or a model id.")
    ],
    train: Annotated[bool, typer.Option("--train", help="A training step: forward and backward.")] = False,
    size: Annotated[str, typer.Option(help="tiny or small; for model types.")] = "tiny",
    batch: Batch = None,
    seq: Seq = None,
    dtype: Dtype = "float32",
    attention: Attention = None,
    device: Device = "cpu",
    as_json: AsJson = False,
    html: Annotated[Path | None, typer.Option(help="Also write the report as a web page.")] = None,
    verbose: Annotated[bool, typer.Option("--verbose", "-v", help="Every site in a row of its own.")] = False,
    host: Annotated[str, typer.Option(help="auto, inductor or eager (quick: nothing is compiled).")] = "auto",
    disable: Disable = None,
) -> None:
    """Every place where fxopt acted or did not, with the reason."""
    from fxopt.commands import explain as command
    from fxopt.commands.targets import Request

    request = Request(size, batch, seq, dtype, attention, train, device)
    given = {"host": host} | _disabled(disable)
    code = command.run(target, request, Console(), options=given, as_json=as_json, verbose=verbose, html=html)
    raise typer.Exit(code)


@app.command()
def demo(
    out: Annotated[Path, typer.Option(help="Where the picture is written.")] = Path("fxopt_demo.png"),
    threads: Annotated[int, typer.Option(min=1, help="Threads of torch.")] = 1,
    as_json: AsJson = False,
) -> None:
    """The main job on real input, in about three minutes: eager, inductor and fxopt side by side."""
    from fxopt.commands import demo as command

    raise typer.Exit(command.run(Console(), out=out, as_json=as_json, threads=threads))


@app.command()
def bench(
    targets: Annotated[
        list[str] | None,
        typer.Argument(
            help="A suite (hf, generate, train, attention, fusion, compile), then models as for explain; "
            "without a suite: hf, without models: all that the suite has."
        ),
    ] = None,
    models: Annotated[str | None, typer.Option(help="The same, separated by commas.")] = None,
    size: Annotated[str, typer.Option("--size", "--sizes", help="tiny, small or full (GPU).")] = "small",
    infer: Annotated[bool, typer.Option("--infer", help="Inference only.")] = False,
    train: Annotated[bool, typer.Option("--train", help="Training only.")] = False,
    attention: Attention = None,
    dtype: Dtype = "float32",
    device: Device = "cpu",
    threads: Annotated[int, typer.Option(min=1, help="Threads of torch.")] = 1,
    mode: Annotated[str | None, typer.Option(help="torch.compile's mode, of fxopt and Inductor.")] = None,
    seconds: Annotated[
        float | None, typer.Option(min=0.05, help="Time for the timing of one row; 4, with tiny 1.")
    ] = None,
    batch: Annotated[str | None, typer.Option(help="Batch sizes, by commas.")] = None,
    seq: Annotated[str | None, typer.Option("--seq", "--lengths", help="Lengths, by commas.")] = None,
    layers: Annotated[str | None, typer.Option(help="Depths for the suite compile, by commas.")] = None,
    caches: Annotated[str, typer.Option(help="For the suite generate, by commas.")] = "dynamic,static",
    kv: Annotated[str, typer.Option(help="auto, int8, fp8; for generate, by commas.")] = "auto",
    tokens: Annotated[int, typer.Option(min=2, help="Tokens that a row of generate writes.")] = 32,
    tuned: Annotated[
        bool, typer.Option("--max-autotune", help="Inductor with max-autotune beside the others.")
    ] = False,
    cold: Annotated[bool, typer.Option("--cold", help="Empty caches for training rows, too.")] = False,
    generate: Annotated[
        bool, typer.Option("--generate", help="compile: the first generate of decoders.")
    ] = False,
    repeats: Annotated[int | None, typer.Option(min=1, help="compile: processes for each figure.")] = None,
    no_check: Annotated[bool, typer.Option("--no-check", help="Do not compare with float64.")] = False,
    disable: Disable = None,
    out: Annotated[Path | None, typer.Option(help="Write JSON lines there.")] = None,
    resume: Annotated[
        bool, typer.Option("--resume", help="Keep the rows that --out has of the same plan and commit.")
    ] = False,
) -> None:
    """fxopt beside TorchInductor and others, in one process; Ctrl-C keeps what was measured."""
    from fxopt.commands import bench as command
    from fxopt.suites.plan import SUITES, Plan

    names = [name for name in targets or [] if name.strip()]
    suite = names.pop(0) if names and names[0] in SUITES else "hf"
    plan = Plan(
        suite=suite,
        models=(*names, *_words(models)),
        size=size,
        infer=infer or not train,
        train=train or not infer,
        attention=attention,
        dtype=dtype,
        device=device,
        threads=threads,
        mode=mode,
        seconds=seconds,
        batches=_numbers("--batch", batch),
        lengths=_numbers("--seq", seq),
        layers=_numbers("--layers", layers),
        caches=_words(caches),
        kv=_words(kv),
        tokens=tokens,
        tuned=tuned,
        cold=cold,
        generate=generate,
        repeats=repeats,
        check=not no_check,
        options=_disabled(disable),
        out=out,
        resume=resume,
    )
    raise typer.Exit(command.run(plan, Console()))


def _words(text: str | None) -> tuple[str, ...]:
    return tuple(word.strip() for word in (text or "").split(",") if word.strip())


def _numbers(flag: str, text: str | None) -> tuple[int, ...]:
    words = _words(text)
    if not all(word.isdecimal() and int(word) > 0 for word in words):
        raise typer.BadParameter(f"{flag} wants positive numbers, separated by commas, and not {text!r}")
    return tuple(map(int, words))


cache_app = typer.Typer(
    help="The files of emitted kernels: look, empty, take elsewhere.", no_args_is_help=True
)
app.add_typer(cache_app, name="cache")


@cache_app.command()
def info(as_json: AsJson = False) -> None:
    """Where they are, how many, how large."""
    from fxopt.commands import cache as command
    from fxopt.runtime.kernel_cache import default_cache

    raise typer.Exit(command.info(default_cache(), Console(), as_json=as_json))


@cache_app.command()
def clear() -> None:
    """Remove them all."""
    from fxopt.commands import cache as command
    from fxopt.runtime.kernel_cache import default_cache

    raise typer.Exit(command.clear(default_cache(), Console()))


@cache_app.command()
def export(file: Annotated[Path, typer.Argument(help="The zip archive to write.")]) -> None:
    """Write them to an archive."""
    from fxopt.commands import cache as command
    from fxopt.runtime.kernel_cache import default_cache

    raise typer.Exit(command.export(default_cache(), file, Console()))


@cache_app.command("import")
def import_(file: Annotated[Path, typer.Argument(help="An archive of `fxopt cache export`.")]) -> None:
    """Take over the entries of an archive."""
    from fxopt.commands import cache as command
    from fxopt.runtime.kernel_cache import default_cache

    raise typer.Exit(command.import_(default_cache(), file, Console()))


def _disabled(names: str | None) -> dict[str, Any]:
    return {"disable": [name.strip() for name in names.split(",")]} if names else {}


if __name__ == "__main__":
    main()
