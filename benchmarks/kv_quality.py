"""What rows of 8 bits change in the answers of a language model: `python -m benchmarks.kv_quality`.

A small decoder is trained for some seconds to complete sequences in which a random passage comes back, which
it cannot do without looking at keys and values far behind. Then each token of new sequences is predicted over
a cache of each kind, fed one by one. Reported are

- perplexity: of the tokens that come back (1 is perfect) and of all,
- logits: root mean square of the difference from those over an exact cache, relative to their spread,
- choices: how often the most probable token is the same,
- attention: relative error of one attention over random rows, beside that of keys and values in bfloat16.
"""

from __future__ import annotations

import argparse
import functools
import math
import time
from collections.abc import Callable
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch.nn.functional import cross_entropy
from torch.nn.functional import scaled_dot_product_attention as sdpa

import fxopt
from benchmarks.running import add_arguments, run
from fxopt.measure.jobs import Job, progress
from fxopt.measure.results import Row

VOCABULARY, LENGTH = 64, 96
CACHES = ("exact", "bfloat16", "int8", "fp8")


def main() -> int:
    arguments = _parser().parse_args()
    torch.set_num_threads(arguments.threads)
    torch.manual_seed(arguments.seed)
    console = Console()
    model, loss = train(arguments.training, arguments.batch, console)
    console.print(f"trained to a loss of {loss:.3f} a token")
    ids = sequences(arguments.sequences)
    exact = _logits(model, ids, "exact")
    jobs = [Job({"cache": name}, functools.partial(measure, name, model, ids, exact)) for name in CACHES]
    return run(arguments, jobs, _table)[1]


def sequences(count: int) -> torch.Tensor:
    """(count, LENGTH): a random half, and the same half again."""
    half = torch.randint(VOCABULARY, (count, LENGTH // 2))
    return torch.cat([half, half], 1)


def train(seconds: float, batch: int, console: Console) -> tuple[Any, float]:
    """The model, and its last loss for the tokens that come back."""
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=VOCABULARY, hidden_size=128, intermediate_size=256, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=LENGTH,
    )  # fmt: skip
    model = LlamaForCausalLM(config)
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3, weight_decay=0.01)
    end, loss = time.monotonic() + seconds, math.inf
    with progress(console) as bar:
        task = bar.add_task("training", total=seconds)
        while time.monotonic() < end:
            ids = sequences(batch)
            found = _losses(model(ids).logits, ids)[:, LENGTH // 2 :].mean()
            found.backward()
            optimizer.step()
            optimizer.zero_grad()
            loss = found.item()
            done = round(seconds - (end - time.monotonic()))
            bar.update(task, completed=done, description=f"loss {loss:.3f}, seconds")
    return model.eval(), loss


def _losses(logits: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
    """(sequences, LENGTH - 1), of the second token and those behind it."""
    return cross_entropy(logits[:, :-1].float().mT, ids[:, 1:], reduction="none")


@torch.no_grad()
def measure(name: str, model: Any, ids: torch.Tensor, exact: torch.Tensor) -> Row:
    """The line of one kind of cache. `exact`: the logits over an exact one."""
    logits = exact if name == "exact" else _logits(model, ids, name)
    losses = _losses(logits, ids)
    return {
        "perplexity_repeated": losses[:, LENGTH // 2 :].mean().exp().item(),
        "perplexity": losses.mean().exp().item(),
        "logits": ((logits - exact).square().mean().sqrt() / exact.std()).item(),
        "choices": (logits.argmax(-1) == exact.argmax(-1)).float().mean().item(),
        "attention": None if name == "exact" else attention_error(name),
    }


def _logits(model: Any, ids: torch.Tensor, name: str) -> torch.Tensor:
    """Token by token, over a cache that is made for them."""
    cache = _cache(name)
    steps = [model(token, past_key_values=cache).logits for token in ids.split(1, 1)]
    return torch.cat(steps, 1)


def _cache(name: str) -> Any:
    from transformers import DynamicCache
    from transformers.cache_utils import DynamicLayer

    if name in ("int8", "fp8"):
        return fxopt.QuantizedCache(dtype=name)
    cache = DynamicCache()
    if name == "bfloat16":

        class Rounded(DynamicLayer):
            def update(self, keys: torch.Tensor, values: torch.Tensor, *args: Any, **how: Any) -> Any:
                return super().update(keys.bfloat16().float(), values.bfloat16().float(), *args, **how)

        cache.layer_class_to_replicate = Rounded
    return cache


def attention_error(name: str, keys: int = 4096, width: int = 64) -> float:
    """Relative error of attention over random keys and values that a cache has held."""
    query, key, value = (torch.randn(1, 8, size, width) for size in (16, keys, keys))
    held = _cache(name).update(key, value, 0)
    attend: Callable[..., torch.Tensor] = lambda k, v: sdpa(query.double(), k.double(), v.double())  # noqa: E731
    exact = attend(key, value)
    return ((attend(*held) - exact).norm() / exact.norm()).item()


def _table(rows: list[Row]) -> Table:
    table = Table(title="a small language model over caches of several kinds")
    for name in ("cache", "perplexity, repeated", "perplexity, all", "logits", "same choice", "attention"):
        table.add_column(name, justify="right")
    for row in rows:
        error = "-" if row["attention"] is None else f"{row['attention']:.1e}"
        table.add_row(
            row["cache"], f"{row['perplexity_repeated']:.4f}", f"{row['perplexity']:.3f}",
            f"{row['logits']:.1e}", f"{row['choices']:.2%}", error,
        )  # fmt: skip
    return table


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--training", type=float, default=60.0, help="seconds of training")
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--sequences", type=int, default=64, help="to measure on")
    parser.add_argument("--seed", type=int, default=0)
    add_arguments(parser)
    return parser


if __name__ == "__main__":
    raise SystemExit(main())
