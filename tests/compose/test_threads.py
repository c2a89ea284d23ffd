"""Several threads: compiling at once, calling at once, each with its own answer, state and records."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from typing import Any, TypeVar

import pytest
import torch
from torch._dynamo.backends import registry

import fxopt
from fxopt.report.record import GraphRecord, collect
from support.compile_stats import Counting
from support.compiled import all_handled, compile_fxopt, faults
from support.numerics import assert_closer
from support.reference import double_model, reference_mode
from support.rounding import perturbed
from support.runs import infer, train, train64
from support.zoo import ZOO

THREADS = 4
# A thread that waits longer than this will wait forever.
SECONDS = 120
NAMES = ("bert", "gpt2", "llama")
LAYERS = 2
H, D = 3, 8

T = TypeVar("T")


def at_once(work: Callable[[int], T], count: int = THREADS) -> list[T]:
    """`work(0)`, `work(1)`, ... each in a thread of its own, begun together. Threads that hang are left."""
    barrier = threading.Barrier(count, timeout=SECONDS)
    futures: list[Future[T]] = [Future() for _ in range(count)]

    def start(number: int) -> None:
        try:
            torch.set_num_threads(1)
            barrier.wait()
            futures[number].set_result(work(number))
        except BaseException as error:
            futures[number].set_exception(error)

    for number in range(count):
        threading.Thread(target=start, args=(number,), daemon=True).start()
    deadline = time.monotonic() + SECONDS
    return [future.result(timeout=deadline - time.monotonic()) for future in futures]


def attend(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    return torch.softmax(q @ k.transpose(-1, -2) * D**-0.5, dim=-1) @ v


def attention_inputs(length: int) -> dict[str, torch.Tensor]:
    return dict(zip("qkv", torch.randn(3, 2, H, length, D), strict=True))


def attentions(records: Sequence[GraphRecord]) -> set[int]:
    """How many were rewritten in each graph. Threads that wait for the same graph may each compile it."""
    return {len(record.applied("rewrite-attention")) for record in records}


def assert_like_eager(candidate: Any, inputs: dict[str, torch.Tensor]) -> None:
    wide = {name: value.double() for name, value in inputs.items()}
    others = perturbed(lambda: infer(attend, inputs))
    assert_closer(infer(attend, wide), candidate, infer(attend, inputs), roundings=others)


def test_each_thread_trains_its_own_model() -> None:
    models = [ZOO[name].make_model().train() for name in NAMES]
    inputs = [
        ZOO[name].make_inputs(training=True, mask=ZOO[name].masks[-1], seed=number)
        for number, name in enumerate(NAMES)
    ]

    def work(number: int) -> Any:
        compiled = compile_fxopt(models[number])
        with collect(private=True) as own:
            first = train(compiled, models[number], inputs[number])
            second = train(compiled, models[number], inputs[number])
        return first, second, own

    for number, (first, second, own) in enumerate(at_once(work, len(NAMES))):
        model, name, given = models[number], NAMES[number], inputs[number]
        others = perturbed(lambda model=model, given=given: train(model, model, given))
        eager, reference = train(model, model, given), train64(model, given)
        for candidate in (first, second):
            assert_closer(reference, candidate, eager, roundings=others, what=name)
        assert not faults(own), name
        assert sum(len(record.applied("rewrite-attention")) for record in own) >= LAYERS, name


@pytest.mark.parametrize("host", ["eager", "inductor"])
def test_first_call_of_one_function(host: str) -> None:
    """All ask for the same graph before there is one; then there is, and nothing is left to compile."""
    given = [attention_inputs(7) for _ in range(THREADS)]
    compiled = compile_fxopt(attend, host)
    with all_handled() as records:
        found = at_once(lambda number: infer(compiled, given[number]))
        count = len(records)
        found += [infer(compiled, one) for one in given]
        assert len(records) == count
    for candidate, inputs in zip(found, given * 2, strict=True):
        assert_like_eager(candidate, inputs)
    assert attentions(records) == {1}


def test_calls_and_recompiles_together() -> None:
    """Some threads call what is compiled while others bring lengths that are not."""
    compiled = compile_fxopt(attend)
    given = [
        [attention_inputs(length) for length in (7, 7 + number, 9 + number)] for number in range(THREADS)
    ]
    infer(compiled, given[0][0])
    with all_handled() as records:
        found = at_once(lambda number: [infer(compiled, one) for one in given[number] * 5])
    for results, inputs in zip(found, given, strict=True):
        for candidate, one in zip(results, inputs * 5, strict=True):
            assert_like_eager(candidate, one)
    assert all(record.dynamic for record in records)
    assert attentions(records) == {1}


def test_grad_mode_of_a_thread_is_its_own() -> None:
    model, inputs = ZOO["llama"].make_model(), ZOO["llama"].make_inputs(training=True, mask="left")
    inputs |= {"use_cache": False}
    compiled = compile_fxopt(model)

    def run(call: Callable[..., Any], number: int) -> Any:
        with torch.set_grad_enabled(number % 2 == 0):
            return call(**inputs)

    with all_handled() as records:
        found = at_once(lambda number: run(compiled, number))
    wide = double_model(model)
    with reference_mode():
        reference = [run(wide, number) for number in range(THREADS)]
    others = perturbed(lambda: [run(model, number) for number in range(THREADS)])
    eager = [run(model, number) for number in range(THREADS)]
    assert_closer(reference, found, eager, roundings=others)
    assert {record.trains for record in records} == {False, True}
    assert attentions(records) == {LAYERS}


def test_two_backends_in_two_threads() -> None:
    given = [attention_inputs(length) for length in (7, 9, 11)]
    plain = Counting("eager")
    calls = [compile_fxopt(attend), torch.compile(attend, backend=plain)]
    with all_handled() as records:
        found = at_once(lambda number: [infer(calls[number % 2], one) for one in given * 3])
    for results in found:
        for candidate, one in zip(results, given * 3, strict=True):
            assert_like_eager(candidate, one)
    assert plain.ids
    assert attentions(records) == {1}


def test_the_backend_is_found_by_its_name(monkeypatch: pytest.MonkeyPatch) -> None:
    """Four threads look for it before it is loaded."""

    class SlowEntryPoint:
        def load(self) -> Callable[..., Any]:
            time.sleep(0.1)
            return fxopt.backend

    monkeypatch.delitem(registry._COMPILER_FNS, "fxopt", raising=False)
    monkeypatch.setitem(registry._BACKENDS, "fxopt", SlowEntryPoint())
    given = attention_inputs(7)
    with all_handled():
        found = at_once(lambda number: infer(compile_fxopt(attend), given))
    for candidate in found:
        assert_like_eager(candidate, given)
