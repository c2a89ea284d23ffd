"""Caches that move what they hold to other memory after each layer: left to their own code, with evidence.

The host's memory is float64 here, as there is but one device: keys go there and come back unchanged.
"""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from generation.test_generate import llama, prompts
from transformers import DynamicCache
from transformers.cache_utils import DynamicLayer

from fxopt.ir.contract import Status
from fxopt.runtime.kv_state import STATE
from support.compiled import all_handled

NEW = 12
NAME = "append-kv-cache"


class Stream:
    """One that has always ended."""

    def wait_stream(self, other: Any) -> None: ...

    def __enter__(self) -> None: ...

    def __exit__(self, *error: object) -> None: ...


class MovedLayer(DynamicLayer):
    """What transformers' layer does with `Tensor.to`."""

    def offload(self) -> None:
        if self.is_initialized:
            self.keys, self.values = self.keys.double(), self.values.double()

    def prefetch(self) -> None:
        if self.is_initialized:
            self.keys, self.values = self.keys.float(), self.values.float()


def offloaded() -> DynamicCache:
    cache = DynamicCache()
    cache.layer_class_to_replicate = MovedLayer
    cache.offloading, cache.only_non_sliding = True, True
    cache.prefetch_stream = Stream()
    return cache


@pytest.fixture
def streams(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "default_stream", lambda device=None: Stream())


def tokens(model: Any, cache: DynamicCache) -> torch.Tensor:
    how = {"max_new_tokens": NEW, "min_new_tokens": NEW, "do_sample": False, "past_key_values": cache}
    found: torch.Tensor = model.generate(**prompts(1), **how)
    return found


@pytest.mark.usefixtures("streams")
def test_stays_with_a_reason() -> None:
    torch._dynamo.reset()
    model = llama()
    compiled = torch.compile(copy.deepcopy(model), backend="fxopt", options={"host": "eager"})
    wanted, plain = offloaded(), tokens(model, DynamicCache())
    assert torch.equal(tokens(model, wanted), plain)
    cache, before = offloaded(), STATE.in_place
    with all_handled() as records:
        assert torch.equal(tokens(compiled, cache), plain)
    assert STATE.in_place == before
    for ours, theirs in zip(cache.layers, wanted.layers, strict=True):
        assert ours.keys.dtype is theirs.keys.dtype
        torch.testing.assert_close(ours.keys.float(), theirs.keys.float())
    entries = [entry for record in records for entry in record.evidence if entry.rewrite == NAME]
    assert entries
    assert all(entry.status is not Status.APPLIED and entry.reason for entry in entries)
