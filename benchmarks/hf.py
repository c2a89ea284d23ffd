"""The Hugging Face suite: `python -m benchmarks.hf`. The same as `fxopt bench`, with a results file.

The file is benchmarks/results/<commit>-<size>-<attention>.jsonl unless `--out` names another.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from rich.console import Console

from fxopt.commands.bench import Plan, run
from fxopt.measure.machine import commit

RESULTS = Path(__file__).resolve().parent / "results"


def main() -> int:
    arguments = _parser().parse_args()
    name = f"{commit() or 'no-commit'}-{arguments.size}-{arguments.attn or 'default'}.jsonl"
    plan = Plan(
        models=tuple(filter(None, arguments.models.split(","))),
        size=arguments.size,
        infer=arguments.infer or not arguments.train,
        train=arguments.train or not arguments.infer,
        attention=arguments.attn,
        dtype=arguments.dtype,
        device=arguments.device,
        threads=arguments.threads,
        seconds=arguments.seconds,
        options={"disable": arguments.disable.split(",")} if arguments.disable else {},
        out=arguments.out or RESULTS / name,
    )
    return run(plan, Console())


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--models", default="", help="model types, separated by commas; default: all")
    parser.add_argument("--size", "--sizes", default="small", choices=("tiny", "small"))
    parser.add_argument("--infer", action="store_true", help="inference only")
    parser.add_argument("--train", action="store_true", help="training only")
    parser.add_argument("--attn", choices=("eager", "sdpa"), help="default: what transformers chooses")
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--seconds", type=float, default=4.0, help="for the timing of one row")
    parser.add_argument("--disable", help="passes not to run, separated by commas; or all")
    parser.add_argument("--out", type=Path)
    return parser


if __name__ == "__main__":
    raise SystemExit(main())
