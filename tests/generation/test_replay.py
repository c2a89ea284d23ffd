"""Decoding steps that are replayed give the tokens of the uncompiled model, whatever becomes of the caches.

There is no GPU here: recordings are those of `support.recorded`, which know addresses and numbers only.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from generation.test_generate import prompts, t5
from generation.test_growing_cache import SMALL, generated, llama, mistral, prompt
from transformers import (
    DynamicCache,
    Gemma3ForCausalLM,
    Gemma3TextConfig,
    LlamaConfig,
    LlamaForCausalLM,
)

import fxopt
from fxopt.ir.contract import Status
from fxopt.report.record import GraphRecord
from fxopt.runtime import cuda_graphs, kv_state
from fxopt.runtime.graphs import Replay
from support.compiled import all_handled, compile_fxopt
from support.recorded import FakeRecorder


@pytest.fixture
def recorder(monkeypatch: pytest.MonkeyPatch) -> FakeRecorder:
    """Makes recordings on the CPU."""
    made = FakeRecorder()
    monkeypatch.setattr(cuda_graphs, "recorder_for", lambda device: made)
    return made


@pytest.fixture
def replays(recorder: FakeRecorder, monkeypatch: pytest.MonkeyPatch) -> list[Replay]:
    """The graphs that are replayed in a test."""
    found: list[Replay] = []
    init = Replay.__init__

    def noted(self: Replay, *args: Any) -> None:
        init(self, *args)
        found.append(self)

    monkeypatch.setattr(Replay, "__init__", noted)
    return found


@pytest.fixture
def little_room(monkeypatch: pytest.MonkeyPatch) -> None:
    """Caches get new memory often, and what is there is no number."""
    monkeypatch.setattr(kv_state, "LEAST", 24)
    monkeypatch.setattr(kv_state, "MOST", 32)
    make = kv_state.KVState._make
    monkeypatch.setattr(kv_state.KVState, "_make", lambda *args: make(*args).fill_(torch.nan))


def reasons(records: list[GraphRecord], status: Status) -> set[str]:
    entries = [each for record in records for each in record.evidence if each.rewrite == "replay"]
    return {each.reason for each in entries if each.status is status}


def sampled(model: Any, new: int, **inputs: Any) -> torch.Tensor:
    torch.manual_seed(5)
    how = {"max_new_tokens": new, "min_new_tokens": new, "do_sample": True, "temperature": 10.0}
    tokens: torch.Tensor = model.generate(**inputs, **how)
    return tokens


def hybrid() -> torch.nn.Module:
    """Layers with a window, and without."""
    torch.manual_seed(0)
    kinds = ["sliding_attention", "full_attention"]
    return Gemma3ForCausalLM(
        Gemma3TextConfig(**SMALL, head_dim=6, sliding_window=16, layer_types=kinds)
    ).eval()


def spelled_out() -> torch.nn.Module:
    """Its masks are numbers that are added to the scores."""
    torch.manual_seed(0)
    return LlamaForCausalLM(LlamaConfig(**SMALL, attn_implementation="eager")).eval()


def ones() -> dict[str, torch.Tensor]:
    return {"input_ids": prompt(1), "attention_mask": torch.ones(1, 9, dtype=torch.int64)}


CASES = {
    "one": (llama, ones()),
    "padded": (llama, prompts(3)),
    "a padded window": (mistral, prompts()),
    "numbers as masks": (spelled_out, prompts()),
    "a window": (mistral, ones()),
    "layers with a window and without": (hybrid, prompts()),
    "positions that are looked up": (t5, {"input_ids": prompt(2)}),
}
SOON = ("one", "padded")


@pytest.mark.parametrize(
    "case", [pytest.param(name, marks=() if name in SOON else pytest.mark.slow) for name in CASES]
)
@pytest.mark.usefixtures("little_room")
def test_tokens(case: str, replays: list[Replay]) -> None:
    """Through several growths of the memory."""
    (build, inputs), new = CASES[case], 80
    model = build()
    wanted = sampled(model, new, **inputs)
    assert len(wanted[0].unique()) > 10
    with all_handled() as records:
        assert torch.equal(sampled(compile_fxopt(model, replay="always"), new, **inputs), wanted)
    assert reasons(records, Status.APPLIED)
    recordings = sum(each.recordings for each in replays)
    assert recordings >= 2
    assert sum(each.replays for each in replays) >= new - 20 - 2 * recordings


@pytest.mark.slow
def test_almost_every_step_is_a_replay(replays: list[Replay]) -> None:
    model, new = llama(), 300
    compiled = compile_fxopt(model, replay="always")
    assert torch.equal(generated(compiled, prompt(1), new), generated(model, prompt(1), new))
    (step,) = replays
    assert step.recordings == 1
    assert step.replays >= 0.99 * (new - 1)


@pytest.mark.parametrize(
    ("build", "inputs"), [(llama, ones()), pytest.param(hybrid, prompts(), marks=pytest.mark.slow)]
)
def test_static_caches(build: Any, inputs: Any, replays: list[Replay]) -> None:
    """Of each call of `generate`, a new one; the host's number of tokens is part of those with a window."""
    model, new = build(), 40
    how = {**inputs, "max_new_tokens": new, "do_sample": False, "cache_implementation": "static"}
    wanted = model.generate(**how, disable_compile=True)
    config = fxopt.compile_config(options={"host": "eager", "replay": "always"})
    for _ in range(3):
        assert torch.equal(model.generate(**how, compile_config=config), wanted)
    assert sum(each.replays for each in replays) >= 3 * new - 6 * (1 + sum(len(each) for each in replays))


