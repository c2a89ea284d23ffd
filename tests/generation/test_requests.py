"""What users do between calls of a compiled `generate`, and within them: the tokens stay the model's own."""

from __future__ import annotations

import copy
import gc
import threading
import weakref
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from generation.test_generate import llama, prompts
from transformers import (
    DynamicCache,
    Gemma2Config,
    Gemma2ForCausalLM,
    GptOssConfig,
    GptOssForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    TextIteratorStreamer,
)

from fxopt.runtime.decode_path import DecodePath
from support.cache_fuzz import saved

NEW = 16
SLOW = pytest.mark.slow  # many graphs


@pytest.fixture
def pair() -> tuple[Any, Any]:
    """A model, and a twin of it compiled."""
    torch._dynamo.reset()
    model = llama()
    return copy.deepcopy(model), torch.compile(model, backend="fxopt", options={"host": "eager"})


def request() -> dict[str, Any]:
    return {"input_ids": prompts(1)["input_ids"].clamp(min=2), "max_new_tokens": NEW, "do_sample": False}


def same(pair: tuple[Any, Any], **how: Any) -> bool:
    """Equal tokens; whether some of the steps went past the guards."""
    before = DecodePath.taken
    how = request() | how
    wanted, found = (each.generate(**how) for each in pair)
    assert torch.equal(found, wanted)
    return DecodePath.taken > before


class Stop(Exception):  # noqa: N818 - what a user raises
    pass


