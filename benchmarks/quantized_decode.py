"""Tokens a second of a Llama of a billion weights on a CPU: `python -m benchmarks.quantized_decode`.

Weights are random, their sizes are those of Llama 3.2 1B. `generate` writes greedily with a static cache: one
token, and then some more; the difference is theirs. Side by side: the model in bfloat16 under Inductor, two
times, and prepared by fxopt in each scheme. Needs 8 GB of memory, and minutes.
"""

from __future__ import annotations

import argparse
import copy
import json
from pathlib import Path
from typing import Any

import torch
from transformers import LlamaConfig, LlamaForCausalLM

import fxopt
from fxopt.measure.machine import describe
from fxopt.measure.timing import interleave
from fxopt.suites.generate import phases, writing

BILLION = {
    "hidden_size": 2048, "intermediate_size": 8192, "num_hidden_layers": 16, "num_attention_heads": 32,
    "num_key_value_heads": 8, "head_dim": 64, "vocab_size": 128256, "tie_word_embeddings": True,
}  # fmt: skip
SCHEMES = ("int8-dynamic",)
# What the head has: its weight is a fifth of all that a token reads.
HEAD = "int8-dynamic"


def measure(options: argparse.Namespace) -> dict[str, Any]:
    """Tokens a second of each candidate, and ratios to Inductor's, from the same rounds."""
    torch.manual_seed(0)
    config = LlamaConfig(**{**BILLION, "num_hidden_layers": options.layers, "vocab_size": options.vocabulary})
    dense = LlamaForCausalLM(config).eval().bfloat16()
    prompt = torch.randint(0, options.vocabulary, (1, options.prompt))
    theirs = copy.copy(dense)
    theirs.compile(backend="inductor")
    writers: dict[str, Any] = {"inductor": theirs, "inductor again": theirs}
    for scheme in options.schemes:
        quantized = fxopt.prepare(copy.deepcopy(dense), {"lm_head": options.head, "*": scheme})
        print(f"{scheme}: {quantized.fxopt_linears.summary}")
        writers[scheme] = torch.compile(quantized, backend="fxopt")
    return _figures(writers, prompt, options)


def _figures(writers: dict[str, Any], prompt: torch.Tensor, options: argparse.Namespace) -> dict[str, Any]:
    steps = {
        f"{name}/{place}": writing(model, prompt, "static", count)
        for name, model in writers.items()
        for place, count in enumerate((1, options.tokens + 1))
    }
    for _ in range(2):  # compiles
        for step in steps.values():
            step()
    found = interleave(steps, rounds=options.rounds, budget_seconds=options.budget)
    decode = phases(found, list(writers), options.tokens)["decode"]
    return {
        "tokens_per_second": {name: round(1 / decode.median(name), 2) for name in writers},
        "ratios": {name: decode.ratio("inductor", name).as_dict() for name in writers if name != "inductor"},
    }


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--schemes", nargs="*", default=SCHEMES)
    parser.add_argument("--head", default=HEAD, help="the scheme of the head; `none` leaves it dense")
    parser.add_argument("--layers", type=int, default=BILLION["num_hidden_layers"])
    parser.add_argument("--vocabulary", type=int, default=BILLION["vocab_size"])
    parser.add_argument("--prompt", type=int, default=64, help="tokens of the prompt")
    parser.add_argument("--tokens", type=int, default=16, help="tokens that are written")
    parser.add_argument("--rounds", type=int, default=10)
    parser.add_argument(
        "--budget", type=float, default=240.0, help="seconds for all rounds; at least five are run"
    )
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--json", type=Path, help="where the figures are written")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    figures = measure(options)
    for name, rate in figures["tokens_per_second"].items():
        ratio = figures["ratios"].get(name, {}).get("median", 1.0)
        print(f"{name}: {rate:.2f} tokens/s, {ratio:.2f}x")
    if options.json is not None:
        figures |= {"machine": describe(), "threads": options.threads}
        options.json.write_text(json.dumps(figures, indent=1) + "\n")


if __name__ == "__main__":
    main()
