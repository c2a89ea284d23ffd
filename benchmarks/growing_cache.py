"""Decoding over a cache that grows, beside eager and Inductor: `python -m benchmarks.growing_cache`.

A decoder of random weights and transformers' `DynamicCache`, one token at a time, from several lengths on.
Every backend has a cache of its own, and all of them grow alike.
"""

from __future__ import annotations

import argparse
import itertools
from typing import Any

import torch

from benchmarks.decoding import Row, Step, compared, compile_all, run
from benchmarks.latent_model import cached_sizes, latent_model
from benchmarks.running import add_arguments, numbers

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
    pairs = itertools.product(numbers(arguments.batches), numbers(arguments.lengths))
    cases = [{"batch": batch, "length": length} for batch, length in pairs]
    return run(arguments, cases, measure, "a growing cache")


def measure(arguments: argparse.Namespace, batch: int, length: int) -> Row:
    """One line: a decoding step behind `length` tokens."""
    model = decoder(arguments.shape, getattr(torch, arguments.dtype))
    steps = {name: step(call, model.config, batch, length) for name, call in compile_all(model).items()}
    with torch.no_grad():
        for _ in range(4):  # compiles: for the first length, and for all others
            for each in steps.values():
                each()
        return compared(steps, arguments.seconds)


def decoder(shape: str, dtype: torch.dtype) -> Any:
    """A Llama of random weights, or a model with latent attention."""
    from transformers import LlamaConfig, LlamaForCausalLM

    if shape == LATENT:
        return latent_model(2, dtype)
    hidden, inner, layers, heads, groups, vocabulary = SHAPES[shape]
    config = LlamaConfig(
        vocab_size=vocabulary, hidden_size=hidden, intermediate_size=inner, num_hidden_layers=layers,
        num_attention_heads=heads, num_key_value_heads=groups, max_position_embeddings=2**17, dtype=dtype,
    )  # fmt: skip
    torch.manual_seed(0)
    return LlamaForCausalLM(config).to(dtype).eval()


def random_cache(config: Any, batch: int, length: int) -> Any:
    """A `DynamicCache` of random keys and values."""
    from transformers import DynamicCache

    torch.manual_seed(0)
    cache = DynamicCache()
    for layer in range(config.num_hidden_layers):
        sizes = cached_sizes(config, length)
        cache.update(*(torch.randn(batch, *size, dtype=config.dtype) for size in sizes), layer)
    return cache


def step(call: Any, config: Any, batch: int, length: int) -> Step:
    """One more token each time, behind random keys and values."""
    cache = random_cache(config, batch, length)
    token = torch.zeros(batch, 1, dtype=torch.int64)

    def decode() -> torch.Tensor:
        logits: torch.Tensor = call(token, past_key_values=cache).logits
        return logits

    return decode


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--shape", choices=(*SHAPES, LATENT), default="small")
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--batches", default="1,8", help="by commas")
    parser.add_argument("--lengths", default="64,512,2048,4096", help="tokens that are there, by commas")
    add_arguments(parser, seconds=8.0)
    return parser


if __name__ == "__main__":
    raise SystemExit(main())
