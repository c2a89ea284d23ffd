"""Decoding over a static cache, beside eager and Inductor: `python -m benchmarks.static_cache`.

A decoder of random weights, one token at a time, by the room of the cache and how much of it is filled. The
mask is the one that `generate` passes: a tensor of bools over the whole room. With --sliding the room is the
window of every layer, and full: each token drops the oldest one. With --latent the cache holds the latents of
multi-head latent attention.
"""

from __future__ import annotations

import argparse
import copy
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import track
from rich.table import Table

from fxopt.measure.accuracy import allowed_error, comparable, float64_everywhere, max_error
from fxopt.measure.compiled import compile_with
from fxopt.measure.machine import describe
from fxopt.measure.timing import interleave

from .latent_model import cached_sizes, latent_model

BACKENDS = ("eager", "inductor", "inductor again", "fxopt")


def main() -> int:
    arguments = _parser().parse_args()
    torch.set_num_threads(arguments.threads)
    console = Console()
    rows: list[dict[str, Any]] = []
    rooms = [int(room) for room in arguments.rooms.split(",")]
    cases = [
        (room, filled) for room in rooms for filled in _fillings(arguments.filled, room, arguments.sliding)
    ]
    try:
        for room, filled in track(cases, "static caches", console=console, transient=True):
            rows.append(measure(arguments, room, filled))
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


def _fillings(text: str, room: int, sliding: bool) -> list[int]:
    return [room] if sliding else [filled for filled in map(int, text.split(",")) if filled < room]


def measure(arguments: argparse.Namespace, room: int, filled: int) -> dict[str, Any]:
    """One line: a decoding step at one filling of a cache."""
    model = _model(arguments, room)
    config = model.config
    entries = [torch.randn(arguments.batch, *size) for size in cached_sizes(config, room)]
    torch._dynamo.reset()
    calls = {name: model if name == "eager" else compile_with(model, name.split()[0]) for name in BACKENDS}
    steps = {name: _step(call, config, entries, filled) for name, call in calls.items()}
    with torch.no_grad():
        logits = {name: step() for name, step in steps.items()}
        with float64_everywhere():
            exact = _step(copy.deepcopy(model).double(), config, entries, filled)()
        _judge(logits, exact)
        timings = interleave(steps, budget_seconds=arguments.seconds)
    return {
        "batch": arguments.batch,
        "room": room,
        "filled": filled,
        "seconds": {name: timings.median(name) for name in BACKENDS},
        "over_inductor": timings.ratio("inductor", "fxopt").as_dict(),
        "over_eager": timings.ratio("eager", "fxopt").as_dict(),
        "noise": timings.ratio("inductor again", "inductor").as_dict(),
    }


def _judge(logits: dict[str, torch.Tensor], exact: torch.Tensor) -> None:
    """The rule of the tests: at most twice eager's error, and one unit in the last place.

    Raises:
        ValueError: what is measured does not give the same answer.
    """
    if not comparable(logits["eager"], exact):
        raise ValueError("eager and float64 do not compute the same")
    allowed = allowed_error(logits["eager"], exact)
    for name, found in logits.items():
        error = max_error(found, exact)
        if not error <= allowed:
            raise ValueError(f"{name} errs by {error:.3g} against float64, allowed {allowed:.3g}")


def _model(arguments: argparse.Namespace, room: int) -> Any:
    from transformers import LlamaConfig, LlamaForCausalLM, MistralConfig, MistralForCausalLM

    shapes: dict[str, Any] = {
        "vocab_size": 1024, "hidden_size": 512, "intermediate_size": 1408,
        "num_hidden_layers": arguments.layers, "num_attention_heads": 8, "num_key_value_heads": 2,
        "max_position_embeddings": 2 * room,
    }  # fmt: skip
    torch.manual_seed(0)
    if arguments.latent:
        return latent_model(arguments.layers, torch.float32)
    if arguments.sliding:
        return MistralForCausalLM(MistralConfig(**shapes, sliding_window=room)).eval()
    return LlamaForCausalLM(LlamaConfig(**shapes)).eval()


def _step(call: Any, config: Any, entries: list[torch.Tensor], filled: int) -> Callable[[], torch.Tensor]:
    """Decode the same token again and again: each call writes its key behind the filled part.

    `entries` are the keys and values of each layer, (B, Hkv, room, D) each.
    """
    from transformers import StaticCache

    batch, room = entries[0].shape[0], entries[0].shape[2]
    cache = StaticCache(config, max_cache_len=2 * room if config.model_type == "mistral" else room)
    token = torch.zeros(batch, 1, dtype=torch.int64)
    live = (torch.arange(room) <= filled).expand(batch, 1, 1, room).contiguous()
    how = {"attention_mask": live, "position_ids": torch.full((batch, 1), filled), "past_key_values": cache}
    entries = [each.to(torch.get_default_dtype()) for each in entries]
    for layer in cache.layers:
        layer.lazy_initialization(*(each[:, :, :1] for each in entries))
        layer.keys.copy_(entries[0])
        layer.values.copy_(entries[1])

    def step() -> torch.Tensor:
        for layer in cache.layers:
            layer.cumulative_length.fill_(filled)
            layer.cumulative_length_int = filled
        logits: torch.Tensor = call(token, **how).logits
        return logits

    return step


def _table(rows: list[dict[str, Any]]) -> Table:
    table = Table(title="one token over a static cache, milliseconds")
    for name in ("batch", "room", "filled", *BACKENDS[:2], "fxopt", "over Inductor", "over eager", "noise"):
        table.add_column(name, justify="right")
    for row in rows:
        times = [f"{1000 * row['seconds'][name]:.1f}" for name in ("eager", "inductor", "fxopt")]
        ratios = [f"{row[name]['median']:.2f}" for name in ("over_inductor", "over_eager", "noise")]
        table.add_row(str(row["batch"]), str(row["room"]), str(row["filled"]), *times, *ratios)
    return table


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rooms", default="512,2048,8192", help="capacities of the cache, by commas")
    parser.add_argument("--filled", default="256,512,2000,8000", help="keys that are there, by commas")
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--layers", type=int, default=8)
    parser.add_argument(
        "--latent", action="store_true", help="multi-head latent attention, as DeepSeek has it"
    )
    parser.add_argument("--sliding", action="store_true", help="windows of sliding layers, which are full")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--seconds", type=float, default=6.0, help="for the timing of one line")
    parser.add_argument("--out", type=Path, help="a JSON file")
    return parser


if __name__ == "__main__":
    raise SystemExit(main())
