"""Tokens a second of a Llama of a billion weights on a CPU: `python -m benchmarks.quantized_decode`.

Weights are random, their sizes are those of Llama 3.2 1B. `generate` writes greedily with a static cache: one
token, and then some more; the difference is theirs. Side by side for each scheme: the dense model in bfloat16
under Inductor, two times, and the one that fxopt has prepared. Needs 6 GB of memory, and minutes.
"""

from __future__ import annotations

import argparse
import copy
import functools
from collections.abc import Sequence
from typing import Any

import torch
from rich.table import Table

from benchmarks.running import add_arguments, run
from fxopt.measure.compare import figures
from fxopt.measure.compiled import BASELINE, CANDIDATE, TWIN
from fxopt.measure.jobs import Job
from fxopt.measure.results import Row
from fxopt.measure.timing import interleave
from fxopt.suites.generate import phases, writing

BILLION = {
    "hidden_size": 2048, "intermediate_size": 8192, "num_hidden_layers": 16, "num_attention_heads": 32,
    "num_key_value_heads": 8, "head_dim": 64, "vocab_size": 128256, "tie_word_embeddings": True,
}  # fmt: skip
# What the head has: its weight is a fifth of all that a token reads.
HEAD = "int8-dynamic"


def main() -> int:
    arguments = _parser().parse_args()
    dense = functools.cache(functools.partial(_dense, arguments.layers, arguments.vocabulary))
    jobs = [
        Job({"scheme": scheme}, functools.partial(_measure, arguments, dense, scheme))
        for scheme in arguments.schemes.split(",")
    ]
    return run(arguments, jobs, _table)[1]


def _dense(layers: int, vocabulary: int) -> Any:
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(**{**BILLION, "num_hidden_layers": layers, "vocab_size": vocabulary})
    return LlamaForCausalLM(config).eval().bfloat16()


def _measure(arguments: argparse.Namespace, make: Any, scheme: str) -> Row:
    """One line: a token of the dense model, and one of the quantized."""
    import fxopt

    torch._dynamo.reset()
    dense = make()
    quantized = fxopt.prepare(copy.deepcopy(dense), {"lm_head": arguments.head, "*": scheme})
    theirs = copy.copy(dense)
    theirs.compile(backend=BASELINE)
    writers = {BASELINE: theirs, TWIN: theirs, CANDIDATE: torch.compile(quantized, backend=CANDIDATE)}
    prompt = torch.randint(0, arguments.vocabulary, (1, arguments.prompt))
    steps = {
        f"{name}/{place}": writing(model, prompt, "static", count)
        for name, model in writers.items()
        for place, count in enumerate((1, arguments.tokens + 1))
    }
    for _ in range(2):  # compiles
        for step in steps.values():
            step()
    found = interleave(steps, rounds=10, budget_seconds=arguments.seconds)
    linears = quantized.fxopt_linears.summary
    return figures(phases(found, list(writers), arguments.tokens)["decode"]) | {"linears": linears}


def _table(rows: Sequence[Row]) -> Table:
    made = Table(title="tokens a second")
    for name in ("scheme", "inductor, dense", "fxopt", "ratio", "noise", "linear layers"):
        made.add_column(name)
    for row in rows:
        rates = [f"{1 / row['seconds'][name]:.2f}" for name in (BASELINE, CANDIDATE)]
        ratios = [f"{row[name]['median']:.2f}" for name in ("ratio", "noise")]
        made.add_row(row["scheme"], *rates, *ratios, row["linears"])
    return made


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--schemes", default="int8-dynamic", help="by commas")
    parser.add_argument("--head", default=HEAD, help="the scheme of the head; `none` leaves it dense")
    parser.add_argument("--layers", type=int, default=BILLION["num_hidden_layers"])
    parser.add_argument("--vocabulary", type=int, default=BILLION["vocab_size"])
    parser.add_argument("--prompt", type=int, default=64, help="tokens of the prompt")
    parser.add_argument("--tokens", type=int, default=16, help="tokens that are written")
    add_arguments(parser, seconds=60.0)
    return parser


if __name__ == "__main__":
    raise SystemExit(main())