@pytest.mark.slow
@pytest.mark.parametrize("how", [{"num_beams": 2}, {"prompt_lookup_num_tokens": 2}])
@pytest.mark.usefixtures("recorder")
def test_caches_that_are_cropped_and_reordered(how: dict[str, Any]) -> None:
    model = llama()
    wanted = generated(model, prompt(1), 30, **how)
    compiled = compile_fxopt(model, replay="always")
    for _ in range(2):
        assert torch.equal(generated(compiled, prompt(1), 30, **how), wanted)


@pytest.mark.slow
@pytest.mark.usefixtures("little_room")
def test_interleaved_requests_and_copies(replays: list[Replay]) -> None:
    """Several caches in turns, one of them copied, one cropped, one shared; user code keeps old keys."""
    model = llama()
    compiled = compile_fxopt(model, replay="always")
    ours, theirs = ([DynamicCache() for _ in range(3)] for _ in range(2))
    kept: list[tuple[torch.Tensor, torch.Tensor]] = []
    with torch.no_grad():
        for number in range(40):
            for a, b in zip(ours, theirs, strict=True):
                ids = prompt(1, 5 if number == 0 else 1, seed=number)
                got = compiled(ids, past_key_values=a).logits
                torch.testing.assert_close(got, model(ids, past_key_values=b).logits)
            if number == 12:
                kept.append((ours[0].layers[0].keys, ours[0].layers[0].keys.clone()))
            if number == 20:
                for caches in (ours, theirs):
                    caches[1].crop(-8)
            if number == 25:
                ours[2].layers[0].keys[:, :, -1] = theirs[2].layers[0].keys[:, :, -1] = 0.5
    assert all(torch.equal(a, b) for a, b in kept)
    assert sum(each.replays for each in replays) > 60


def test_what_cannot_be_recorded(recorder: FakeRecorder) -> None:
    recorder.fault = RuntimeError("operation not permitted when stream is capturing")
    model = llama()
    with all_handled() as records:
        got = generated(compile_fxopt(model, replay="always"), prompt(1), 20)
    assert torch.equal(got, generated(model, prompt(1), 20))
    assert any("not permitted when stream" in reason for reason in reasons(records, Status.ILLEGAL))
