"""Random operations on key-value caches, compiled and eager side by side; after each, all is equal.

``python -m tests.support.cache_fuzz --operations 10000`` is what the slow tests do.
"""

from __future__ import annotations

import argparse
import copy
import io
import random
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from transformers import DynamicCache, MistralConfig

from fxopt.runtime.decode_path import DecodePath
from fxopt.runtime.step_loops import CURRENT

HEADS, WIDTH, LAYERS = 2, 3, 2
Step = Callable[[DynamicCache, torch.Tensor], torch.Tensor]


def step(cache: DynamicCache, new: torch.Tensor) -> torch.Tensor:
    """What a decoder does with its cache. Args: new: (layers, 2, B, heads, S, width)."""
    out = []
    for layer in range(LAYERS):
        keys, values = cache.update(new[layer, 0], new[layer, 1], layer)
        out.append((new[layer, 0] @ keys.mT) @ values)
    return torch.stack(out)


class Decoder(torch.nn.Module):
    """`step` as a model, which is what steps past Dynamo's guards need."""

    def forward(self, cache: DynamicCache, new: torch.Tensor) -> torch.Tensor:
        """As `step`."""
        return step(cache, new)


class Differs(AssertionError):
    """What is compiled and what is eager have come apart."""


@dataclass
class Fuzz:
    """Pairs of caches, and pairs of tensors taken from them, the first of each compiled.

    Attributes:
        make: an empty cache.
        done: how often each operation ran.
    """

    compiled: Step
    random: random.Random
    make: Callable[[], DynamicCache] = DynamicCache
    caches: list[tuple[DynamicCache, DynamicCache]] = field(default_factory=list)
    kept: list[tuple[torch.Tensor, torch.Tensor]] = field(default_factory=list)
    done: dict[str, int] = field(default_factory=dict)

    def run(self, operations: int) -> None:
        """Raises: Differs, with the number and name of the operation."""
        names = list(OPERATIONS)
        for number in range(operations):
            name = "begin" if not self.caches else self.random.choices(names, OPERATIONS.values())[0]
            getattr(self, name)()
            self.done[name] = self.done.get(name, 0) + 1
            self.check(f"operation {number}, {name}")

    def check(self, where: str) -> None:
        for mine, eager in self.caches:
            for layer, twin in zip(mine.layers, eager.layers, strict=True):
                if not all(torch.equal(getattr(layer, name), getattr(twin, name)) for name in _names(twin)):
                    raise Differs(f"{where}: a cache")
        if not all(torch.equal(mine, eager) for mine, eager in self.kept):
            raise Differs(f"{where}: a tensor that was kept")

    def begin(self) -> None:
        pair = (self.make(), self.make())
        self._step(pair, torch.randn(LAYERS, 2, self.random.choice((2, 3)), HEADS, 3, WIDTH))
        self.caches.append(pair)

    def append(self) -> None:
        pair = self._pair()
        rows = self.random.choice((1, 1, 1, 1, 2, 5))
        self._step(pair, torch.randn(LAYERS, 2, pair[1].layers[0].keys.shape[0], HEADS, rows, WIDTH))

    def decode(self) -> None:
        pair = self._pair()
        for _ in range(self.random.randrange(1, 20)):
            self._step(pair, torch.randn(LAYERS, 2, pair[1].layers[0].keys.shape[0], HEADS, 1, WIDTH))

    def threads(self) -> None:
        """Two texts go on at the same time, each in a thread of its own."""
        if len(self.caches) < 2:
            return
        pairs = self.random.sample(self.caches, 2)
        given = [
            [torch.randn(LAYERS, 2, pair[1].layers[0].keys.shape[0], HEADS, 1, WIDTH) for _ in range(8)]
            for pair in pairs
        ]
        with ThreadPoolExecutor(2) as pool:
            for done in [pool.submit(self._steps, *each) for each in zip(pairs, given, strict=True)]:
                done.result()

    def _steps(self, pair: tuple[DynamicCache, DynamicCache], given: list[torch.Tensor]) -> None:
        with settings():  # each thread has its own
            for new in given:
                self._step(pair, new)

    def _step(self, pair: tuple[DynamicCache, DynamicCache], new: torch.Tensor) -> None:
        if not torch.equal(self.compiled(pair[0], new), step(pair[1], new)):
            torch.testing.assert_close(self.compiled(pair[0], new), step(pair[1], new))

    def keep(self) -> None:
        """User code holds a tensor of a cache, or a view of one."""
        view: Callable[[torch.Tensor], torch.Tensor] = self.random.choice(
            (lambda t: t, lambda t: t[:, :, :2], lambda t: t.detach(), lambda t: torch.from_numpy(t.numpy()))
        )
        mine, eager = self._tensors()
        self.kept.append((view(mine), view(eager)))

    def forget(self) -> None:
        if self.kept:
            self.kept.pop(self.random.randrange(len(self.kept)))

    def edit(self) -> None:
        """User code writes to the tensor that a cache holds."""
        for tensor in self._tensors():
            tensor[..., 0, :] += 1

    def edit_kept(self) -> None:
        if self.kept:
            for tensor in self.random.choice(self.kept):
                tensor.mul_(2)

    def crop(self) -> None:
        pair = self._pair()
        rows = self.random.randrange(pair[1].get_seq_length())
        full = any(getattr(layer, "sliding_window", rows) <= rows for layer in pair[1].layers)
        if rows and not (full or _slid(pair[1])):
            for cache in pair:
                cache.crop(-rows)

    def reorder(self) -> None:
        pair = self._pair()
        batch = pair[1].layers[0].keys.shape[0]
        order = torch.tensor([self.random.randrange(batch) for _ in range(batch)])
        for cache in pair:
            cache.reorder_cache(order)

    def repeat(self) -> None:
        pair = self._pair()
        if pair[1].layers[0].keys.shape[0] < 4:
            for cache in pair:
                cache.batch_repeat_interleave(2)

    def select(self) -> None:
        pair = self._pair()
        for cache in pair:
            cache.batch_select_indices(torch.tensor([1, 0]))

    def deepcopy(self) -> None:
        mine, eager = self._pair()
        self.caches.append((copy.deepcopy(mine), copy.deepcopy(eager)))

    def share(self) -> None:
        """Two caches of the same tensors, as a prompt that several continuations start from."""
        mine, eager = self._pair()
        self.caches.append((_sharing(mine), _sharing(eager)))

    def save(self) -> None:
        place = self.random.randrange(len(self.caches))
        mine, eager = self.caches[place]
        self.caches[place] = (saved(mine), saved(eager))

    def drop(self) -> None:
        self.caches.pop(self.random.randrange(len(self.caches)))

    def limit(self) -> None:
        """Old ones go, so that a run does not slow down."""
        del self.caches[:-6], self.kept[:-6]

    def _pair(self) -> tuple[DynamicCache, DynamicCache]:
        return self.random.choice(self.caches)

    def _tensors(self) -> tuple[torch.Tensor, torch.Tensor]:
        mine, eager = self._pair()
        layer = self.random.randrange(LAYERS)
        name = self.random.choice(_names(eager.layers[layer]))
        return getattr(mine.layers[layer], name), getattr(eager.layers[layer], name)


