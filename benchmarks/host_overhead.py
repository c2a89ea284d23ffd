"""What a decoding step costs the host: `python -m benchmarks.host_overhead`.

A decoder whose compiled graphs are replaced by functions that return what the graph returned once, so that
what is left is Dynamo's and fxopt's own work. Steps through Dynamo's guards and past them take turns, on two
caches. All figures are CPU time of the thread, in microseconds for a token. What the timers take themselves,
3 microseconds, is measured, and is not in what a step costs on top of its graph.
"""

from __future__ import annotations

import argparse
import functools
import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from rich.table import Table

from benchmarks.running import add_arguments, numbers, run
from fxopt.measure.jobs import Job
from fxopt.runtime.decode_path import DecodePath
from fxopt.runtime.kv_calls import GrowingCall, noted
from fxopt.runtime.kv_growth import Resized
from fxopt.runtime.step_loops import CURRENT

# Steps before those that are counted: the last of the graphs is compiled, and its steps are learned.
_WARM = 8
# Of the functions that are timed as parts of a step, those that one past the guards calls: `Growth.resized`,
# `Resized.__enter__` and `GrowingCall.run`. And how many empty steps are timed.
_TIMED_IN_A_STEP, _EMPTY = 3, 500


def main() -> int:
    arguments = _parser().parse_args()
    if not arguments.python:
        CURRENT.build(wait=True)
    jobs = [
        Job({"layers": layers}, functools.partial(measure, layers, arguments.steps))
        for layers in numbers(arguments.layers)
    ]
    return run(arguments, jobs, _table)[1]


def measure(layers: int, steps: int) -> dict[str, Any]:
    """One line: medians over `steps` tokens of a decoder of so many layers."""
    from transformers import DynamicCache

    model = _model(layers)
    torch._dynamo.reset()
    compiled = torch.compile(model, backend="fxopt", options={"host": "eager"})
    callers = {"guards": compiled, "past the guards": DecodePath(compiled)}
    caches = {name: DynamicCache(config=model.config) for name in callers}
    spent = _Spent()

    def step(name: str, rows: int = 1) -> None:
        tokens = torch.zeros(1, rows, dtype=torch.int64)
        with spent.on(name):
            callers[name](input_ids=tokens, past_key_values=caches[name], use_cache=True)

    with torch.no_grad():
        for name in callers:
            step(name, rows=7)
            for _ in range(_WARM):
                step(name)
        spent.look_into(_graph_of(lambda: step("guards")))
        for name in [*callers] * 2:
            step(name)
        taken = DecodePath.taken
        spent.forget()
        for _ in range(steps):
            for name in callers:
                step(name)
    medians = spent.medians()
    on_top = medians["past the guards"] - medians["step past the guards"] - spent.of_timers()
    return {
        "microseconds": medians,
        "on_top_of_the_step": round(on_top, 1),
        "steps_past_the_guards": (DecodePath.taken - taken) / steps,
    }


class _Spent:
    """CPU seconds of the thread, for each step, by name."""

    def __init__(self) -> None:
        self.seconds: dict[str, list[float]] = {}
        self._name, self._inside = "", False

    @contextmanager
    def on(self, name: str) -> Iterator[None]:
        self._name = name
        self.seconds.setdefault(f"step {name}", []).append(0.0)
        began = time.thread_time()
        yield
        self.seconds.setdefault(name, []).append(time.thread_time() - began)

    def look_into(self, graph: GrowingCall) -> None:
        """From now on the graph computes nothing, and what is left of its calls is noted."""
        kept: list[Any] = []

        def stub(*inputs: Any) -> Any:
            return kept[0]

        compiled = graph.compiled

        def once(*inputs: Any) -> Any:
            kept.append(compiled(*inputs))
            graph.compiled = stub
            return kept[0]

        graph.compiled = once
        growth = graph.growth
        places = (
            (graph, "run"),
            (growth, "of"),
            (growth, "at_tip"),
            (growth, "resized"),
            (Resized, "__enter__"),
        )
        for holder, name in places:
            setattr(holder, name, self._timed(getattr(holder, name)))

    def _timed(self, function: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any) -> Any:
            if self._inside:
                return function(*args)
            self._inside, began = True, time.thread_time()
            result = function(*args)
            self.seconds[f"step {self._name}"][-1] += time.thread_time() - began
            self._inside = False
            return result

        return call

    def medians(self) -> dict[str, float]:
        """Microseconds, by name."""
        return {name: round(1e6 * statistics.median(found), 1) for name, found in self.seconds.items()}

    def of_timers(self) -> float:
        """Microseconds that the timers add to what is around a step: of one in which nothing happens."""
        name, nothing = "timers", self._timed(lambda: None)
        for _ in range(_EMPTY):
            with self.on(name):
                for _ in range(_TIMED_IN_A_STEP):
                    nothing()
        medians = self.medians()
        return medians[name] - medians[f"step {name}"]

    def forget(self) -> None:
        self.seconds.clear()


def _graph_of(step: Callable[[], None]) -> GrowingCall:
    notes: list[tuple[GrowingCall, Any]] = []
    token = noted.set(notes)
    try:
        step()
    finally:
        noted.reset(token)
    return notes[0][0]


def _model(layers: int) -> Any:
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=64, hidden_size=32, intermediate_size=64, num_hidden_layers=layers,
        num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=8192,
    )  # fmt: skip
    return LlamaForCausalLM(config).eval()


def _table(rows: list[dict[str, Any]]) -> Table:
    names = list(rows[0]["microseconds"])
    table = Table(title="microseconds of the host for a token")
    for name in ("layers", *names, "on top of the step"):
        table.add_column(name, justify="right")
    for row in rows:
        figures = [f"{row['microseconds'][name]:.0f}" for name in names]
        table.add_row(str(row["layers"]), *figures, f"{row['on_top_of_the_step']:.0f}")
    return table


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.host_overhead", description=__doc__)
    parser.add_argument("--layers", default="8,32", help="numbers of layers")
    parser.add_argument("--steps", type=int, default=400, help="tokens that are timed")
    parser.add_argument("--python", action="store_true", help="as where there is no compiler")
    add_arguments(parser)
    return parser


if __name__ == "__main__":
    raise SystemExit(main())
