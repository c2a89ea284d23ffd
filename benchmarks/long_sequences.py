"""Decoders over long sequences, with eager attention, beside Inductor: `python -m benchmarks.long_sequences`.

One layer of random weights and a padding mask of which the last tenth is masked, by model, length, dtype and
phase: the ratio of times, the peak of memory of both, and how the attention was computed.
"""

from __future__ import annotations

import argparse
import functools
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from rich.table import Table

from benchmarks.running import add_arguments, run
from fxopt.measure.compare import Comparison, compare
from fxopt.measure.jobs import Job
from fxopt.measure.models import Subject, build
from fxopt.measure.results import read
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
    if arguments.draw:
        plot(read(arguments.draw).rows, arguments.plot or arguments.draw.with_suffix(".png"))
        return 0
    jobs = [
        Job(asdict(case), functools.partial(measure, case, arguments.seconds)) for case in cases(arguments)
    ]
    rows, code = run(arguments, jobs, _table)
    if arguments.plot and rows:
        plot(rows, arguments.plot)
    return code


def measure(case: Case, seconds: float) -> dict[str, Any]:
    """The figures of one line."""
    return _row(compare(case.subject(), memory=True, check=False, budget_seconds=seconds))


def _row(found: Comparison) -> dict[str, Any]:
    providers = [
        provider for record in found.records for op, provider, _ in record.providers if op == "attention"
    ]
    return {
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


def plot(rows: list[dict[str, Any]], path: Path) -> None:
    """Two panels, a bar for each model and length: how much faster, and the share of memory that is left."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    names = list(dict.fromkeys(f"{row['model']}, {row['length']}" for row in rows))
    figure, panels = pyplot.subplots(
        1, 2, figsize=(11, 0.42 * len(names) + 1.3), layout="constrained", sharey=True
    )
    for place, (phase, training) in enumerate((("inference", False), ("training", True))):
        kept = {f"{row['model']}, {row['length']}": row for row in rows if row["training"] == training}
        spots = [number + (place - 0.5) * 0.4 for number, name in enumerate(names) if name in kept]
        ratios = [kept[name]["ratio"]["median"] for name in names if name in kept]
        shares = [kept[name]["peak_bytes"]["fxopt"] / kept[name]["peak_bytes"]["inductor"] for name in names
                  if name in kept]  # fmt: skip
        for axes, values, form in ((panels[0], ratios, "{:.1f}"), (panels[1], shares, "{:.0%}")):
            bars = axes.barh(spots, values, 0.38, label=phase)
            axes.bar_label(bars, [form.format(value) for value in values], padding=3, fontsize=8)
    panels[0].set_yticks(range(len(names)), names)
    panels[0].invert_yaxis()
    panels[0].set_xlabel("times faster than Inductor alone")
    panels[1].set_xlabel("peak memory of a step, as a part of Inductor's")
    panels[1].xaxis.set_major_formatter(matplotlib.ticker.PercentFormatter(1.0))
    for axes in panels:
        axes.axvline(1.0, color="black", linewidth=0.8, linestyle=":", zorder=0)
        axes.spines[["top", "right"]].set_visible(False)
        axes.margins(x=0.12)
    panels[1].legend(loc="lower right")
    figure.suptitle(
        "One decoder layer, eager attention, by model and tokens (one CPU core, float32)", fontsize=11
    )
    figure.savefig(path, dpi=130)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--models", default="llama,mistral,gemma2", help="model types, by commas")
    parser.add_argument("--lengths", default="512,1024,2048,4096", help="numbers of tokens, by commas")
    parser.add_argument("--dtypes", default="float32,bfloat16", help="by commas")
    parser.add_argument("--train", action="store_true", help="training too")
    add_arguments(parser, seconds=3.0)
    parser.add_argument("--plot", type=Path, help="a PNG or SVG file")
    parser.add_argument("--draw", type=Path, help="a JSON file of an earlier run, to be drawn only")
    return parser


if __name__ == "__main__":
    raise SystemExit(main())
