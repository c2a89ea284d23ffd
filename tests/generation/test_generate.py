"""`generate` on a compiled model gives the tokens of the uncompiled one."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from transformers import (
    CompileConfig,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    T5Config,
    T5ForConditionalGeneration,
)

import fxopt.integrations.generate as generate_hook
from support.compiled import all_handled

EAGER = {"host": "eager"}
NEW = 7


def llama() -> torch.nn.Module:
    config = LlamaConfig(
        vocab_size=61,
        hidden_size=24,
        intermediate_size=40,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=128,
        pad_token_id=0,
        eos_token_id=None,
        bos_token_id=1,
        initializer_range=0.5,
    )
    return LlamaForCausalLM(config).eval()


def gpt2() -> torch.nn.Module:
    config = GPT2Config(
        vocab_size=61, n_embd=24, n_layer=2, n_head=4, n_positions=128, pad_token_id=0, bos_token_id=1,
        eos_token_id=None, initializer_range=0.5,
    )  # fmt: skip
    return GPT2LMHeadModel(config).eval()


def t5() -> torch.nn.Module:
    config = T5Config(
        vocab_size=61, d_model=24, d_kv=6, d_ff=40, num_layers=2, num_heads=4, pad_token_id=0,
        decoder_start_token_id=0, eos_token_id=None, initializer_factor=3.0,
    )  # fmt: skip
    return T5ForConditionalGeneration(config).eval()


def prompts(batch: int = 2) -> dict[str, torch.Tensor]:
    """A left-padded batch."""
    ids = torch.randint(2, 61, (batch, 9), generator=torch.Generator().manual_seed(3))
    mask = torch.ones_like(ids)
    mask[0, :3] = 0
    return {"input_ids": ids.masked_fill(mask == 0, 0), "attention_mask": mask}


STRATEGIES: dict[str, dict[str, Any]] = {
    "greedy": {"do_sample": False},
    "sampling": {"do_sample": True, "temperature": 0.9, "top_k": 20},
    "beam": {"do_sample": False, "num_beams": 3},
    "beam-sampling": {"do_sample": True, "num_beams": 2},
}


def tokens(model: torch.nn.Module, **how: Any) -> torch.Tensor:
    torch.manual_seed(11)
    return model.generate(max_new_tokens=NEW, min_new_tokens=NEW, **how)  # type: ignore[operator]


@pytest.mark.parametrize("strategy", STRATEGIES)
@pytest.mark.parametrize("build", [llama, gpt2, t5])
def test_dynamic_cache(build: Any, strategy: str) -> None:
    model = build()
    how = {**prompts(), **STRATEGIES[strategy]}
    wanted = tokens(model, **how)
    compiled = copy.deepcopy(model)
    compiled.compile(backend="fxopt", options=EAGER)
    with all_handled() as found:
        assert torch.equal(tokens(compiled, **how), wanted)
    assert found, "nothing was compiled"


def test_dynamic_cache_compiled_forward() -> None:
    model = llama()
    wanted = tokens(model, **prompts(), do_sample=False)
    model.forward = torch.compile(model.forward, backend="fxopt", options=EAGER)
    with all_handled() as found:
        assert torch.equal(tokens(model, **prompts(), do_sample=False), wanted)
    assert found


def test_assisted_decoding() -> None:
    model, draft = llama(), llama()
    how = {"input_ids": prompts(1)["input_ids"], "do_sample": False, "assistant_model": draft}
    wanted = tokens(model, **how)
    compiled = copy.deepcopy(model)
    compiled.compile(backend="fxopt", options=EAGER)
    with all_handled() as found:
        assert torch.equal(tokens(compiled, **how), wanted)
    assert found


def static(**given: Any) -> CompileConfig:
    config = CompileConfig(backend="fxopt", **given)
    config._compile_all_devices = True  # transformers compiles by itself on accelerators only
    return config


@pytest.mark.parametrize("strategy", ["greedy", "sampling"])
def test_static_cache_through_compile_config(strategy: str) -> None:
    model = llama()
    how = {**prompts(), **STRATEGIES[strategy], "cache_implementation": "static"}
    wanted = tokens(model, **how, disable_compile=True)
    config = static(mode=None, options=EAGER)
    with all_handled() as found:
        assert torch.equal(tokens(model, **how, compile_config=config), wanted)
    assert found


def test_static_cache_with_the_default_mode_and_host() -> None:
    """`CompileConfig` defaults to ``mode="reduce-overhead"``; the host is Inductor."""
    model = llama()
    how = {**prompts(), "do_sample": False, "cache_implementation": "static"}
    wanted = tokens(model, **how, disable_compile=True)
    assert CompileConfig().mode == "reduce-overhead"
    with all_handled() as found:
        assert torch.equal(tokens(model, **how, compile_config=static()), wanted)
    assert {record.host for record in found} == {"inductor"}


def test_static_cache_beam_search() -> None:
    """transformers does not compile beam search over a static cache; the tokens stay the same."""
    model = llama()
    how = {**prompts(), "do_sample": False, "num_beams": 2, "cache_implementation": "static"}
    wanted = tokens(model, **how, disable_compile=True)
    assert torch.equal(tokens(model, **how, compile_config=static(mode=None, options=EAGER)), wanted)


def test_options_are_read_once_until_a_reset(monkeypatch: pytest.MonkeyPatch) -> None:
    read: list[Any] = []
    options_of = generate_hook.options_of
    monkeypatch.setattr(generate_hook, "options_of", lambda given: read.append(given) or options_of(given))
    compiled = torch.compile(llama(), backend="fxopt", options=EAGER)
    found = [compiled.generate for _ in range(2)]
    assert len(read) == 1
    torch.compiler.reset()
    found.append(compiled.generate)
    assert len(read) == 2 and all(map(callable, found))
