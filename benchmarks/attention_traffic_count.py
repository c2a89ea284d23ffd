"""With TRITON_INTERPRET=1: counts what kernels of attention move and multiply, a JSON line for each case."""

from __future__ import annotations

import json
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import torch
from triton.runtime import interpreter

from fxopt.codegen.attention_backward import backward_kernel
from fxopt.codegen.attention_example import example_text
from fxopt.codegen.attention_kernel import forward_kernel
from fxopt.codegen.attention_program import Capture
from fxopt.codegen.attention_spec import Spec
from fxopt.codegen.decode_attention import decode_kernel
from fxopt.codegen.decode_problem import Problem
from fxopt.ir.program import MaskProgram, ScoreProgram
from fxopt.ir.target import Target
from fxopt.runtime.kernel_cache import KernelCache

TARGET = Target.named("sm_90")
TOKENS, GROUP, WIDTH = 256, 4, 64
ROOM, DECODE_WIDTH, DECODE_BATCH, DECODE_HEADS = 1024, 128, 2, 2
Row = dict[str, Any]


@dataclass
class Counter:
    """Bytes and operations of launches. `spans`: of memory whose reads are counted apart: [first, behind)."""

    spans: Sequence[tuple[int, int]] = ()
    memory: int = 0
    requested: int = 0
    flops: int = 0
    apart: int = 0
    places: dict[tuple[str, int], list[Any]] = field(default_factory=dict)

    def touch(self, kind: str, pointers: Any, mask: Any) -> None:
        places = pointers.data[np.broadcast_to(mask.data, pointers.data.shape).astype(bool)].ravel()
        width = pointers.get_element_ty().primitive_bitwidth // 8
        self.requested += places.size * width
        for first, behind in self.spans if kind == "read" else ():
            self.apart += int(((places >= first) & (places < behind)).sum()) * width
        self.places.setdefault((kind, width), []).append(places)

    def end_launch(self) -> None:
        for (_, width), found in self.places.items():
            self.memory += np.unique(np.concatenate(found)).size * width
        self.places = {}


@contextmanager
def counting(counter: Counter) -> Iterator[None]:
    """Everything that the interpreter loads, stores and multiplies is counted."""
    builder, executor = interpreter.InterpreterBuilder, interpreter.GridExecutor
    load, store, dot = builder.create_masked_load, builder.create_masked_store, builder.create_dot
    call = executor.__call__

    def counted_load(self: Any, pointers: Any, mask: Any, *others: Any) -> Any:
        counter.touch("read", pointers, mask)
        return load(self, pointers, mask, *others)

    def counted_store(self: Any, pointers: Any, value: Any, mask: Any, *others: Any) -> Any:
        counter.touch("written", pointers, mask)
        return store(self, pointers, value, mask, *others)

    def counted_dot(self: Any, a: Any, b: Any, *others: Any) -> Any:
        counter.flops += 2 * a.data.size * b.data.shape[-1]
        return dot(self, a, b, *others)

    def counted_launch(self: Any, *args: Any, **kwargs: Any) -> None:
        call(self, *args, **kwargs)
        counter.end_launch()

    with (
        mock.patch.object(builder, "create_masked_load", counted_load),
        mock.patch.object(builder, "create_masked_store", counted_store),
        mock.patch.object(builder, "create_dot", counted_dot),
        mock.patch.object(executor, "__call__", counted_launch),
    ):
        yield


@dataclass(frozen=True)
class Variant:
    """A mask and a score."""

    mask: str = "k <= q"
    score: str = ""
    captures: tuple[torch.Tensor, ...] = ()
    sinks: bool = False


