"""Emitted kernels beside Inductor's and beside a copy, on a GPU: `python -m benchmarks.kernels`.

By region, dtype and shape: the time of the region with all its kernels fxopt's, that under Inductor, and the
share of the bandwidth of a large copy that fxopt's kernels reach with the bytes they must move. Without a GPU
kernels run in Triton's interpreter (`TRITON_INTERPRET=1`), which shows that they run, and nothing of time.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import track
from rich.table import Table
from torch.nn import functional as F

from fxopt.measure.machine import describe
from fxopt.measure.timing import interleave
from fxopt.report.record import collect

Value = torch.Tensor
DTYPES = {"bfloat16": torch.bfloat16, "float32": torch.float32}


def add_rms_norm(x: Value, y: Value, weight: Value) -> tuple[Value, Value]:
    total = x + y
    wide = total.float()
    return total, weight * (wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + 1e-6)).to(x.dtype)


def layer_norm(x: Value, y: Value, weight: Value) -> Value:
    return F.layer_norm(x + y, x.shape[-1:], weight, weight)


def softmax(x: Value, y: Value, weight: Value) -> Value:
    return (x * 0.125 + y).softmax(-1)


def gate(x: Value, y: Value, weight: Value) -> Value:
    return F.silu(x) * y


def rope(x: Value, y: Value, weight: Value) -> Value:
    """Of (1, rows, heads of 128), with the change to (1, heads, rows, 128) that attention wants."""
    heads = x.view(1, x.shape[0], -1, 128).transpose(1, 2)
    cos, sin = weight[:128].cos(), weight[:128].sin()
    turned = torch.cat([-heads[..., 64:], heads[..., :64]], -1)
    return (heads * cos + turned * sin).contiguous()


REGIONS: dict[str, Callable[..., Any]] = {
    function.__name__: function for function in (add_rms_norm, layer_norm, softmax, gate, rope)
}


def step_of(function: Callable[..., Any], inputs: list[Value], training: bool) -> Callable[[], object]:
    if not training:
        return lambda: function(*inputs)

    def step() -> object:
        made = function(*inputs)
        made = made if isinstance(made, tuple) else (made,)
        sources = [one for one in inputs if one.requires_grad]
        return torch.autograd.grad(made, sources, [one.detach() for one in made], allow_unused=True)

    return step


def measure(name: str, rows: int, width: int, dtype: str, training: bool, seconds: float) -> dict[str, Any]:
    device = "cuda" if torch.cuda.is_available() else "cpu"
    shapes = ((rows, width), (rows, width), (width,))
    torch.manual_seed(0)
    inputs = [
        torch.randn(shape, device=device, dtype=DTYPES[dtype], requires_grad=training) for shape in shapes
    ]
    options = {"kernels": "always"} if device == "cuda" else {"host": "eager"}
    torch._dynamo.reset()
    with collect() as records:
        ours = step_of(torch.compile(REGIONS[name], backend="fxopt", options=options), inputs, training)
        ours()
    theirs = step_of(torch.compile(REGIONS[name], backend="inductor"), inputs, training)
    candidates: dict[str, Callable[[], object]] = {
        "fxopt": ours,
        "inductor": theirs,
        "inductor again": theirs,
    }
    if device == "cuda":
        source = torch.empty(1 << 29, dtype=torch.int8, device=device)
        target = torch.empty_like(source)
        candidates["copy"] = lambda: target.copy_(source)
    for candidate in candidates.values():
        candidate()
    times = interleave(candidates, budget_seconds=seconds)
    moved = sum(kernel.about.seen[0] for record in records for kernel in record.kernels)
    found = {
        "region": name, "rows": rows, "width": width, "dtype": dtype, "training": training, "bytes": moved,
        "kernels": [kernel.name for record in records for kernel in record.kernels],
        "seconds": {candidate: times.median(candidate) for candidate in ("fxopt", "inductor")},
        "ratio": times.ratio("inductor", "fxopt").as_dict(),
        "noise": times.ratio("inductor", "inductor again").as_dict(),
    }  # fmt: skip
    if "copy" in candidates:
        rate = 2 * (1 << 29) / times.median("copy")
        found |= {"copy_bytes_per_second": rate, "share": moved / times.median("fxopt") / rate}
    return found


def main() -> int:
    arguments = _parser().parse_args()
    console = Console()
    found: list[dict[str, Any]] = []
    cases = [
        (name, *map(int, shape.split("x")), dtype, training)
        for name in arguments.regions.split(",")
        for shape in arguments.shapes.split(",")
        for dtype in arguments.dtypes.split(",")
        for training in (False, True)
    ]
    try:
        for case in track(cases, "kernels", console=console, transient=True):
            found.append(measure(*case, arguments.seconds))
    except KeyboardInterrupt:
        console.print("stopped; what was measured is kept")
    console.print(_table(found))
    if arguments.out:
        text = json.dumps({"machine": describe(), "rows": found}, indent=1, default=str)
        arguments.out.write_text(text + "\n")
        console.print(f"written to {arguments.out}")
    return 0


def _table(rows: list[dict[str, Any]]) -> Table:
    table = Table(title="regions as kernels of fxopt, over Inductor and of a copy's bandwidth")
    for name in ("region", "shape", "dtype", "phase", "us", "over Inductor", "noise", "of a copy"):
        table.add_column(name, justify="left" if name == "region" else "right")
    for row in rows:
        share = f"{row['share']:.0%}" if "share" in row else "-"
        ratio, noise = row["ratio"]["median"], row["noise"]["median"]
        table.add_row(
            row["region"], f"{row['rows']}x{row['width']}", row["dtype"],
            "training" if row["training"] else "inference", f"{row['seconds']['fxopt'] * 1e6:.1f}",
            f"[red]{ratio:.2f}[/red]" if ratio < 0.97 else f"{ratio:.2f}", f"{noise:.2f}", share,
        )  # fmt: skip
    return table


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--regions", default=",".join(REGIONS), help="by commas")
    parser.add_argument("--shapes", default="16384x2048,16384x4096,8192x8192", help="rows x width, by commas")
    parser.add_argument("--dtypes", default=",".join(DTYPES), help="by commas")
    parser.add_argument("--seconds", type=float, default=2.0, help="for the timing of one line")
    parser.add_argument("--out", type=Path, help="a JSON file")
    return parser


if __name__ == "__main__":
    raise SystemExit(main())
