"""How long a compilation takes, cold and warm, by depth, and fxopt's own share of it.

Each measurement is a process of its own with empty caches, and a second one that finds what the first has
left. The candidates take turns. fxopt's own share is what its stages before the host take (normalize, passes,
lower), as a part of the time until Inductor's first result. With `--generate` that is the first `generate`:
a prompt, one token, and tokens over a cache whose length has become a symbol.
"""

from __future__ import annotations

import functools
import json
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fxopt.measure.compiled import BASELINE, CANDIDATE, TWIN, caches_in, compile_with, empty_folder, warm_up
from fxopt.measure.jobs import Job
from fxopt.measure.results import Row
from fxopt.measure.timing import Timings
from fxopt.suites.plan import Plan

if TYPE_CHECKING:
    from fxopt.measure.models import Subject

TITLE = "time of a cold compilation, inductor / fxopt: more than 1 means that fxopt is faster"
COLUMNS: dict[str, Callable[[Row], str]] = {
    "inductor s": lambda row: f"{row['inductor']:.1f}",
    "fxopt s": lambda row: f"{row['fxopt']:.1f}",
    "warm s": lambda row: f"{row['warm']['inductor']:.1f} → {row['warm']['fxopt']:.1f}",
    "own s": lambda row: f"{row['own']:.2f}",
    "own / inductor": lambda row: f"{row['share']:.1%}",
    "attention, ms a layer": lambda row: f"{1000 * row['attention'] / row['layers']:.1f}",
    "sites": lambda row: str(row["sites"]),
}
LAYERS = (2, 4, 8, 16, 32)
MODELS = ("llama", "bert")
REPEATS = 3
OWN_STAGES = ("normalize", "passes", "lower")
ATTENTION_PASSES = ("rewrite-attention", "fold-causal-mask", "remove-repeat-kv", "recover-mask")


class CompilationFailed(RuntimeError):
    """The process that compiles ended with an error, whose end this shows."""


def jobs(plan: Plan) -> list[Job]:
    """One for each model, depth and phase."""
    phases = ["infer"] * plan.infer + ["train"] * plan.train
    phases = ["generate"] if plan.generate else phases
    return [
        Job(key, functools.partial(_measure, plan, key))
        for key in (
            {"model": model, "phase": phase, "layers": layers}
            for model in plan.targets(MODELS)
            for phase in phases
            for layers in plan.layers or LAYERS
        )
    ]


def _measure(plan: Plan, key: Row) -> Row:
    cold: dict[str, list[Row]] = {BASELINE: [], CANDIDATE: [], TWIN: []}
    warm: dict[str, list[Row]] = {name: [] for name in cold}
    for number in range(plan.repeats or REPEATS):
        for name in list(cold)[:: 1 if number % 2 else -1]:
            backend = BASELINE if name == TWIN else name
            with empty_folder() as folder:
                for found in (cold, warm):
                    found[name].append(_in_new_process(plan, key, backend, folder))
    times = Timings({name: [run["seconds"] for run in runs] for name, runs in cold.items()})
    again = {name: min(run["seconds"] for run in warm[name]) for name in (BASELINE, CANDIDATE)}
    return _row(times, cold[CANDIDATE]) | {"warm": again}


def _row(times: Timings, ours: list[Row]) -> Row:
    inductor, fxopt = (min(times.seconds[name]) for name in (BASELINE, CANDIDATE))
    stages = {stage: min(run["stages"].get(stage, 0.0) for run in ours) for stage in OWN_STAGES}
    own = sum(stages.values())
    return {
        "ratio": times.ratio(BASELINE, CANDIDATE).as_dict(),
        "noise": times.ratio(BASELINE, TWIN).as_dict(),
        "inductor": inductor,
        "fxopt": fxopt,
        "own": own,
        "share": own / inductor,
        "stages": stages,
        "attention": min(sum(run["passes"].get(name, 0.0) for name in ATTENTION_PASSES) for run in ours),
        "seconds": times.seconds,
        "sites": ours[0]["sites"],
        "dynamic": ours[0]["graphs"],
    }


def _in_new_process(plan: Plan, key: Row, backend: str, folder: Path) -> Row:
    how = {**key, "size": plan.size, "attention": plan.attention, "backend": backend, "folder": str(folder)}
    command = [sys.executable, "-m", "fxopt.suites.compile", json.dumps(how)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        raise CompilationFailed(done.stderr.strip().splitlines()[-1] if done.stderr else "no message")
    found: Row = json.loads(done.stdout.strip().splitlines()[-1])
    return found


def worker(how: Row) -> Row:
    """One compilation. Whatever is imported or set up once is done before, on another function."""
    import torch
    import transformers

    from fxopt.measure.compare import pass_seconds, stage_seconds
    from fxopt.measure.models import build
    from fxopt.measure.shrink import SCALES
    from fxopt.report.record import collect

    transformers.logging.set_verbosity_error()
    torch.set_num_threads(1)
    warm_up()
    scale = replace(SCALES[how["size"]], layers=how["layers"])
    training = how["phase"] == "train"
    subject = build(how["model"], scale, attention=how["attention"], training=training)
    cache = str(Path(how["folder"]) / "kernels")
    if how["phase"] == "generate":
        subject.model.compile(backend=how["backend"])
        step = _generation(subject)
    else:
        step = subject.step(compile_with(subject.model, how["backend"], cache=cache))
    with caches_in(Path(how["folder"])), collect() as records:
        start = time.perf_counter()
        step()
        first = time.perf_counter() - start
        start = time.perf_counter()
        step()
        second = time.perf_counter() - start
    return {
        "seconds": first - second,
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


if __name__ == "__main__":
    print(json.dumps(worker(json.loads(sys.argv[1]))))
