"""What kernels of attention move and multiply, beside the least: `python -m benchmarks.attention_traffic`.

The kernels' files run in Triton's interpreter, which counts every load, store and product as it comes.
Results go to benchmarks/results/attention-traffic.json and to docs/attention_traffic.md; `--page-only`
renders the page again.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from pathlib import Path

from rich.console import Console

from benchmarks.attention_traffic_page import cells, render
from fxopt.measure.machine import describe
from fxopt.measure.results import replace_text

ROOT = Path(__file__).resolve().parent
RESULTS, PAGE = ROOT / "results" / "attention-traffic.json", ROOT.parent / "docs" / "attention_traffic.md"


def counted(names: list[str]) -> list[dict[str, object]]:
    """The rows of cases, or of all; from another process: the import of Triton chooses its interpreter."""
    command = [sys.executable, "-m", "benchmarks.attention_traffic_count", *names]
    environment = {**os.environ, "TRITON_INTERPRET": "1"}
    done = subprocess.run(
        command, capture_output=True, text=True, check=False, env=environment, cwd=ROOT.parent
    )
    if done.returncode != 0:
        raise SystemExit(f"{' '.join(command[2:])} failed:\n{done.stderr[-3000:]}")
    return [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--page-only", action="store_true")
    if not parser.parse_args().page_only:
        kept = {"machine": describe(), "rows": counted([])}
        replace_text(RESULTS, json.dumps(kept, indent=1) + "\n")
    results = json.loads(RESULTS.read_text())
    PAGE.write_text(render(results))
    for row in results["rows"]:
        Console().print("  ".join(cells(row)))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
