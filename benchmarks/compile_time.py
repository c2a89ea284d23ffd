"""How long a cold compilation takes, and fxopt's own share of it: `python -m benchmarks.compile_time`.

Each measurement is a process of its own with empty caches, the two backends take turns, and the fastest of
the repeats counts: whatever else the machine does only adds. fxopt's own share is what its stages before the
host take (normalize, passes, lower), as a part of the time until Inductor's first result. With `--generate`
that is the first `generate`: a prompt, one token, and tokens over a cache whose length has become a symbol.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.progress import track
from rich.table import Table

if TYPE_CHECKING:
    from fxopt.measure.models import Subject

BACKENDS = ("inductor", "fxopt")
OWN_STAGES = ("normalize", "passes", "lower")
ATTENTION_PASSES = ("rewrite-attention", "fold-causal-mask", "remove-repeat-kv", "recover-mask")


def main() -> int:
    arguments = _parser().parse_args()
    if arguments.worker:
        print(json.dumps(_worker(arguments)))
        return 0
    console = Console()
    models = arguments.models.split(",")
    todo = [(model, backend) for _ in range(arguments.repeats) for model in models for backend in BACKENDS]
    found: dict[tuple[str, str], list[dict[str, Any]]] = defaultdict(list)
    for model, backend in track(todo, "cold compilations", console=console, transient=True):
        found[model, backend].append(_in_new_process(arguments, model, backend))
    rows = [_row(model, found[model, "inductor"], found[model, "fxopt"]) for model in models]
    console.print(_table(rows, arguments))
    if arguments.out:
        _write(arguments.out, rows, arguments)
    return 0


def _in_new_process(arguments: argparse.Namespace, model: str, backend: str) -> dict[str, Any]:
    command = [sys.executable, "-m", "benchmarks.compile_time", "--worker", backend, "--models", model]
    command += ["--layers", str(arguments.layers), "--size", arguments.size]
    command += ["--attn", arguments.attn] if arguments.attn else []
    command += ["--train"] if arguments.train else []
    command += ["--generate"] if arguments.generate else []
    with tempfile.TemporaryDirectory() as cache:
        environment = os.environ | {"TORCHINDUCTOR_CACHE_DIR": cache}
        done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        raise SystemExit(f"{model} with {backend} failed:\n{done.stderr[-2000:]}")
    return json.loads(done.stdout.strip().splitlines()[-1])  # type: ignore[no-any-return]


def _worker(arguments: argparse.Namespace) -> dict[str, Any]:
    """One cold compilation. Whatever is imported or set up once is done before, on another function."""
    import torch
    import transformers

    from fxopt.measure.compare import pass_seconds, stage_seconds
    from fxopt.measure.models import build
    from fxopt.measure.shrink import SCALES
    from fxopt.report.record import collect

    transformers.logging.set_verbosity_error()
    torch.set_num_threads(1)
    torch.compile(lambda x: (x * 2).sum(), backend=arguments.worker)(torch.ones(8))
    torch._dynamo.reset()
    scale = replace(SCALES[arguments.size], layers=arguments.layers)
    subject = build(arguments.models, scale, attention=arguments.attn, training=arguments.train)
    subject.model.compile(backend=arguments.worker)
    step = _generation(subject) if arguments.generate else subject.step(subject.model)
    with collect() as records:
        start = time.perf_counter()
        step()
        first = time.perf_counter() - start
    start = time.perf_counter()
    step()
    return {
        "seconds": first - (time.perf_counter() - start),
        "stages": stage_seconds(records),
        "passes": pass_seconds(records),
        "sites": sum(len(record.applied()) for record in records),
        "graphs": [record.dynamic for record in records],
    }


def _generation(subject: Subject) -> Callable[[], Any]:
    """Greedy decoding of a few tokens over the default, growing cache."""
    prompt = subject.kwargs["input_ids"]
    ends = {"pad_token_id": 0, "eos_token_id": None}
    return lambda: subject.model.generate(prompt, max_new_tokens=6, do_sample=False, **ends)


def _row(model: str, theirs: list[dict[str, Any]], ours: list[dict[str, Any]]) -> dict[str, Any]:
    inductor = min(run["seconds"] for run in theirs)
    stages = {stage: min(run["stages"].get(stage, 0.0) for run in ours) for stage in OWN_STAGES}
    own = sum(stages.values())
    return {
        "model": model,
        "inductor": inductor,
        "fxopt": min(run["seconds"] for run in ours),
        "own": own,
        "share": own / inductor,
        "stages": stages,
        "attention": min(sum(run["passes"].get(name, 0.0) for name in ATTENTION_PASSES) for run in ours),
        "seconds": {
            "inductor": [run["seconds"] for run in theirs],
            "fxopt": [run["seconds"] for run in ours],
        },
        "sites": ours[0]["sites"],
        "dynamic": ours[0]["graphs"],
    }


def _table(rows: list[dict[str, Any]], arguments: argparse.Namespace) -> Table:
    phase = "training" if arguments.train else "generate" if arguments.generate else "inference"
    table = Table(title=f"cold compilation, {arguments.layers} layers, {phase}, seconds")
    table.add_column("model")
    for name in (
        "inductor",
        "fxopt",
        "own part",
        *OWN_STAGES,
        "own / inductor",
        "sites",
        "attention, ms a layer",
    ):
        table.add_column(name, justify="right")
    for row in rows:
        figures = [row["inductor"], row["fxopt"], row["own"], *row["stages"].values()]
        cells = [f"{figure:.2f}" for figure in figures]
        table.add_row(row["model"], *cells, f"{row['share']:.1%}", str(row["sites"]), _layer(row, arguments))
    return table


def _layer(row: dict[str, Any], arguments: argparse.Namespace) -> str:
    return f"{1000 * row['attention'] / arguments.layers:.1f}"


def _write(out: Path, rows: list[dict[str, Any]], arguments: argparse.Namespace) -> None:
    from fxopt.measure.machine import describe

    plan = {
        name: getattr(arguments, name) for name in ("layers", "size", "attn", "train", "generate", "repeats")
    }
    lines = [{"kind": "machine", **describe(), "plan": plan}, *({"kind": "row", **row} for row in rows)]
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text("".join(json.dumps(line) + "\n" for line in lines))


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--models", default="bert,llama")
    parser.add_argument("--layers", type=int, default=12)
    parser.add_argument("--size", default="tiny", choices=("tiny", "small"))
    parser.add_argument("--attn", choices=("eager", "sdpa"))
    parser.add_argument("--train", action="store_true")
    parser.add_argument("--generate", action="store_true", help="decoders only")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--out", type=Path)
    parser.add_argument("--worker", help=argparse.SUPPRESS)
    return parser


if __name__ == "__main__":
    raise SystemExit(main())
