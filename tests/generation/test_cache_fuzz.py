"""Caches, compiled and eager side by side, under random operations; and that the comparison sees a fault."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable

import pytest
import torch
from transformers import DynamicCache

import fxopt
from fxopt.runtime.kv_state import STATE
from support.cache_fuzz import LAYERS, OPERATIONS, Differs, PastGuards, compiled_step, fuzz, sliding


@pytest.fixture(autouse=True)
def _afresh() -> None:
    torch.compiler.reset()


@pytest.mark.parametrize(("make", "operations"), [(DynamicCache, 200), (fxopt.QuantizedCache, 60)])
def test_random_operations(make: Callable[[], DynamicCache], operations: int) -> None:
    in_place, copied = STATE.in_place, STATE.copied
    done = fuzz(seed=1, operations=operations, make=make).done
    assert len(done) >= 12, f"too few kinds of operations to say anything: {done}"
    assert STATE.in_place - in_place > 4 * (STATE.copied - copied)


@pytest.mark.parametrize("make", [DynamicCache, sliding])
def test_random_operations_past_the_guards(make: Callable[[], DynamicCache]) -> None:
    path = PastGuards()
    fuzz(seed=2, operations=60, compiled=path, make=make)
    assert path.taken > 20


@pytest.mark.slow
@pytest.mark.parametrize(
    ("make", "past"),
    [(DynamicCache, False), (DynamicCache, True), (sliding, True), (fxopt.QuantizedCache, False)],
)
def test_ten_thousand_random_operations(make: Callable[[], DynamicCache], past: bool) -> None:
    compiled = PastGuards() if past else compiled_step()
    done: Counter[str] = Counter()
    for seed in range(20):
        done.update(fuzz(seed, 500, compiled, make).done)
    assert done.total() == 10_000
    assert set(done) == set(OPERATIONS)
    assert not isinstance(compiled, PastGuards) or compiled.taken > 5_000


@pytest.mark.parametrize("fault", ["holders", "aliases"])
def test_a_fault_is_seen(fault: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """If references were not counted, user code would see older tensors change."""
    if fault == "holders":
        monkeypatch.setattr("fxopt.runtime.kv_growth.references_of_a_call", lambda measured: 10**6)
    else:
        monkeypatch.setattr("fxopt.runtime.kv_state.is_alone", lambda tensor: True)
        monkeypatch.setattr("fxopt.runtime.kv_growth.Tip.is_what", lambda *given: True)
    run = fuzz(seed=1, operations=1)
    with torch.no_grad():
        for _ in range(4):
            run._step(run.caches[0], _rows(run.caches[0][0]))
        keys = [cache.layers[0].keys for cache in run.caches[0]]
        run.kept.append(tuple(keys if fault == "holders" else [each.data for each in keys]))  # type: ignore[arg-type]
        del keys
        run._step(run.caches[0], _rows(run.caches[0][0]))
        for cache in run.caches[0]:
            cache.layers[0].keys.zero_()
    with pytest.raises(Differs):
        run.check("the last step")


def _rows(cache: DynamicCache) -> torch.Tensor:
    layer = cache.layers[0].keys
    return torch.randn(LAYERS, 2, layer.shape[0], layer.shape[1], 1, layer.shape[3])
