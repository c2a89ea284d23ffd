"""Run as a program, in Triton's interpreter: an attention with kernels against the same without, on the CPU,
with a clock that is made up; findings as JSON."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any
from unittest.mock import patch

import torch

from fxopt.codegen.contest import Contest
from fxopt.codegen.lone_call import Example, LoneCall
from fxopt.hosts import gpu_contest
from fxopt.runtime.kernel_cache import KernelCache

OPTIONS = {"host": "eager", "mode": "default", "triton.cudagraphs": False, "replay": "never"}


def operand(rows: int, learned: bool) -> Example:
    return Example((1, 2, rows, 16), (2 * rows * 16, 16, 32, 1), torch.float32, learned=learned)


def call(learned: bool = False, **more: Any) -> LoneCall:
    operands = tuple(operand(rows, learned) for rows in (24, 24, 24))
    return LoneCall("attention", operands, tuple(sorted(more.items())))


def held(one: LoneCall, wrong: list[str]) -> dict[str, Any]:
    """What a contest finds, and what both entrants computed on the same numbers."""
    results: list[Any] = []

    def sampler(run: Callable[[], Any]) -> Callable[[], float]:
        results.append(run())
        return lambda: 1.0 / len(results)

    def make(self: Example, device: str) -> torch.Tensor:
        torch.manual_seed(0)
        return made(self, device)

    made = Example.make
    changes = {"sampler": sampler} | ({"problems": lambda *_: wrong} if wrong else {})
    with (
        TemporaryDirectory() as directory,
        patch.multiple(gpu_contest, **changes),
        patch.object(Example, "make", make),
    ):
        options = {**OPTIONS, "cache_dir": directory}
        found: Contest = gpu_contest.contest(KernelCache(Path(directory)), one, options, 0.0, "cpu")
    pairs = zip(*(each if isinstance(each, tuple) else (each,) for each in results), strict=True)
    return {
        "problems": found.problems,
        "rounds": [len(found.kernel.seconds), len(found.host.seconds)],
        "apart": [float((ours - theirs).abs().max()) for ours, theirs in pairs] if len(results) == 2 else [],
    }


if __name__ == "__main__":
    capped = {"score": "10*tanh(s/10)", "is_causal": True}
    print(
        json.dumps(
            {
                "inference": held(call(**capped), []),
                "training": held(call(True, **capped), []),
                "wrong": held(call(**capped), ["it is wrong"]),
                "none": held(call(is_causal=True), []),
            }
        )
    )