VARIANTS = {
    "causal": Variant(),
    "window": Variant("k <= q and k > q - 64"),
    "soft cap": Variant(score="50*tanh(s/50)"),
    "ALiBi": Variant(score="s + c0[h]*k - c0[h]*q", captures=(torch.full((GROUP,), 0.1),)),
    "documents": Variant("k <= q and c0[b, k] == c0[b, q]", captures=((torch.arange(TOKENS) // 128)[None],)),
    "prefix": Variant("k <= q or k < c0[b]", captures=(torch.tensor([100]),)),
    "sinks": Variant(sinks=True),
}


def size_of(tensors: Sequence[torch.Tensor]) -> int:
    return sum(each.numel() * each.element_size() for each in tensors)


def trained(cache: KernelCache, name: str) -> Iterator[Row]:
    """The forward and the backward of a variant."""
    case, half = VARIANTS[name], torch.float16
    spec = Spec(
        half, GROUP, WIDTH, WIDTH, MaskProgram.parse(case.mask), ScoreProgram.parse(case.score), 0.125,
        tuple(Capture.of(f"c{place}", one) for place, one in enumerate(case.captures)),
        sinks=half if case.sinks else None,
    )  # fmt: skip
    query, grad = (torch.randn(1, TOKENS, GROUP, WIDTH).half().transpose(1, 2) for _ in range(2))
    key, value = (torch.randn(1, 1, TOKENS, WIDTH).half() for _ in range(2))
    given = [query, key, value, *case.captures, *([torch.zeros(GROUP).half()] if case.sinks else [])]
    captures = {f"c{place}": one for place, one in enumerate(case.captures)}
    live = spec.mask.compute((1, GROUP), (0, TOKENS), (0, TOKENS), captures, {}, query.device)
    scores = int(live.expand(1, GROUP, TOKENS, TOKENS).sum())
    made: Any = ()
    for kernel in (
        forward_kernel(spec, TARGET, example_text(spec, ())),
        backward_kernel(spec, (), TARGET, example_text(spec, ())),
    ):
        arguments = [grad, *made, *given] if made else given
        products, counter = (5 if made else 2), Counter()
        with counting(counter):
            made = cache.load(kernel).launch(*arguments)
        yield {
            "kernel": kernel.name,
            "case": name,
            "launches": len(kernel.launches),
            "least": size_of([*arguments, *made]),
            "memory": counter.memory,
            "requested": counter.requested,
            "least_flops": 2 * products * scores * WIDTH,
            "flops": counter.flops,
        }


@dataclass(frozen=True)
class Step:
    """A decoding step: keys in front of it, queries of a group of heads, the window, the dtype of rows."""

    length: int
    group: int
    queries: int = 1
    window: int = 0
    stored: torch.dtype = torch.float16


STEPS = {
    "1000 keys, group 1": Step(1000, 1),
    "1000 keys, group 4": Step(1000, 4),
    "333 keys, group 7, 4 queries": Step(333, 7, 4),
    "window of 200, group 4": Step(1000, 4, window=200),
    "int8, 777 keys, group 4": Step(777, 4, stored=torch.int8),
}


def decoded(cache: KernelCache, name: str) -> Iterator[Row]:
    """A step over a cache."""
    step = STEPS[name]
    shape = (DECODE_BATCH, DECODE_HEADS, ROOM)
    rows = {each: torch.ones(*shape, DECODE_WIDTH).to(step.stored) for each in ("key", "value")}
    if step.stored is torch.int8:
        rows |= {f"{each}_scale": torch.ones(*shape, 1) for each in ("key", "value")}
    query = torch.randn(DECODE_BATCH, DECODE_HEADS * step.group, step.queries, DECODE_WIDTH).half()
    length = torch.tensor([step.length - step.queries])
    window = f" and k > q + c0[0] - {step.window}" if step.window else ""
    mask = MaskProgram.parse(f"k <= q + c0[0]{window}")
    problem = Problem({"query": query, **rows}, (length,), (), 0.125, "zero", mask, ScoreProgram.parse(""))
    kernel = decode_kernel(problem, TARGET)
    spans = [(one.data_ptr(), one.data_ptr() + size_of([one])) for one in rows.values()]
    counter = Counter(spans)
    with counting(counter):
        cache.load(kernel).launch(*problem.tensors.values(), length)
    live = min(step.length, step.window + step.queries - 1) if step.window else step.length
    scores = sum(min(step.length - q, step.window or step.length) for q in range(step.queries))
    yield {
        "kernel": kernel.name,
        "case": name,
        "launches": len(kernel.launches),
        "least": size_of([one[:, :, :live] for one in rows.values()]),
        "memory": counter.apart,
        "requested": counter.requested,
        "least_flops": 4 * scores * step.group * DECODE_WIDTH * DECODE_BATCH * DECODE_HEADS,
        "flops": counter.flops,
    }


def main(names: Sequence[str]) -> None:
    torch.manual_seed(0)
    torch.set_num_threads(1)
    cases: list[tuple[Callable[[KernelCache, str], Iterator[Row]], str]] = [
        *((trained, name) for name in VARIANTS),
        *((decoded, name) for name in STEPS),
    ]
    with tempfile.TemporaryDirectory() as directory:
        cache = KernelCache(Path(directory))
        for count, name in cases:
            for row in count(cache, name) if not names or name in names else ():
                print(json.dumps(row), flush=True)


if __name__ == "__main__":
    main(sys.argv[1:])
