"""How many graphs `generate` needs: few for a text, none while it grows, and as many as there are requests of
other kinds."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from generation.test_growing_cache import SMALL, generated, llama, prompt
from torch._dynamo.utils import counters
from transformers import (
    DynamicCache,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
)

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
