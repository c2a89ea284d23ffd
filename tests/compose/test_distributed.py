"""Two processes that share a model: DDP and FSDP2, with losses and gradients of the eager run of the same."""

from __future__ import annotations

import contextlib
import copy
import os
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

from support.numerics import assert_closer
from support.reference import double_model, reference_mode, to_double
from support.rounding import perturbed
from support.runs import train
from support.zoo import ZOO

HERE = Path(__file__).resolve().parent
WORKER = HERE / "distributed_worker.py"
WORLD, STEPS, RATE = 2, 2, 0.1
LAYERS = 2
# The whole of a run, which takes about 30 seconds on two idle cores. A hang must fail, and soon.
SECONDS = 150
LLAMA = ZOO["llama"]

Way = tuple[str, str]  # wrapping, host
Results = list[list[dict[str, Any]]]


def launch(rank: int, folder: Path) -> subprocess.Popen[bytes]:
    environment = os.environ | {"PYTHONPATH": str(HERE.parent), "OMP_NUM_THREADS": "1"}
    with (folder / f"log_{rank}.txt").open("wb") as log:
        return subprocess.Popen(
            [sys.executable, str(WORKER), str(rank), str(folder)],
            env=environment,
            stdout=log,
            stderr=subprocess.STDOUT,
        )


def run_group(folder: Path) -> list[dict[Way, Any]]:
    """What each process wrote. When one fails or hangs, both are ended."""
    processes = [launch(rank, folder) for rank in range(WORLD)]
    deadline = time.monotonic() + SECONDS
    with contextlib.suppress(subprocess.TimeoutExpired):
        for process in processes:
            process.wait(timeout=deadline - time.monotonic())
    codes = [process.poll() for process in processes]
    for process in processes:
        process.kill()
        process.wait()
    logs = "\n\n".join((folder / f"log_{rank}.txt").read_text()[-4000:] for rank in range(WORLD))
    assert codes == [0] * WORLD, f"exit codes {codes} (None: still running after {SECONDS} s)\n{logs}"
    return [torch.load(folder / f"result_{rank}.pt", weights_only=False) for rank in range(WORLD)]


def simulate(model: torch.nn.Module, inputs: Sequence[dict[str, Any]]) -> Results:
    """One process that does what the group should: gradient descent by the mean of the gradients."""
    model = copy.deepcopy(model)
    found: Results = [[] for _ in inputs]
    for _ in range(STEPS):
        results = [train(model, model, one) for one in inputs]
        means = {
            name: torch.stack([result["gradients"][name] for result in results]).mean(0)
            for name, _ in model.named_parameters()
        }
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                parameter.sub_(means[name], alpha=RATE)
        for steps, result in zip(found, results, strict=True):
            loss, logits = result["loss"].detach(), result["output"].logits.detach()
            steps.append({"loss": loss, "logits": logits, "gradients": means})
    return found


# Way -> rewrites wanted in it. FSDP2's hooks part the graph at each layer, and equal layers share one graph.
DDP = {"fuse-rms-norm": 2 * LAYERS + 1, "rewrite-attention": LAYERS}
FSDP = {"fuse-rms-norm": 2 + 1, "rewrite-attention": 1}
FAMILIES: dict[str, dict[Way, dict[str, int]]] = {
    "ddp": {
        ("ddp_inside", "eager"): DDP,
        ("ddp_outside", "eager"): DDP,
    },
    "fsdp2": {
        ("fsdp_whole", "eager"): FSDP,
        ("fsdp_layers", "inductor"): {"fuse-rms-norm": 2, "rewrite-attention": 1},
    },
}


@pytest.mark.parametrize("family", FAMILIES)
def test_two_processes(family: str, tmp_path: Path) -> None:
    wanted = FAMILIES[family]
    model = LLAMA.make_model("sdpa").train()
    inputs = [
        LLAMA.make_inputs(training=True, mask="right", seed=rank) | {"use_cache": False}
        for rank in range(WORLD)
    ]
    job = {"model": model, "inputs": inputs, "ways": list(wanted), "steps": STEPS, "rate": RATE}
    torch.save(job, tmp_path / "job.pt")
    found = run_group(tmp_path)
    with reference_mode():
        reference = simulate(double_model(model), [to_double(one) for one in inputs])
    others = perturbed(lambda: simulate(model, inputs))
    for way, rewrites in wanted.items():
        for process in found:
            fxopt = process[way]["fxopt"]
            assert not fxopt["faults"], way
            assert fxopt["applied"] >= Counter(rewrites), way
        candidate = [process[way]["fxopt"]["results"] for process in found]
        eager = [process[way]["eager"] for process in found]
        assert_closer(reference, candidate, eager, roundings=others, what=str(way))
