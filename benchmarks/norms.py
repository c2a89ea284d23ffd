"""Norms by themselves, beside Inductor: `python -m benchmarks.norms`.

Layer norm, RMS norm as models spell it, RMS norm of a residual sum that is a second result, and group norm:
inference, and training with the gradients of weights. What is written is what others read next, so nothing is
fused but the norm.
"""

from __future__ import annotations

import argparse
import functools
import itertools
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from typing import Any

import torch
from rich.table import Table
from torch import nn

from benchmarks.running import add_arguments, numbers, run
from fxopt.measure.compare import Comparison, compare
from fxopt.measure.jobs import Job
from fxopt.measure.models import Subject

PHASES = {"inference": False, "training": True}
GROUPS = 32
Tensor = torch.Tensor


class Layer(nn.Module):
    """``nn.LayerNorm`` of (1, tokens, width)."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width)

    def forward(self, x: Tensor, residual: Tensor) -> dict[str, Tensor]:
        return {"normed": self.norm(x)}


class Group(nn.Module):
    """``nn.GroupNorm`` of the same numbers as (1, width, tokens)."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm = nn.GroupNorm(GROUPS, width)

    def forward(self, x: Tensor, residual: Tensor) -> dict[str, Tensor]:
        return {"normed": self.norm(x.view(1, x.shape[2], x.shape[1]))}


class Rms(nn.Module):
    """As Llama has it."""

    def __init__(self, width: int) -> None:
        from transformers.models.llama.modeling_llama import LlamaRMSNorm

        super().__init__()
        self.norm = LlamaRMSNorm(width)

    def forward(self, x: Tensor, residual: Tensor) -> dict[str, Tensor]:
        return {"normed": self.norm(x)}


class Residual(Rms):
    """The same of a sum, which goes on."""

    def forward(self, x: Tensor, residual: Tensor) -> dict[str, Tensor]:
        total = x + residual
        return {"normed": self.norm(total), "total": total}


KINDS: dict[str, type[nn.Module]] = {"layer": Layer, "rms": Rms, "residual rms": Residual, "group": Group}


@dataclass(frozen=True)
class Case:
    """One line."""

    norm: str
    tokens: int
    width: int
    dtype: str
    phase: str

    def subject(self) -> Subject:
        torch.manual_seed(0)
        dtype, training = getattr(torch, self.dtype), PHASES[self.phase]
        model = KINDS[self.norm](self.width).to(dtype).train(training)
        inputs = {
            name: torch.randn(1, self.tokens, self.width).to(dtype).requires_grad_(training)
            for name in ("x", "residual")
        }
        return Subject(self.norm, model, kwargs=inputs, training=training)


def cases(arguments: argparse.Namespace) -> Iterator[Case]:
    sizes = numbers(arguments.tokens), numbers(arguments.widths)
    given = (arguments.norms.split(","), *sizes, arguments.dtypes.split(","), PHASES)
    return itertools.starmap(Case, itertools.product(*given))


def main() -> int:
    arguments = _parser().parse_args()
    jobs = [Job(asdict(case), functools.partial(measure, case, arguments)) for case in cases(arguments)]
    return run(arguments, jobs, _table)[1]


def measure(case: Case, arguments: argparse.Namespace) -> dict[str, Any]:
    """The figures of one line."""
    return _row(compare(case.subject(), check=False, budget_seconds=arguments.seconds))


def _row(found: Comparison) -> dict[str, Any]:
    return {
        "ratio": found.speed.as_dict(),
        "noise": found.noise.as_dict(),
        "seconds": {name: found.timings.median(name) for name in ("inductor", "fxopt")},
    }


def _table(rows: list[dict[str, Any]]) -> Table:
    table = Table(title="norms, Inductor → fxopt")
    for name in ("norm", "tokens", "width", "dtype", "phase", "us", "faster", "noise"):
        table.add_column(name, justify="right")
    for row in rows:
        case = [str(row[name]) for name in ("norm", "tokens", "width", "dtype", "phase")]
        times = " → ".join(f"{1e6 * row['seconds'][name]:.0f}" for name in ("inductor", "fxopt"))
        table.add_row(*case, times, *(f"{row[name]['median']:.3f}" for name in ("ratio", "noise")))
    return table


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--norms", default=",".join(KINDS), help="by commas")
    parser.add_argument("--tokens", default="512")
    parser.add_argument("--widths", default="1024")
    parser.add_argument("--dtypes", default="float32,bfloat16")
    add_arguments(parser, seconds=5.0)
    return parser


if __name__ == "__main__":
    raise SystemExit(main())
