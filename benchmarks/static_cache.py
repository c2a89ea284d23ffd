"""Decoding over a static cache, beside eager and Inductor: `python -m benchmarks.static_cache`.

A decoder of random weights, one token at a time, by the room of the cache and how much of it is filled. The
mask is the one that `generate` passes: a tensor of bools over the whole room. With --sliding the room is the
window of every layer, and full: each token drops the oldest one. With --latent the cache holds the latents of
multi-head latent attention. With --kv the rows of fxopt's cache have 8 bits, and nobody else's.
"""

from __future__ import annotations

import argparse
import copy
from typing import Any

import torch

import fxopt
from benchmarks.decoding import Row, Step, compared, compile_all, run
from benchmarks.latent_model import cached_sizes, latent_model
from benchmarks.running import add_arguments, numbers
from fxopt.measure.accuracy import allowed_error, comparable, float64_everywhere, max_error


def main() -> int:
    arguments = _parser().parse_args()
    cases = [
        {"batch": arguments.batch, "room": room, "filled": filled}
        for room in numbers(arguments.rooms)
        for filled in ([room] if arguments.sliding else numbers(arguments.filled))
        if arguments.sliding or filled < room
    ]
    return run(arguments, cases, measure, "a static cache")


def measure(arguments: argparse.Namespace, batch: int, room: int, filled: int) -> Row:
    """One line: a decoding step at one filling of a cache."""
    model = _model(arguments, room)
    config = model.config
    entries = [torch.randn(batch, *size) for size in cached_sizes(config, room)]
    steps = {
        name: _step(call, config, entries, filled, arguments.kv if name == "fxopt" else "auto")
        for name, call in compile_all(model).items()
    }
    over: dict[str, list[str]] = {}
    for name in steps:
        over.setdefault(arguments.kv if name == "fxopt" else "auto", []).append(name)
    with torch.no_grad():
        logits = {name: step() for name, step in steps.items()}
        for kv, names in over.items():
            eager = _step(model, config, entries, filled, kv)()
            with float64_everywhere():
                exact = _step(copy.deepcopy(model).double(), config, entries, filled, kv)()
            _judge({name: logits[name] for name in names}, eager, exact)
        return compared(steps, arguments.seconds)


def _judge(logits: dict[str, torch.Tensor], eager: torch.Tensor, exact: torch.Tensor) -> None:
    """The rule of the tests: at most twice eager's error over such a cache, and one unit in the last place.

    Raises:
        ValueError: what is measured does not give the same answer.
    """
    if not comparable(eager, exact):
        raise ValueError("eager and float64 do not compute the same")
    allowed = allowed_error(eager, exact)
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
    dtype = getattr(torch, arguments.dtype)
    if arguments.latent:
        return latent_model(arguments.layers, dtype)
    if arguments.sliding:
        return MistralForCausalLM(MistralConfig(**shapes, sliding_window=room)).to(dtype).eval()
    return LlamaForCausalLM(LlamaConfig(**shapes)).to(dtype).eval()


def _step(call: Any, config: Any, entries: list[torch.Tensor], filled: int, kv: str = "auto") -> Step:
    """Decode the same token again and again: each call writes its key behind the filled part.

    `entries` are the keys and values of each layer, (B, Hkv, room, D) each.
    """
    from transformers import StaticCache

    batch, room = entries[0].shape[0], entries[0].shape[2]
    if kv == "auto":
        cache = StaticCache(config, max_cache_len=2 * room if config.model_type == "mistral" else room)
    else:
        cache = fxopt.StaticQuantizedCache(config, room, kv)
    token = torch.zeros(batch, 1, dtype=torch.int64)
    live = (torch.arange(room) <= filled).expand(batch, 1, 1, room).contiguous()
    how = {"attention_mask": live, "position_ids": torch.full((batch, 1), filled), "past_key_values": cache}
    entries = [each.to(call.dtype) for each in entries]
    for layer in cache.layers:
        layer.lazy_initialization(*(each[:, :, :1] for each in entries))
        if kv != "auto":
            layer.update(*entries)
            continue
        layer.keys.copy_(entries[0])
        layer.values.copy_(entries[1])

    def step() -> torch.Tensor:
        for layer in cache.layers:
            layer.cumulative_length.fill_(filled)
            layer.cumulative_length_int = filled
        logits: torch.Tensor = call(token, **how).logits
        return logits

    return step


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rooms", default="512,2048,8192", help="capacities of the cache, by commas")
    parser.add_argument("--filled", default="256,512,2000,8000", help="keys that are there, by commas")
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--layers", type=int, default=8)
    parser.add_argument("--dtype", default="float32")
    parser.add_argument(
        "--latent", action="store_true", help="multi-head latent attention, as DeepSeek has it"
    )
    parser.add_argument("--kv", choices=("auto", "int8", "fp8"), default="auto", help="rows of fxopt's cache")
    parser.add_argument("--sliding", action="store_true", help="windows of sliding layers, which are full")
    add_arguments(parser, seconds=6.0)
    return parser


if __name__ == "__main__":
    raise SystemExit(main())
