"""Decoding over a cache that grows, beside eager and Inductor: `python -m benchmarks.growing_cache`.

A decoder of random weights and transformers' `DynamicCache`, one token at a time, from several lengths on.
Every backend has a cache of its own, and all of them grow alike. With `--kv-dtypes int8,fp8` fxopt runs over
quantized caches too.
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

import fxopt
from fxopt.measure.compiled import compile_with
from fxopt.measure.machine import describe
from fxopt.measure.timing import interleave

from .latent_model import cached_sizes, latent_model

BACKENDS = ("eager", "inductor", "inductor again", "fxopt")
# hidden size, intermediate size, layers, query heads, key heads, vocabulary
SHAPES = {
    "small": (512, 1408, 8, 8, 2, 1024),
    "135m": (576, 1536, 30, 9, 3, 49152),
    "1b": (2048, 8192, 16, 32, 8, 128256),
}

# multi-head latent attention, as DeepSeek has it, in two layers
LATENT = "latent"


def main() -> int:
    arguments = _parser().parse_args()
    torch.set_num_threads(arguments.threads)
    console = Console()
    rows: list[dict[str, Any]] = []
    cases = [
        (int(batch), int(length))
        for batch in arguments.batches.split(",")
        for length in arguments.lengths.split(",")
    ]
    try:
        for batch, length in track(cases, "growing caches", console=console, transient=True):
            rows.append(measure(arguments, batch, length))
    except KeyboardInterrupt:
        console.print("stopped; what was measured is kept")
    console.print(_table(rows))
    if arguments.out:
        text = json.dumps(
            {"machine": describe(), "plan": vars(arguments), "rows": rows}, indent=1, default=str
        )
        arguments.out.write_text(text + "\n")
        console.print(f"written to {arguments.out}")
    return 0


def measure(arguments: argparse.Namespace, batch: int, length: int) -> dict[str, Any]:
    """One line: a decoding step behind `length` tokens."""
    model = _model(arguments)
    torch._dynamo.reset()
    quantized = [f"fxopt {dtype}" for dtype in arguments.kv_dtypes.split(",") if dtype]
    names = (*BACKENDS, *quantized)
    calls = {name: model if name == "eager" else compile_with(model, name.split()[0]) for name in names}
    steps = {
        name: _step(call, model.config, batch, length, name.split()[1] if name in quantized else "")
        for name, call in calls.items()
    }
    with torch.no_grad():
        for _ in range(4):  # compiles: for the first length, and for all others
            for step in steps.values():
                step()
        timings = interleave(steps, budget_seconds=arguments.seconds)
    return {
        "batch": batch,
        "length": length,
        "seconds": {name: timings.median(name) for name in names},
        "over_inductor": timings.ratio("inductor", "fxopt").as_dict(),
        "over_eager": timings.ratio("eager", "fxopt").as_dict(),
        "noise": timings.ratio("inductor again", "inductor").as_dict(),
        "over_unquantized": {name: timings.ratio("fxopt", name).as_dict() for name in quantized},
    }


def _model(arguments: argparse.Namespace) -> Any:
    from transformers import LlamaConfig, LlamaForCausalLM

    if arguments.shape == LATENT:
        return latent_model(2, getattr(torch, arguments.dtype))
    hidden, inner, layers, heads, groups, vocabulary = SHAPES[arguments.shape]
    config = LlamaConfig(
        vocab_size=vocabulary, hidden_size=hidden, intermediate_size=inner, num_hidden_layers=layers,
        num_attention_heads=heads, num_key_value_heads=groups, max_position_embeddings=2**17,
    )  # fmt: skip
    torch.manual_seed(0)
    return LlamaForCausalLM(config).to(getattr(torch, arguments.dtype)).eval()


def _step(call: Any, config: Any, batch: int, length: int, kv_dtype: str = "") -> Callable[[], torch.Tensor]:
    """One more token each time, behind random keys and values."""
    from transformers import DynamicCache

    torch.manual_seed(0)
    cache = fxopt.QuantizedCache(dtype=kv_dtype) if kv_dtype else DynamicCache()
    for layer in range(config.num_hidden_layers):
        sizes = cached_sizes(config, length)
        cache.update(*(torch.randn(batch, *size, dtype=config.dtype) for size in sizes), layer)
    token = torch.zeros(batch, 1, dtype=torch.int64)

    def step() -> torch.Tensor:
        logits: torch.Tensor = call(token, past_key_values=cache).logits
        return logits

    return step


def _table(rows: list[dict[str, Any]]) -> Table:
    table = Table(title="one token over a growing cache, milliseconds")
    quantized = list(rows[0]["over_unquantized"]) if rows else []
    ratios_of = [f"{name} over fxopt" for name in quantized]
    for name in (
        "batch", "length", *BACKENDS[:2], "fxopt", "over Inductor", "over eager", "noise", *ratios_of
    ):  # fmt: skip
        table.add_column(name, justify="right")
    for row in rows:
        times = [f"{1000 * row['seconds'][name]:.1f}" for name in ("eager", "inductor", "fxopt")]
        ratios = [f"{row[name]['median']:.2f}" for name in ("over_inductor", "over_eager", "noise")]
        ratios += [f"{row['over_unquantized'][name]['median']:.2f}" for name in quantized]
        table.add_row(str(row["batch"]), str(row["length"]), *times, *ratios)
    return table


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--shape", choices=(*SHAPES, LATENT), default="small")
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--batches", default="1,8", help="by commas")
    parser.add_argument("--lengths", default="64,512,2048,4096", help="tokens that are there, by commas")
    parser.add_argument("--kv-dtypes", default="", help="int8, fp8, by commas")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--seconds", type=float, default=8.0, help="for the timing of one line")
    parser.add_argument("--out", type=Path, help="a JSON file")
    return parser


if __name__ == "__main__":
    raise SystemExit(main())
