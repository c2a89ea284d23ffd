"""How many graphs `generate` needs: few for a text, none while it grows, and as many as there are requests of
other kinds."""

from __future__ import annotations

import copy
from contextlib import nullcontext
from typing import Any

import pytest
import torch
from generation.test_growing_cache import SMALL, generated, llama, prompt
from torch._dynamo.utils import counters
from transformers import (
    DynamicCache,
    Gemma2Config,
    Gemma2ForCausalLM,
    Gemma3ForCausalLM,
    Gemma3TextConfig,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
)
from transformers.cache_utils import DynamicSlidingWindowLayer

from fxopt.integrations.window_layers import WindowLayer
from fxopt.report.record import collect
from support.compiled import all_handled, compile_fxopt


@pytest.fixture(autouse=True)
def _afresh() -> None:
    torch.compiler.reset()


def test_one_graph_for_the_prompt_and_one_for_all_further_tokens() -> None:
    compiled, graphs = compile_fxopt(llama()), []
    with all_handled() as records:
        for length in (9, 20, 33, 12):
            generated(compiled, prompt(1, length), 20)
            graphs.append(len(records))
    assert graphs == [2, 3, 3, 3]


SLIDING: dict[str, Any] = {"sliding_window": 12}
MIXED = {**SLIDING, "head_dim": 6, "layer_types": ["sliding_attention", "full_attention"]}


def mistral() -> Any:
    return MistralForCausalLM(MistralConfig(**SMALL, **SLIDING))


def gemma2() -> Any:
    """Its masks are tensors, also where they exclude nothing."""
    return Gemma2ForCausalLM(Gemma2Config(**SMALL, **MIXED, attn_implementation="eager"))


def gemma3() -> Any:
    return Gemma3ForCausalLM(Gemma3TextConfig(**SMALL, **MIXED))


# Graphs after prompts of 5, 9, 20 and 14 tokens, each of which writes 20.
WINDOWS = [(mistral, [3, 4, 5, 5]), (gemma2, [2, 3, 3, 3]), (gemma3, [3, 4, 5, 5])]


@pytest.mark.parametrize(("build", "wanted"), WINDOWS)
def test_a_window_that_fills_is_one_step_more_where_masks_come_with_it(build: Any, wanted: list[int]) -> None:
    torch.manual_seed(0)
    model, graphs = build().eval(), []
    twin, compiled = copy.deepcopy(model), compile_fxopt(model)
    with all_handled() as records:
        for length in (5, 9, 20, 14):
            ids = prompt(1, length)
            assert torch.equal(generated(compiled, ids, 20), generated(twin, ids, 20))
            graphs.append(len(records))
    assert graphs == wanted


@pytest.mark.parametrize("build", [mistral, gemma3])
def test_padded_prompts_need_no_graph_for_a_third_length(build: Any) -> None:
    """And one for prompts or steps behind which padding is no longer in the window: transformers crops it."""
    torch.manual_seed(0)
    model = build().eval()
    twin, compiled = copy.deepcopy(model), compile_fxopt(model)
    graphs = []
    with all_handled() as records:
        for length in (5, 9, 20):
            how = {"input_ids": prompt(2, length), "max_new_tokens": 20, "do_sample": False}
            how["attention_mask"] = (torch.arange(length) >= torch.tensor([[0], [2]])).long()
            assert torch.equal(compiled.generate(**how), twin.generate(**how))
            graphs.append(len(records))
    assert graphs == [3, 4, 4]


class Stop(Exception):  # noqa: N818 - what a user raises
    pass


