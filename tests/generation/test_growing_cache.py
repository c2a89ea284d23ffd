"""`generate` with transformers' `DynamicCache`: rows are appended in place, and tokens are eager's."""

from __future__ import annotations

import functools
from typing import Any

import pytest
import torch
from transformers import (
    DynamicCache,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
)

from fxopt.ir.contract import Status
from fxopt.runtime.kv_state import STATE
from support.compiled import all_handled, compile_fxopt
from support.runs import at_once

SMALL: dict[str, Any] = {
    "vocab_size": 61, "hidden_size": 24, "intermediate_size": 40, "num_hidden_layers": 2,
    "num_attention_heads": 4, "num_key_value_heads": 2, "pad_token_id": 0, "eos_token_id": None,
    "bos_token_id": 1, "initializer_range": 0.5,
}  # fmt: skip


def llama() -> LlamaForCausalLM:
    torch.manual_seed(0)
    return LlamaForCausalLM(LlamaConfig(**SMALL)).eval()


def mistral() -> MistralForCausalLM:
    torch.manual_seed(0)
    return MistralForCausalLM(MistralConfig(**SMALL, sliding_window=16)).eval()


def prompt(rows: int = 2, length: int = 9, seed: int = 3) -> torch.Tensor:
    return torch.randint(2, 61, (rows, length), generator=torch.Generator().manual_seed(seed))


def generated(model: Any, ids: torch.Tensor, new: int, **how: Any) -> torch.Tensor:
    torch.manual_seed(11)
    mask = torch.ones_like(ids)
    tokens: torch.Tensor = model.generate(
        ids, attention_mask=mask, max_new_tokens=new, min_new_tokens=new, do_sample=False, **how
    )
    return tokens


@pytest.fixture(autouse=True)
def _afresh() -> None:
    torch.compiler.reset()


def test_rows_are_written_in_place() -> None:
    model, new = llama(), 200
    want = generated(model, prompt(1), new)
    compiled, in_place, copied = compile_fxopt(model), STATE.in_place, STATE.copied
    with all_handled() as records:
        assert torch.equal(generated(compiled, prompt(1), new), want)
        assert len(records) <= 3
        assert torch.equal(generated(compiled, prompt(1, 20), new), generated(model, prompt(1, 20), new))
        assert len(records) <= 4, "another length of the prompt"
    entries = [entry for record in records for entry in record.evidence if entry.rewrite == "append-kv-cache"]
    assert len(entries) == 4 * len(records)
    assert all(entry.status is Status.APPLIED for entry in entries)
    # Copied are rows in the steps that are compiled, as the compiler holds the inputs, and of full buffers.
    assert STATE.copied - copied <= 4 * 7
    assert STATE.in_place - in_place >= 0.96 * 4 * 2 * (new - 1)


def test_a_sliding_window() -> None:
    model = mistral()
    in_place, copied = STATE.in_place, STATE.copied
    with all_handled():
        assert torch.equal(generated(compile_fxopt(model), prompt(1), 120), generated(model, prompt(1), 120))
    assert STATE.in_place - in_place > 3 * (STATE.copied - copied)


def test_rewinding_in_assisted_decoding_is_in_place() -> None:
    model, assistant = llama(), llama()
    assistant.model.layers = assistant.model.layers[:1]
    assistant.config.num_hidden_layers = 1
    want = generated(model, prompt(1), 60, assistant_model=assistant)
    model.compile(backend="fxopt", options={"host": "eager", "strict": True})
    in_place, copied = STATE.in_place, STATE.copied
    assert torch.equal(generated(model, prompt(1), 60, assistant_model=assistant), want)
    assert STATE.in_place - in_place > STATE.copied - copied


def test_several_requests_in_turn() -> None:
    """Caches of one compiled model do not touch each other."""
    model = llama()
    compiled = compile_fxopt(model)

    def continued(called: Any) -> list[torch.Tensor]:
        caches = [DynamicCache() for _ in range(3)]
        logits = []
        with torch.no_grad():
            for number, cache in enumerate(caches):
                called(prompt(1, 5 + number, number), past_key_values=cache)
            for step in range(12):
                for number, cache in enumerate(caches):
                    token = torch.full((1, 1), (7 * step + number) % 61)
                    logits.append(called(token, past_key_values=cache).logits)
        return logits

    for got, want in zip(continued(compiled), continued(model), strict=True):
        torch.testing.assert_close(got, want)


def test_threads() -> None:
    model = llama()
    want = [generated(model, prompt(1, 6, seed), 30) for seed in range(3)]
    compiled = compile_fxopt(model)
    generated(compiled, prompt(1, 6), 5)
    got = at_once([functools.partial(generated, compiled, prompt(1, 6, seed), 30) for seed in range(3)])
    assert all(torch.equal(mine, eager) for mine, eager in zip(got, want, strict=True))
