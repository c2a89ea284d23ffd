"""The suites of `fxopt bench` as modules: the same arguments, and results under benchmarks/results/.

The file is benchmarks/results/<suite>-<size>-<cpu or gpu>.jsonl unless `--out` names another.
"""

from __future__ import annotations

import sys
from pathlib import Path

from fxopt.cli import main as program

RESULTS = Path(__file__).resolve().parent / "results"


def main(suite: str) -> None:
    """Run the command; ends the process."""
    words = sys.argv[1:]
    if not any(word.split("=")[0] in ("--out", "--help") for word in words):
        words += ["--out", str(RESULTS / file_name(suite, words))]
    program(["bench", suite, *words])


def file_name(suite: str, words: list[str]) -> str:
    """By what decides whether two runs can be compared."""
    size = option(words, ("--size", "--sizes"), "small")
    device = "gpu" if option(words, ("--device",), "cpu").startswith("cuda") else "cpu"
    return f"{suite}-{size}-{device}.jsonl"


def option(words: list[str], names: tuple[str, ...], default: str) -> str:
    """The value of an option, behind a space or an equals sign."""
    for place, word in enumerate(words):
        name, equals, value = word.partition("=")
        if name in names:
            return value if equals else words[place + 1] if place + 1 < len(words) else default
    return default
