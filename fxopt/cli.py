"""The `fxopt` program: parses the command line. Each command is a module of `fxopt.commands`."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, NoReturn

import typer
from rich.console import Console
from rich.markup import escape

if TYPE_CHECKING:
    from fxopt.suites.plan import Plan

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

# The options of `bench`.
Suite = Annotated[
    list[str] | None,
    typer.Argument(
        help="A suite (hf, generate, train, attention, quant, fusion, compile), then models as for explain; "
        "without a suite: hf, without models: all that the suite has."
    ),
]
Models = Annotated[str | None, typer.Option(help="Models, separated by commas.")]
Size = Annotated[str, typer.Option("--size", "--sizes", help="tiny, small or full (GPU).")]
Infer = Annotated[bool, typer.Option("--infer", help="Inference only.")]
Train = Annotated[bool, typer.Option("--train", help="Training only.")]
Threads = Annotated[int, typer.Option(min=1, help="Threads of torch.")]
Mode = Annotated[str | None, typer.Option(help="torch.compile's mode, of fxopt and Inductor.")]
Seconds = Annotated[
    float | None, typer.Option(min=0.05, help="Time for the timing of one row; 4, with tiny 1.")
]
Batches = Annotated[str | None, typer.Option(help="Batch sizes, by commas.")]
Lengths = Annotated[str | None, typer.Option("--seq", "--lengths", help="Lengths, by commas.")]
Layers = Annotated[str | None, typer.Option(help="compile: depths, by commas.")]
Caches = Annotated[str, typer.Option(help="generate: dynamic, static, by commas.")]
Kv = Annotated[str, typer.Option(help="generate: auto, int8, fp8, by commas.")]
Quantize = Annotated[
    str | None, typer.Option(help="quant: schemes; generate: weights, dense among them; by commas.")
]
SuiteDtype = Annotated[str | None, typer.Option(help="As for explain; default: float32, quant: bfloat16.")]
Tokens = Annotated[int, typer.Option(min=2, help="generate: tokens that a row writes.")]
Tuned = Annotated[bool, typer.Option("--max-autotune", help="Inductor with max-autotune, too.")]
Cold = Annotated[bool, typer.Option("--cold", help="hf: empty caches for training rows, too.")]
Generate = Annotated[bool, typer.Option("--generate", help="compile: the first generate of decoders.")]
Repeats = Annotated[int | None, typer.Option(min=1, help="compile: processes for each figure.")]
NoCheck = Annotated[bool, typer.Option("--no-check", help="Do not compare with float64.")]
Out = Annotated[Path | None, typer.Option(help="Write JSON lines there.")]
Resume = Annotated[
    bool, typer.Option("--resume", help="Keep the rows that --out has of the same plan and commit.")
]


def main(words: list[str] | None = None) -> None:
    """Entry point of the console script. Errors that the user can put right end with exit code 2.

    Args:
        words: instead of those of the command line.
    """
    from fxopt.errors import UserError

    try:
        app(words)
    except UserError as error:
        fail(str(error))


def fail(message: str, code: int = 2) -> NoReturn:
    """Print to stderr and exit."""
    Console(stderr=True).print(f"[red]error:[/red] {escape(message)}", highlight=False)
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
    targets: Suite = None,
    models: Models = None,
    size: Size = "small",
    infer: Infer = False,
    train: Train = False,
    attention: Attention = None,
    dtype: SuiteDtype = None,
    device: Device = "cpu",
    threads: Threads = 1,
    mode: Mode = None,
    seconds: Seconds = None,
    batch: Batches = None,
    seq: Lengths = None,
    layers: Layers = None,
    caches: Caches = "dynamic,static",
    kv: Kv = "auto",
    quantize: Quantize = None,
    tokens: Tokens = 32,
    tuned: Tuned = False,
    cold: Cold = False,
    generate: Generate = False,
    repeats: Repeats = None,
    no_check: NoCheck = False,
    disable: Disable = None,
    out: Out = None,
    resume: Resume = False,
) -> None:
    """fxopt beside TorchInductor and others, in one process; Ctrl-C keeps what was measured."""
    given = dict(locals())
    from fxopt.commands import bench as command

    raise typer.Exit(command.run(_plan(given), Console()))


def _plan(given: dict[str, Any]) -> Plan:
    """The plan of `bench` from its options, by name."""
    from fxopt.suites.plan import DTYPES, SUITES, Plan

    names = [name for name in given.pop("targets") or [] if name.strip()]
    suite = names.pop(0) if names and names[0] in SUITES else "hf"
    infer, train = given.pop("infer"), given.pop("train")
    changed: dict[str, Any] = {
        "models": (*names, *_words(given.pop("models"))),
        "infer": infer or not train,
        "train": train or not infer,
        "batches": _numbers("--batch", given.pop("batch")),
        "lengths": _numbers("--seq", given.pop("seq")),
        "layers": _numbers("--layers", given.pop("layers")),
        "caches": _words(given.pop("caches")),
        "kv": _words(given.pop("kv")),
        "quantize": _words(given.pop("quantize")),
        "dtype": given.pop("dtype") or DTYPES.get(suite, "float32"),
        "check": not given.pop("no_check"),
        "options": _disabled(given.pop("disable")),
    }
    return Plan(suite=suite, **changed, **given)


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
