"""The loss over a large vocabulary, beside Inductor: `python -m benchmarks.cross_entropy`.

A decoder of one layer and random weights that returns its loss alone, by vocabulary, tokens, dtype and phase:
the ratio of times, and the peak of memory of a step.
"""

from __future__ import annotations

import argparse
import functools
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from typing import Any

import torch
from rich.table import Table

from benchmarks.running import add_arguments, run
from fxopt.integrations.loss_only import loss_only
from fxopt.measure.compare import Comparison, compare
from fxopt.measure.jobs import Job
from fxopt.measure.models import Subject

PASS = "fuse-linear-cross-entropy"


@dataclass(frozen=True)
class Case:
    """One line. `ignored`: the part of the labels that is -100, as those of a prompt are."""

    vocabulary: int
    tokens: int
    dtype: str
    ignored: float = 0.0

    def subject(self, hidden: int) -> Subject:
        from transformers import LlamaConfig, LlamaForCausalLM

        torch.manual_seed(0)
        config = LlamaConfig(
            vocab_size=self.vocabulary, hidden_size=hidden, intermediate_size=2 * hidden, num_hidden_layers=1,
            num_attention_heads=4, num_key_value_heads=4, tie_word_embeddings=True, use_cache=False,
        )  # fmt: skip
        model = LlamaForCausalLM(config).to(getattr(torch, self.dtype)).train()
        tokens = torch.randint(0, self.vocabulary, (1, self.tokens))
        labels = tokens.clone()
        labels[:, : int(self.ignored * self.tokens)] = -100
        given = {"input_ids": tokens, "labels": labels}
        return Subject("llama", loss_only(model), kwargs=given, training=True)


def cases(arguments: argparse.Namespace) -> Iterator[Case]:
    for text in arguments.cases.split(","):
        vocabulary, tokens, dtype, *ignored = text.split(":")
        yield Case(int(vocabulary), int(tokens), dtype, *map(float, ignored))


def main() -> int:
    arguments = _parser().parse_args()
    jobs = [Job(asdict(case), functools.partial(measure, case, arguments)) for case in cases(arguments)]
    return run(arguments, jobs, _table)[1]


def measure(case: Case, arguments: argparse.Namespace) -> dict[str, Any]:
    """The figures of one line."""
    subject = case.subject(arguments.hidden)
    return _row(compare(subject, memory=True, check=False, budget_seconds=arguments.seconds))


def _row(found: Comparison) -> dict[str, Any]:
    return {
        "ratio": found.speed.as_dict(),
        "noise": found.noise.as_dict(),
        "seconds": {name: found.timings.median(name) for name in ("inductor", "fxopt")},
        "peak_bytes": found.peaks,
        "fused": found.sites.get(PASS, 0),
    }


def _table(rows: list[dict[str, Any]]) -> Table:
    table = Table(title="a training step of a decoder with one layer, Inductor → fxopt")
    for name in ("vocabulary", "tokens", "dtype", "ignored", "ms", "faster", "noise", "MB", "share", "fused"):
        table.add_column(name, justify="right")
    for row in rows:
        case = [str(row["vocabulary"]), str(row["tokens"]), row["dtype"], f"{row['ignored']:.0%}"]
        seconds, peaks = (
            [row[of][name] for name in ("inductor", "fxopt")] for of in ("seconds", "peak_bytes")
        )
        faster, noise = (f"{row[name]['median']:.2f}" for name in ("ratio", "noise"))
        times = " → ".join(f"{1000 * each:.0f}" for each in seconds)
        memory = " → ".join(f"{each / 2**20:.0f}" for each in peaks)
        share = f"{peaks[1] / peaks[0]:.2f}"
        table.add_row(*case, times, faster, noise, memory, share, str(row["fused"]))
    return table


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument(
        "--cases",
        default="32000:512:float32,32000:2048:float32,32000:2048:float32:0.5,128256:2048:float32,32000:512:bfloat16",
        help="vocabulary:tokens:dtype, or vocabulary:tokens:dtype:part ignored; by commas",
    )
    parser.add_argument("--hidden", type=int, default=256)
    add_arguments(parser, seconds=10.0)
    return parser


if __name__ == "__main__":
    raise SystemExit(main())
