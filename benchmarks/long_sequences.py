"""Decoders over long sequences, with eager attention, beside Inductor: `python -m benchmarks.long_sequences`.

One layer of random weights and a padding mask of which the last tenth is masked, by model, length, dtype and
phase: the ratio of times, the peak of memory of both, and how the attention was computed.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import track
from rich.table import Table

from fxopt.measure.compare import Comparison, compare
from fxopt.measure.machine import describe
from fxopt.measure.models import Subject, build
from fxopt.measure.shrink import Scale

WINDOW = 512
OVERRIDES: dict[str, dict[str, Any]] = {
    "mistral": {"sliding_window": WINDOW},
    "gemma2": {"sliding_window": WINDOW},
    "gpt_oss": {"sliding_window": WINDOW},
}


@dataclass(frozen=True)
class Case:
    """One line."""

    model: str
    length: int
    dtype: str
    training: bool

    def subject(self) -> Subject:
        scale = Scale(layers=1, hidden=256, heads=4, ffn=512, vocab=256, batch=1, seq=self.length)
        subject = build(
            self.model, scale, attention="eager", dtype=getattr(torch, self.dtype), training=self.training,
            overrides={"use_cache": False, **OVERRIDES.get(self.model, {})},
        )  # fmt: skip
        keep = torch.ones_like(subject.kwargs["input_ids"])
        keep[:, self.length - self.length // 10 :] = 0
        subject.kwargs["attention_mask"] = keep
        return subject


def cases(arguments: argparse.Namespace) -> Iterator[Case]:
    for model in arguments.models.split(","):
        for length in map(int, arguments.lengths.split(",")):
            for dtype in arguments.dtypes.split(","):
                for training in (False, True) if arguments.train else (False,):
                    yield Case(model, length, dtype, training)


def main() -> int:
    arguments = _parser().parse_args()
    torch.set_num_threads(arguments.threads)
    console = Console()
    rows: list[dict[str, Any]] = []
    try:
        for case in track(list(cases(arguments)), "long sequences", console=console, transient=True):
            found = compare(case.subject(), memory=True, check=False, budget_seconds=arguments.seconds)
            rows.append(_row(case, found))
    except KeyboardInterrupt:
        console.print("stopped; what was measured is kept")
    console.print(_table(rows))
    if arguments.out:
        text = json.dumps({"machine": describe(), "rows": rows}, indent=1, default=str)
        arguments.out.write_text(text + "\n")
        console.print(f"written to {arguments.out}")
    return 0


def _row(case: Case, found: Comparison) -> dict[str, Any]:
    providers = [
        provider for record in found.records for op, provider, _ in record.providers if op == "attention"
    ]
    return {
        **asdict(case),
        "ratio": found.speed.as_dict(),
        "noise": found.noise.as_dict(),
        "seconds": {name: found.timings.median(name) for name in ("inductor", "fxopt")},
        "peak_bytes": found.peaks,
        "computed_by": sorted(set(providers)),
    }


def _table(rows: list[dict[str, Any]]) -> Table:
    table = Table(title="one layer over long sequences, eager attention, padded: fxopt against Inductor")
    for name in ("model", "tokens", "dtype", "phase", "inductor ms", "fxopt ms", "faster", "inductor MB",
                 "fxopt MB", "computed by"):  # fmt: skip
        table.add_column(name)
    for row in rows:
        times = [f"{1000 * row['seconds'][name]:.0f}" for name in ("inductor", "fxopt")]
        peaks = [f"{row['peak_bytes'][name] / 2**20:.0f}" for name in ("inductor", "fxopt")]
        phase = "train" if row["training"] else "infer"
        ratio = f"{row['ratio']['median']:.2f}"
        by = ", ".join(row["computed_by"])
        table.add_row(row["model"], str(row["length"]), row["dtype"], phase, *times, ratio, *peaks, by)
    return table


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--models", default="llama,mistral,gemma2", help="model types, by commas")
    parser.add_argument("--lengths", default="512,1024,2048,4096", help="numbers of tokens, by commas")
    parser.add_argument("--dtypes", default="float32,bfloat16", help="by commas")
    parser.add_argument("--train", action="store_true", help="training too")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--seconds", type=float, default=3.0, help="for the timing of one line")
    parser.add_argument("--out", type=Path, help="a JSON file")
    return parser


if __name__ == "__main__":
    raise SystemExit(main())
