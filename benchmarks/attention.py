"""Attention alone, by mask, spelling and length, beside Inductor: `python -m benchmarks.attention`.

One line for each case: the times of both, their ratio, and what fxopt did with the mask. A result further
from float64 than twice eager's error is marked, and fails the run.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import track
from rich.table import Table

from fxopt.measure.compare import Comparison, compare
from fxopt.measure.machine import describe
from fxopt.measure.models import Subject

HEADS, DEPTH, BATCH, WINDOW = 4, 64, 1, 256


@dataclass(frozen=True)
class Case:
    """One line. `padded`: a padding mask is given too, with the last tenth masked."""

    mask: str
    spelling: str
    length: int
    padded: bool
    training: bool
    dtype: str

    def subject(self) -> Subject:
        torch.manual_seed(0)
        dtype: torch.dtype = getattr(torch, self.dtype)
        shape = (BATCH, HEADS, self.length, DEPTH)
        tensors = [torch.randn(shape).to(dtype).requires_grad_(self.training) for _ in range(3)]
        keep = torch.ones(BATCH, self.length, dtype=torch.int64)
        keep[:, self.length - self.length // 10 :] = 0
        return Subject(str(self), self._attend(), (*tensors, keep), training=self.training)

    def _attend(self) -> Callable[..., torch.Tensor]:
        """A function of its own: compiled code is kept by function."""

        def live(q: torch.Tensor, keep: torch.Tensor) -> torch.Tensor:
            i, j = torch.arange(q.shape[2])[:, None], torch.arange(q.shape[2])[None, :]
            mask = j <= i
            if self.mask == "window":
                mask = mask & (j > i - WINDOW)
            return mask & keep.bool()[:, None, None, :] if self.padded else mask[None, None]

        def sdpa(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, keep: torch.Tensor) -> torch.Tensor:
            return torch.nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=live(q, keep))

        def eager(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, keep: torch.Tensor) -> torch.Tensor:
            low = torch.finfo(q.dtype).min
            scores = q @ k.transpose(2, 3) * DEPTH**-0.5
            scores = scores + torch.where(live(q, keep), torch.zeros((), dtype=q.dtype), low)
            wide = torch.float64 if q.dtype == torch.float64 else torch.float32
            return torch.softmax(scores, -1, dtype=wide).to(q.dtype) @ v

        return sdpa if self.spelling == "sdpa" else eager


def cases(arguments: argparse.Namespace) -> Iterator[Case]:
    for length in map(int, arguments.lengths.split(",")):
        for mask in ("causal", "window"):
            for spelling in ("eager", "sdpa"):
                for padded in (False, True):
                    for training in (False, True) if arguments.train else (False,):
                        yield Case(mask, spelling, length, padded, training, arguments.dtype)


def main() -> int:
    arguments = _parser().parse_args()
    torch.set_num_threads(arguments.threads)
    console = Console()
    rows: list[dict[str, Any]] = []
    for case in track(list(cases(arguments)), "attention", console=console, transient=True):
        rows.append(_row(case, compare(case.subject(), budget_seconds=arguments.seconds)))
    console.print(_table(rows))
    if arguments.out:
        text = json.dumps({"machine": describe(), "rows": rows}, indent=1, default=str)
        arguments.out.write_text(text + "\n")
        console.print(f"written to {arguments.out}")
    if arguments.plot:
        plot(rows, arguments.plot)
        console.print(f"drawn in {arguments.plot}")
    return 0 if all(row["accepted"] for row in rows) else 1


def _row(case: Case, found: Comparison) -> dict[str, Any]:
    evidence = [entry for record in found.records for entry in record.evidence]
    programs = [e.reason for e in evidence if e.rewrite in ("recover-mask", "fold-causal-mask")]
    return {
        **asdict(case),
        "ratio": found.speed.as_dict(),
        "noise": found.noise.as_dict(),
        "seconds": {name: found.timings.median(name) for name in ("inductor", "fxopt")},
        "errors": found.errors,
        "accepted": found.accepted,
        "why": programs[-1] if programs else "",
    }


def _table(rows: list[dict[str, Any]]) -> Table:
    table = Table(
        title=f"attention, B={BATCH} H={HEADS} D={DEPTH}, window {WINDOW}: times faster than Inductor"
    )
    for name in ("length", "mask", "written as", "padded", "phase", "inductor ms", "fxopt ms", "ratio",
                 "why"):  # fmt: skip
        table.add_column(name, overflow="fold")
    for row in rows:
        times = [f"{1000 * row['seconds'][name]:.1f}" for name in ("inductor", "fxopt")]
        phase = "train" if row["training"] else "infer"
        ratio = f"{row['ratio']['median']:.2f}" + ("" if row["accepted"] else " WRONG")
        padded = "yes" if row["padded"] else ""
        table.add_row(
            str(row["length"]), row["mask"], row["spelling"], padded, phase, *times, ratio, row["why"]
        )
    return table


def plot(rows: list[dict[str, Any]], path: Path) -> None:
    """Bars of Inductor's time by fxopt's, one group for each length."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    lengths = sorted({row["length"] for row in rows})
    names = list(dict.fromkeys(_name(row) for row in rows))
    figure, axes = pyplot.subplots(figsize=(8, 0.55 * len(names) + 1.4), layout="constrained")
    height = 0.8 / len(lengths)
    for place, length in enumerate(lengths):
        ratios = {_name(row): row["ratio"] for row in rows if row["length"] == length}
        spots = [number + (place - (len(lengths) - 1) / 2) * height for number in range(len(names))]
        values = [ratios[name]["median"] for name in names]
        ends = [[v - ratios[n]["low"] for n, v in zip(names, values, strict=True)],
                [ratios[n]["high"] - v for n, v in zip(names, values, strict=True)]]  # fmt: skip
        bars = axes.barh(spots, values, height * 0.92, xerr=ends, label=f"{length} tokens")
        axes.bar_label(bars, [f"{value:.1f}" for value in values], padding=4, fontsize=8)
    axes.axvline(1.0, color="black", linewidth=0.8, linestyle=":")
    axes.set_yticks(range(len(names)), names)
    axes.invert_yaxis()
    axes.set_xlabel("times faster than Inductor alone")
    axes.set_title("Attention on one CPU core, float32, inference")
    axes.legend()
    axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=130)


def _name(row: dict[str, Any]) -> str:
    written = "softmax spelled out" if row["spelling"] == "eager" else "SDPA with a mask"
    return f"{row['mask']}{', padded' if row['padded'] else ''}: {written}"


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--lengths", default="512,1024,2048,4096", help="numbers of tokens, by commas")
    parser.add_argument("--train", action="store_true", help="with backward passes too")
    parser.add_argument("--dtype", default="float32", choices=("float32", "bfloat16"))
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--seconds", type=float, default=2.0, help="for the timing of one line")
    parser.add_argument("--out", type=Path, help="a JSON file")
    parser.add_argument("--plot", type=Path, help="a PNG or SVG file")
    return parser


if __name__ == "__main__":
    raise SystemExit(main())