# How often each operation is drawn.
OPERATIONS = {
    "begin": 2, "append": 40, "decode": 10, "keep": 8, "forget": 8, "edit": 6, "edit_kept": 4, "crop": 8,
    "reorder": 3, "repeat": 1, "select": 1, "deepcopy": 3, "share": 4, "save": 1, "drop": 4, "limit": 3,
    "threads": 2,
}  # fmt: skip


def _names(layer: Any) -> list[str]:
    """The attributes that hold what a layer has."""
    return [name for name, value in vars(layer).items() if isinstance(value, torch.Tensor) and value.dim()]


def _slid(cache: DynamicCache) -> bool:
    """A window has dropped rows: transformers cannot take any back."""
    return any(layer.get_seq_length() > layer.keys.shape[2] for layer in cache.layers)


def _sharing(cache: DynamicCache) -> DynamicCache:
    other = copy.copy(cache)
    other.layers = [copy.copy(layer) for layer in cache.layers]
    return other


def saved(cache: DynamicCache) -> DynamicCache:
    """What a file of the cache holds."""
    file = io.BytesIO()
    torch.save(cache, file)
    file.seek(0)
    loaded: DynamicCache = torch.load(file, weights_only=False)
    return loaded


def fuzz(
    seed: int,
    operations: int,
    compiled: Step | None = None,
    make: Callable[[], DynamicCache] = DynamicCache,
) -> Fuzz:
    """One run. Raises: Differs."""
    torch.manual_seed(seed)
    run = Fuzz(compiled or compiled_step(), random.Random(seed), make)
    with settings():
        run.run(operations)
    return run


@contextmanager
def settings() -> Iterator[None]:
    """No gradients, and room for the graphs of all batches and numbers of rows."""
    with torch.no_grad(), torch._dynamo.config.patch(recompile_limit=256):
        yield


def compiled_step() -> Step:
    compiled: Step = torch.compile(step, backend="fxopt", dynamic=True, options={"host": "eager"})
    return compiled


def sliding() -> DynamicCache:
    """A cache whose layers keep a window."""
    config = MistralConfig(num_hidden_layers=LAYERS, sliding_window=9)
    return DynamicCache(config=config)


class PastGuards:
    """As `compiled_step`, but that steps behind one another go past Dynamo's guards, as in `generate`.

    A thread has a path of its own, as a call of `generate` has.

    Attributes:
        taken: how many did.
    """

    def __init__(self) -> None:
        CURRENT.build(wait=True)
        self._compiled = torch.compile(Decoder(), backend="fxopt", options={"host": "eager"})
        self._calls, self._before = threading.local(), DecodePath.taken

    @property
    def taken(self) -> int:
        return DecodePath.taken - self._before

    def __call__(self, cache: DynamicCache, new: torch.Tensor) -> torch.Tensor:
        call = self._calls
        if getattr(call, "cache", 0) != id(cache):  # a new call of generate
            call.path, call.cache = DecodePath(self._compiled), id(cache)
        result: torch.Tensor = call.path(cache=cache, new=new)
        return result


if __name__ == "__main__":
    from rich.progress import track

    import fxopt
    from fxopt.runtime.kv_state import STATE

    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--operations", type=int, default=10_000)
    parser.add_argument("--int8", action="store_true", help="caches of int8")
    parser.add_argument("--sliding", action="store_true", help="caches that keep a window")
    parser.add_argument("--past-guards", action="store_true", help="as in generate of a compiled module")
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    runs = max(1, arguments.operations // 500)
    compiled = PastGuards() if arguments.past_guards else compiled_step()
    make = fxopt.QuantizedCache if arguments.int8 else sliding if arguments.sliding else DynamicCache
    for each in track(range(runs), "fuzz"):
        fuzz(arguments.seed + each, 500, compiled, make)
    past = f", {compiled.taken} steps past the guards" if isinstance(compiled, PastGuards) else ""
    print(
        f"{runs * 500} operations, no difference; rows {STATE.in_place} in place, {STATE.copied} copied{past}"
    )