@pytest.mark.parametrize("error", [KeyboardInterrupt, Stop])
def test_an_exception_in_the_middle(pair: Any, error: type[BaseException]) -> None:
    """Between two steps: by a processor of the logits, or by the user who does not want to wait."""
    assert same(pair)
    cache = DynamicCache(config=pair[0].config)

    def stops(ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        if ids.shape[1] == request()["input_ids"].shape[1] + 8:
            raise error
        return scores

    with pytest.raises(error):
        pair[1].generate(**request(), logits_processor=[stops], past_key_values=cache)
    assert same(pair)
    ids = torch.cat([request()["input_ids"], torch.full((1, 9), 5)], 1)
    assert same(pair, input_ids=ids)


def test_an_interrupt_in_a_step(pair: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """The cache is what it was before the step, so that the text can be gone on with."""
    assert same(pair)
    calls = 0
    cache = DynamicCache(config=pair[0].config)
    take = DecodePath.__call__

    def interrupted(self: DecodePath, *args: Any, **kwargs: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls == 10:
            assert self._step is not None
            whole = self._step.call.compiled

            def broken(*inputs: Any) -> Any:
                whole(*inputs)
                raise KeyboardInterrupt

            with monkeypatch.context() as patch:
                patch.setattr(self._step.call, "compiled", broken)
                return take(self, *args, **kwargs)
        return take(self, *args, **kwargs)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(DecodePath, "__call__", interrupted)
        pair[1].generate(**request(), past_key_values=cache)
    length = cache.get_seq_length()
    twin = DynamicCache(config=pair[0].config)
    pair[0].generate(**request() | {"max_new_tokens": 9}, past_key_values=twin)
    assert length == twin.get_seq_length()
    for mine, other in zip(cache.layers, twin.layers, strict=True):
        torch.testing.assert_close(mine.keys, other.keys)
    assert same(pair)


def test_another_dtype(pair: Any) -> None:
    assert same(pair)
    for each in pair:
        each.bfloat16()
    assert pair[1].dtype == torch.bfloat16
    assert same(pair)
    for each in pair:
        each.float()
    assert same(pair)


def test_training_in_between(pair: Any) -> None:
    assert same(pair)
    for each in pair:
        each.train()
    loss = pair[1](**prompts(1), labels=prompts(1)["input_ids"]).loss
    loss.backward()
    twin = pair[0](**prompts(1), labels=prompts(1)["input_ids"]).loss
    twin.backward()
    for each in pair:
        with torch.no_grad():
            for parameter in each.parameters():
                parameter.sub_(0.05 * parameter.grad.sign())
        each.zero_grad()
        each.eval()
    assert same(pair)


def test_weights_that_are_replaced(pair: Any) -> None:
    assert same(pair)
    state = {name: value.flip(0) for name, value in pair[0].state_dict().items()}
    for each in (pair[0], pair[1]._orig_mod):
        each.load_state_dict(state, assign=True)
    assert same(pair)
    for each in (pair[0], pair[1]._orig_mod):
        each.lm_head.weight = each.model.embed_tokens.weight
    assert same(pair)


@SLOW
def test_adapters_by_turns(pair: Any) -> None:
    """peft puts modules of its own in the place of the model's."""
    peft = pytest.importorskip("peft")
    models = []
    for each in (pair[0], pair[1]._orig_mod):
        torch.manual_seed(5)
        how = {"r": 2, "target_modules": ["q_proj", "v_proj"], "init_lora_weights": False}
        model = peft.get_peft_model(each, peft.LoraConfig(**how), adapter_name="one")
        model.add_adapter("two", peft.LoraConfig(**how))
        models.append(model.eval())
    assert same(pair)
    for name in ("two", "one", "two"):
        for model in models:
            model.set_adapter(name)
        assert same(pair)
    with models[0].disable_adapter(), models[1].disable_adapter():
        assert same(pair)


def test_a_copy_of_the_model(pair: Any) -> None:
    assert same(pair)
    other = copy.deepcopy(pair[1]._orig_mod)
    other.lm_head.weight.data.neg_()
    twin = copy.deepcopy(other)
    compiled = torch.compile(other, backend="fxopt", options={"host": "eager"})
    assert same((twin, compiled))
    assert same(pair)


def test_memory_is_freed() -> None:
    torch._dynamo.reset()
    compiled = torch.compile(llama(), backend="fxopt", options={"host": "eager"})
    cache = DynamicCache(config=compiled.config)
    compiled.generate(**request(), past_key_values=cache)
    held = [weakref.ref(each) for each in (compiled._orig_mod, cache, cache.layers[0].keys.untyped_storage())]
    del cache
    gc.collect()
    assert held[1]() is None
    assert held[2]() is None
    del compiled
    torch._dynamo.reset()
    gc.collect()
    assert held[0]() is None


def test_a_cache_from_request_to_request(pair: Any) -> None:
    """Goes on with what was written, also from a file."""
    caches = [DynamicCache(config=pair[0].config) for _ in range(2)]
    ids = request()["input_ids"]
    for _ in range(3):
        found = [
            each.generate(**request() | {"input_ids": ids}, past_key_values=cache)
            for each, cache in zip(pair, caches, strict=True)
        ]
        assert torch.equal(*found)
        ids = torch.cat([found[0], torch.full((1, 2), 7)], 1)
        caches = [saved(cache) for cache in caches]


class _Words:
    """As much of a tokenizer as a streamer needs."""

    def decode(self, ids: Any, **how: Any) -> str:
        return "".join(f" {int(each)}" for each in ids)


def test_streaming(pair: Any) -> None:
    """The text is read in one thread while it is written in another."""
    assert same(pair)
    texts = []
    for each in pair:
        streamer = TextIteratorStreamer(_Words(), skip_prompt=True)
        how = request() | {"streamer": streamer}
        writing = threading.Thread(target=each.generate, kwargs=how)
        writing.start()
        texts.append("".join(streamer))
        writing.join()
    assert texts[0] == texts[1]
    assert len(texts[0].split()) == NEW


def _mistral() -> Any:
    return MistralForCausalLM(MistralConfig(**SHAPES))


def _gemma2() -> Any:
    return Gemma2ForCausalLM(Gemma2Config(**SHAPES | MIXED))


def _gpt_oss() -> Any:
    return GptOssForCausalLM(GptOssConfig(**SHAPES | MIXED, num_local_experts=2, num_experts_per_tok=1))


SHAPES: dict[str, Any] = {
    "vocab_size": 61, "hidden_size": 24, "intermediate_size": 40, "num_hidden_layers": 2, "head_dim": 6,
    "num_attention_heads": 4, "num_key_value_heads": 2, "sliding_window": 12, "pad_token_id": 0,
    "bos_token_id": 1, "eos_token_id": None, "initializer_range": 0.5, "tie_word_embeddings": False,
}  # fmt: skip
MIXED = {"layer_types": ["sliding_attention", "full_attention"]}


@pytest.mark.parametrize(
    "build", [_mistral, pytest.param(_gemma2, marks=SLOW), pytest.param(_gpt_oss, marks=SLOW)]
)
def test_windows_past_the_guards(build: Callable[[], Any]) -> None:
    torch._dynamo.reset()
    torch.manual_seed(0)
    model = build().eval()
    compiled = torch.compile(copy.deepcopy(model), backend="fxopt", options={"host": "eager"})
    for how in (request(), prompts()):
        before = DecodePath.taken
        assert same((model, compiled), **how | {"max_new_tokens": 40})
        assert DecodePath.taken - before > 14


@pytest.fixture(autouse=True)
def fresh_compiler() -> Iterator[None]:
    """Each test says itself when it begins anew."""
    yield
