"""The memory of a decoding step over a cache that grows: `python -m benchmarks.cache_memory`.

Eager, Inductor and fxopt, each in a process of its own. Steps are run until all tensors of the cache have
outgrown their memory once; what is reported is the worst of the steps, as a share of the keys and values.
"""

from __future__ import annotations

import argparse
import functools
import json
import subprocess
import sys
from typing import Any

import torch
from rich.table import Table

from benchmarks.growing_cache import random_cache
from benchmarks.running import add_arguments, run
from fxopt.measure.compiled import compile_with
from fxopt.measure.jobs import Job
from fxopt.measure.memory import peak_bytes
from fxopt.measure.results import Row
from fxopt.runtime.kv_state import MOST, STATE

BACKENDS = ("eager", "inductor", "fxopt")


def main() -> int:
    arguments = _parser().parse_args()
    if arguments.backend:
        print(json.dumps(measure(arguments)))
        return 0
    jobs = [Job({"backend": name}, functools.partial(_in_a_process, name)) for name in BACKENDS]
    return run(arguments, jobs, _table)[1]


def measure(arguments: argparse.Namespace) -> Row:
    """The worst step of one backend."""
    torch.set_num_threads(1)
    model = _model(arguments)
    call = model if arguments.backend == "eager" else compile_with(model, arguments.backend)
    cache = random_cache(model.config, 1, arguments.length)
    token = torch.zeros(1, 1, dtype=torch.int64)
    held = _held(cache)[0]
    peaks, slack = [], []
    with torch.no_grad():
        for _ in range(4):  # compiles
            call(token, past_key_values=cache)
        for number in range(MOST if arguments.backend == "fxopt" else 3):
            # All steps between those that make buffers are alike.
            full = any(not STATE.room_behind(each) for each in _tensors(cache))
            if number < 3 or full:
                peaks.append(peak_bytes(lambda: call(token, past_key_values=cache)))
            else:
                call(token, past_key_values=cache)
            rows, memory = _held(cache)
            slack.append((memory - rows) / rows)
    return {
        "cache": held,
        "steps": len(slack),
        "measured": len(peaks),
        "peak": max(peaks) / held,
        "usual": min(peaks) / held,
        "slack": max(slack),
    }


def _model(arguments: argparse.Namespace) -> Any:
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=256, hidden_size=256, intermediate_size=256, num_hidden_layers=arguments.layers,
        num_attention_heads=4, num_key_value_heads=4, max_position_embeddings=2**17,
    )  # fmt: skip
    torch.manual_seed(0)
    return LlamaForCausalLM(config).eval()


def _held(cache: Any) -> tuple[int, int]:
    """Bytes of the keys and values, and of the memory that is reserved for them."""
    tensors = _tensors(cache)
    return sum(each.nbytes for each in tensors), sum(each.untyped_storage().nbytes() for each in tensors)


def _tensors(cache: Any) -> list[torch.Tensor]:
    return [tensor for layer in cache.layers for tensor in (layer.keys, layer.values)]


def _in_a_process(backend: str) -> Row:
    command = [sys.executable, "-m", "benchmarks.cache_memory", *sys.argv[1:], "--backend", backend]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    row: Row = json.loads(done.stdout.splitlines()[-1])
    return row


def _table(rows: list[Row]) -> Table:
    table = Table(title=f"a decoding step over {rows[0]['cache'] / 1e6:.0f} MB of keys and values")
    for name in ("backend", "steps", "extra, worst step", "extra, usual step", "room behind the rows"):
        table.add_column(name, justify="right")
    for row in rows:
        shares = [f"{100 * row[name]:.1f} %" for name in ("peak", "usual", "slack")]
        table.add_row(row["backend"], str(row["steps"]), *shares)
    return table


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--layers", type=int, default=8)
    parser.add_argument("--length", type=int, default=12800, help="tokens that are there")
    add_arguments(parser)
    parser.add_argument("--backend", default="", help=argparse.SUPPRESS)
    return parser


if __name__ == "__main__":
    raise SystemExit(main())
