"""What a layer launches and moves, fxopt's kernels beside Inductor's: `python -m benchmarks.fusion`.

Nothing runs: the models are compiled for a GPU that is assumed, up to the code that Inductor generates. It is
counted for two depths; the difference is what a layer costs. Results go to benchmarks/results/fusion.json and
to the page docs/fusion.md; `--page-only` renders the page again.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import track

from benchmarks.fusion_page import SHALLOW, cells, render
from fxopt.measure.machine import describe
from fxopt.measure.results import replace_text

ROOT = Path(__file__).resolve().parent
RESULTS, PAGE = ROOT / "results" / "fusion.json", ROOT.parent / "docs" / "fusion.md"
CASES = [
    (model, phase)
    for model in ("llama", "bert", "t5", "vit")
    for phase in ("decode", "forward", "training")
    if phase != "decode" or model == "llama"
]


def main() -> int:
    arguments = _parser().parse_args()
    console = Console()
    kept = json.loads(RESULTS.read_text()) if RESULTS.exists() else {"rows": []}
    models, phases = arguments.models.split(","), arguments.phases.split(",")
    cases = [(model, phase) for model, phase in CASES if model in models and phase in phases]
    for case in track([] if arguments.page_only else cases, "compiling", console=console, transient=True):
        row = _measured(*case, arguments)
        others = [one for one in kept["rows"] if (one["model"], one["phase"]) != case]
        rows = sorted([*others, row], key=lambda one: CASES.index((one["model"], one["phase"])))
        kept = {"machine": describe(), "target": arguments.target, "rows": rows}
        replace_text(RESULTS, json.dumps(kept, indent=1) + "\n")
        PAGE.write_text(render(kept))
    PAGE.write_text(render(kept))
    for row in kept["rows"]:
        console.print("  ".join(cells(row)))
    return 0


def _measured(model: str, phase: str, arguments: argparse.Namespace) -> dict[str, Any]:
    depths = (SHALLOW, arguments.layers)
    found = _in_new_process(model, phase, depths, arguments.target)
    layers = {name: _per_layer(*counts, depths) for name, counts in found.items()}
    return {"model": model, "phase": phase, "layers": arguments.layers, **layers}


def _per_layer(shallow: dict[str, Any], deep: dict[str, Any], depths: tuple[int, int]) -> dict[str, Any]:
    """The difference of two depths, by layer."""
    layers = depths[1] - depths[0]
    kinds = sorted({*shallow["launches"], *deep["launches"]})
    launches = {kind: deep["launches"].get(kind, 0) - shallow["launches"].get(kind, 0) for kind in kinds}
    return {
        "launches": {kind: number / layers for kind, number in launches.items()},
        "bytes": (deep["bytes"] - shallow["bytes"]) / layers,
    }


def _in_new_process(model: str, phase: str, depths: Sequence[int], target: str) -> dict[str, Any]:
    command = [sys.executable, "-m", "benchmarks.fusion_count", model, phase, "--target", target]
    command += ["--layers", *map(str, depths)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        raise SystemExit(f"{' '.join(command[2:])} failed:\n{done.stderr[-3000:]}")
    return json.loads(done.stdout.strip().splitlines()[-1])  # type: ignore[no-any-return]


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--models", default="llama,bert,t5,vit")
    parser.add_argument("--phases", default="decode,forward,training")
    parser.add_argument("--layers", type=int, default=12)
    parser.add_argument("--target", default="h200")
    parser.add_argument("--page-only", action="store_true")
    return parser


if __name__ == "__main__":
    raise SystemExit(main())
