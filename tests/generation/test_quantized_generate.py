"""`generate` with quantized linear layers: tokens are those of the rounded model, over any cache."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

import fxopt
from fxopt.report.record import collect
from support.compiled import compile_fxopt


def llama() -> LlamaForCausalLM:
    torch.manual_seed(0)
    sizes = {"hidden_size": 384, "intermediate_size": 768, "vocab_size": 320, "num_hidden_layers": 2}
    config = LlamaConfig(
        **sizes, num_attention_heads=6, num_key_value_heads=3, pad_token_id=0, eos_token_id=319
    )
    return LlamaForCausalLM(config).eval()


def tokens(model: Any, **more: Any) -> torch.Tensor:
    prompt = torch.arange(1, 15).view(2, 7)
    given = {"attention_mask": torch.ones_like(prompt), "max_new_tokens": 9, "do_sample": False}
    with torch.no_grad():
        found: torch.Tensor = model.generate(prompt, **given, **more)
    return found


@pytest.mark.parametrize("more", [{}, {"cache_implementation": "static"}], ids=["growing", "static"])
@pytest.mark.parametrize("way", ["options", "prepared"])
def test_tokens_are_those_of_the_rounded_model(way: str, more: dict[str, Any]) -> None:
    model = llama()
    prepared = fxopt.prepare(copy.deepcopy(model), "int4")
    wanted = tokens(prepared)
    assert not torch.equal(wanted, tokens(model))
    with collect() as records:
        asked = way == "options"
        compiled = compile_fxopt(model, quantize="int4") if asked else compile_fxopt(prepared)
        assert torch.equal(tokens(compiled, **more), wanted)
        assert torch.equal(tokens(compiled, **more), wanted)
    # Keys and values of three heads are too small.
    counts = {sum(note.is_quantized for note in record.linears) for record in records}
    assert counts - {0} == {10}


def test_a_merge_between_two_calls_is_noticed() -> None:
    model = llama()
    compiled = compile_fxopt(model, quantize="int4")
    tokens(compiled)
    torch.manual_seed(3)
    for layer in model.model.layers:
        weight = layer.mlp.down_proj.weight
        weight.data += torch.randn_like(weight) * 0.1
    wanted = tokens(fxopt.prepare(copy.deepcopy(model), "int4"))
    assert torch.equal(tokens(compiled), wanted)