@pytest.mark.parametrize("fails", [False, True])
def test_the_layers_of_a_cache_are_transformers_own_again(fails: bool) -> None:
    model = mistral().eval()
    cache, kinds = DynamicCache(config=model.config), set()

    def look(ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        kinds.update(map(type, cache.layers))
        if fails:
            raise Stop
        return scores

    with pytest.raises(Stop) if fails else nullcontext():
        generated(compile_fxopt(model), prompt(1, 5), 4, past_key_values=cache, logits_processor=[look])
    assert kinds == {WindowLayer}
    assert {type(layer) for layer in cache.layers} == {DynamicSlidingWindowLayer}


def test_layers_stay_where_steps_are_replayed() -> None:
    """A step over a full window has all of its memory, at sizes that are known."""
    model, kinds = mistral().eval(), set()
    cache = DynamicCache(config=model.config)

    def look(ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        kinds.update(map(type, cache.layers))
        return scores

    compiled = compile_fxopt(model, replay="always")
    generated(compiled, prompt(1, 5), 4, past_key_values=cache, logits_processor=[look])
    assert kinds == {DynamicSlidingWindowLayer}


def test_a_window_that_is_full_from_the_prompt_on_needs_no_step_of_its_own() -> None:
    """The step that a shorter prompt came to at last fits."""
    config = MistralConfig(**{**SMALL, "num_hidden_layers": 1}, sliding_window=6)
    compiled = compile_fxopt(MistralForCausalLM(config).eval())
    with all_handled() as records:
        generated(compiled, prompt(1, 3), 8)
        before = len(records)
        generated(compiled, prompt(1, 12), 4)
    assert len(records) == before + 1, "the prompt alone"


class Kinds(torch.nn.Module):
    """A model that Dynamo compiles for each kind of request."""

    def forward(self, x: torch.Tensor, kind: str) -> torch.Tensor:
        return x.sin() + len(kind)

    def generate(self, x: torch.Tensor, kinds: range) -> torch.Tensor:
        for number in kinds:
            x = self(x, "x" * number)
        return x


def test_requests_of_many_kinds_stay_compiled() -> None:
    model, x = Kinds(), torch.randn(3)
    compiled = compile_fxopt(model)
    with all_handled() as records:
        for kinds in (range(6), range(6, 12)):
            assert torch.equal(compiled.generate(x, kinds), model.generate(x, kinds))
    assert len(records) == 12
    assert torch._dynamo.config.recompile_limit < 12


def test_the_limit_that_a_user_sets_is_kept() -> None:
    model, x = Kinds(), torch.randn(3)
    with torch._dynamo.config.patch(recompile_limit=3), all_handled() as records:
        compile_fxopt(model).generate(x, range(6))
    assert len(records) == 3


def one_layer() -> LlamaForCausalLM:
    torch.manual_seed(0)
    shapes = {**SMALL, "num_hidden_layers": 1, "max_position_embeddings": 8192}
    return LlamaForCausalLM(LlamaConfig(**shapes)).eval()


def filled(model: Any, length: int) -> DynamicCache:
    cache, config = DynamicCache(), model.config
    size = (1, config.num_key_value_heads, length, config.head_dim)
    cache.update(torch.randn(size), torch.randn(size), 0)
    return cache


def test_a_step_is_the_same_for_all_lengths() -> None:
    model = one_layer()
    compiled, token = compile_fxopt(model), torch.ones(1, 1, dtype=torch.int64)
    graphs = []
    with torch.no_grad(), collect() as records:
        for length in (16, 18, 2, 63, 64, 300, 1023, 1025, 4096):
            cache = filled(model, length)
            for _ in range(2):  # as user code made it, and in a buffer
                compiled(token, past_key_values=cache)
            graphs.append(len(records))
    assert graphs[1:] == [graphs[1]] * 8
    assert graphs[1] <= 4


@pytest.mark.slow
def test_nothing_is_compiled_while_a_text_grows_to_4096_tokens() -> None:
    """Neither by Dynamo nor, below it, by Inductor."""
    model = one_layer()
    compiled = compile_fxopt(model, host="inductor")
    cache, token = DynamicCache(), torch.ones(1, 1, dtype=torch.int64)

    def compilations() -> tuple[int, int]:
        return counters["stats"]["unique_graphs"], counters["aot_autograd"]["total"]

    with torch.no_grad():
        compiled(prompt(1, 16), past_key_values=cache)
        for _ in range(3):
            compiled(token, past_key_values=cache)
        before = compilations()
        while cache.get_seq_length() < 4096:
            compiled(token, past_key_values=cache)
    assert min(before) > 0
    assert compilations() == before
