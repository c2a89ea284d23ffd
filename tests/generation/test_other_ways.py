"""Calls of `generate` within one another, in threads, and under other settings: the tokens of the model."""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from generation.test_generate import llama, prompts
from generation.test_growing_cache import mistral
from transformers import DynamicCache, cache_utils

from fxopt.runtime.decode_path import DecodePath
from support.runs import at_once

NEW = 24
Pair = tuple[Any, Any]


def compiled_twin(model: Any) -> Pair:
    """A model, and a twin of it compiled."""
    return model, torch.compile(copy.deepcopy(model), backend="fxopt", options={"host": "eager"})


@pytest.fixture(scope="module")
def pair() -> Pair:
    torch._dynamo.reset()
    return compiled_twin(llama())


@pytest.fixture(scope="module")
def other(pair: Pair) -> Pair:
    """Of another architecture, whose layers have a window."""
    return compiled_twin(mistral())


@pytest.fixture(autouse=True)
def fresh_compiler() -> Iterator[None]:
    """The compiled models serve this whole file."""
    yield


def prompt(seed: int = 3) -> torch.Tensor:
    return prompts(1)["input_ids"].clamp(min=2).roll(seed, 1)


def tokens(model: Any, ids: torch.Tensor | None = None, **how: Any) -> torch.Tensor:
    ids = prompt() if ids is None else ids
    how = {"max_new_tokens": NEW, "min_new_tokens": NEW, "do_sample": False} | how
    found: torch.Tensor = model.generate(ids, attention_mask=torch.ones_like(ids), **how)
    return found


def same(pair: Pair, **how: Any) -> torch.Tensor:
    wanted = tokens(pair[0], **how)
    assert torch.equal(tokens(pair[1], **how), wanted)
    return wanted


def test_a_call_within_another(pair: Pair, other: Pair) -> None:
    """A processor of the logits asks the same model, or another one; what is known of steps stays apart."""

    def asking(model: Any) -> Callable[..., torch.Tensor]:
        def ask(ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
            if ids.shape[1] % 6:
                return scores
            answer = tokens(model, prompt(int(ids[0, -1])), max_new_tokens=5, min_new_tokens=5)
            return scores.roll(int(answer.sum()), -1)

        return ask

    for asked in (pair, other):
        wanted, found = (
            tokens(model, logits_processor=[asking(another)])
            for model, another in zip(pair, asked, strict=True)
        )
        assert torch.equal(found, wanted)
        assert not torch.equal(wanted, tokens(pair[0]))


def test_two_models_in_threads(pair: Pair, other: Pair) -> None:
    both = (pair, other)
    wanted = [same(each) for each in both]
    before = DecodePath.taken
    found = at_once([functools.partial(tokens, compiled) for _, compiled in both])
    assert all(map(torch.equal, found, wanted))
    assert DecodePath.taken > before


def test_a_draft_that_is_compiled_too(pair: Pair) -> None:
    draft = copy.deepcopy(pair[0])
    draft.model.layers = draft.model.layers[:1]
    draft.config.num_hidden_layers = 1
    wanted = tokens(pair[0], assistant_model=draft)
    assert torch.equal(tokens(pair[1], assistant_model=compiled_twin(draft)[1]), wanted)


def test_two_caches_by_turns_within_a_call(pair: Pair) -> None:
    """Guidance calls the model a second time for each token, with a cache of its own."""
    guided = same(pair, guidance_scale=2.5, negative_prompt_ids=prompt(1)[:, :5])
    assert not torch.equal(guided, tokens(pair[0]))


@pytest.mark.skipif(not hasattr(cache_utils, "Fp8QuantizedLayer"), reason="transformers has no such cache")
def test_transformers_own_quantized_cache(pair: Pair) -> None:
    same(pair, cache_implementation="quantized", cache_config={"backend": "fp8"})


def test_a_cache_of_inference_mode_goes_on_outside(pair: Pair) -> None:
    caches = [DynamicCache(config=pair[0].config) for _ in pair]
    with torch.inference_mode():
        texts = [tokens(each, past_key_values=cache) for each, cache in zip(pair, caches, strict=True)]
    assert torch.equal(*texts)
    again = [
        tokens(each, text, past_key_values=cache)
        for each, text, cache in zip(pair, texts, caches, strict=True)
    ]
    assert torch.equal(*again)


def test_autocast_in_between(pair: Pair) -> None:
    exact = same(pair)
    with torch.autocast("cpu", torch.bfloat16):
        same(pair)
    assert torch.equal(same(pair), exact)


@pytest.mark.slow
def test_adapters_that_are_merged() -> None:
    """Into the weights that the compiled model has, and out of them again."""
    peft = pytest.importorskip("peft")
    torch._dynamo.reset()
    merging = compiled_twin(llama())
    exact = same(merging)
    adapted = []
    for each in (merging[0], merging[1]._orig_mod):
        torch.manual_seed(5)
        how = {"r": 2, "target_modules": ["q_proj", "v_proj"], "init_lora_weights": False}
        adapted.append(peft.get_peft_model(each, peft.LoraConfig(**how)).eval())
    with_adapter = same(merging)
    assert not torch.equal(with_adapter, exact)
    for change in ("merge_adapter", "unmerge_adapter", "merge_and_unload"):
        for each in adapted:
            getattr(each, change)()
        assert torch.equal(same(merging), with_adapter)
