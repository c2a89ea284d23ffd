"""`generate` over static caches with sliding layers gives the tokens of the uncompiled model, long after they
are full."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from generation.test_generate import prompts
from transformers import Gemma2Config, Gemma2ForCausalLM, Gemma3ForCausalLM, Gemma3TextConfig

import fxopt
from fxopt.ir.ops import attention_providers
from fxopt.passes import shift_windows
from support.compiled import all_handled

SHAPES: dict[str, Any] = {
    "vocab_size": 61, "hidden_size": 24, "intermediate_size": 40, "num_hidden_layers": 2,
    "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 6, "sliding_window": 16,
    "layer_types": ["sliding_attention", "full_attention"], "pad_token_id": 0, "bos_token_id": 1,
    "eos_token_id": None, "initializer_range": 0.5, "tie_word_embeddings": False,
}  # fmt: skip


def hybrid() -> torch.nn.Module:
    return Gemma3ForCausalLM(Gemma3TextConfig(**SHAPES)).eval()


def hybrid_with_masks_of_numbers() -> torch.nn.Module:
    """Its attention is spelled out, with a soft cap."""
    shapes = {**SHAPES, "sliding_window": 8}  # full from the prompt on
    return Gemma2ForCausalLM(Gemma2Config(**shapes, attn_implementation="eager")).eval()


@pytest.mark.parametrize(("build", "new"), [(hybrid, 200), (hybrid_with_masks_of_numbers, 60)])
def test_tokens(build: Any, new: int, monkeypatch: pytest.MonkeyPatch) -> None:
    for module, least in (
        (attention_providers, "DECODE_NUMBERS"),
        (attention_providers, "DENSE_NUMBERS"),
        (shift_windows, "LEAST_BYTES"),
    ):
        monkeypatch.setattr(module, least, 0)
    model = build()
    how = {**prompts(), "do_sample": False, "cache_implementation": "static", "max_new_tokens": new}
    wanted = model.generate(**how, disable_compile=True)
    assert len(wanted[0].unique()) > 10
    config = fxopt.compile_config(options={"host": "eager"})
    # Methods of all models share the code of transformers' decorators, and with it Dynamo's limit.
    with torch._dynamo.config.patch(recompile_limit=64), all_handled() as found:
        assert torch.equal(model.generate(**how, compile_config=config), wanted)
    chosen = {provider for record in found for op, provider, _ in record.providers if op == "attention"}
    assert chosen == {"decode"}
    moved = [each for record in found for each in record.evidence if each.rewrite == "shift-windows"]
    assert moved
    assert {each.status for each in moved} == {"applied"}
