"""`fxopt.warmup`: behind it, requests of the kinds it was told compile nothing."""

from __future__ import annotations

import warnings
from typing import Any

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM, MistralConfig, MistralForCausalLM

import fxopt
from fxopt.errors import CannotGenerate, OptionValueError
from fxopt.report.record import collect
from support.compiled import compile_fxopt


def model() -> LlamaForCausalLM:
    config = LlamaConfig(
        vocab_size=61, hidden_size=24, intermediate_size=40, num_hidden_layers=1, num_attention_heads=4,
        num_key_value_heads=2, pad_token_id=0, eos_token_id=None, bos_token_id=1,
    )  # fmt: skip
    return LlamaForCausalLM(config).eval()


def request(compiled: Any, size: int, length: int, pad: bool = False) -> None:
    ids = torch.randint(2, 61, (size, length))
    mask = torch.ones_like(ids)
    if pad:
        mask[-1, :3] = 0
    compiled.generate(ids, attention_mask=mask, max_new_tokens=9, min_new_tokens=9, do_sample=False)


def test_requests_behind_it_compile_nothing() -> None:
    torch.compiler.reset()
    compiled = compile_fxopt(model())
    made = fxopt.warmup(compiled, batch_sizes=(1, 3), max_length=40)
    assert made > 0
    with collect() as records:
        for length in (7, 11, 23):
            request(compiled, 1, length)
            request(compiled, 3, length)
            request(compiled, 3, length, pad=True)
    assert not records, [record.location for record in records]
    assert fxopt.warmup(compiled, batch_sizes=(1, 3), max_length=40) == 0


def test_prompts_shorter_than_a_window_compile_nothing() -> None:
    torch.compiler.reset()
    config = MistralConfig(
        vocab_size=61, hidden_size=24, intermediate_size=40, num_hidden_layers=1, num_attention_heads=4,
        num_key_value_heads=2, pad_token_id=0, eos_token_id=None, bos_token_id=1, sliding_window=14,
    )  # fmt: skip
    compiled = compile_fxopt(MistralForCausalLM(config).eval())
    fxopt.warmup(compiled, max_length=40)
    with collect() as records:
        for length in (5, 9, 20):
            request(compiled, 1, length)
    assert not records, [record.location for record in records]


@pytest.mark.parametrize(
    "wrong",
    [
        {"batch_sizes": ()},
        {"batch_sizes": (0,)},
        {"batch_sizes": (1.5,)},
        {"batch_sizes": 0},
        {"max_length": 3},
    ],
)
def test_wrong_arguments(wrong: dict[str, Any]) -> None:
    with pytest.raises(OptionValueError):
        fxopt.warmup(model(), **wrong)


def test_a_model_without_generate() -> None:
    with pytest.raises(CannotGenerate):
        fxopt.warmup(torch.nn.Linear(2, 2))


@pytest.mark.parametrize("compiled", [lambda m: m, lambda m: torch.compile(m, backend="eager")])
def test_a_model_that_is_not_compiled_with_fxopt(compiled: Any) -> None:
    with pytest.warns(UserWarning, match="is not compiled with fxopt"):
        assert fxopt.warmup(compiled(model()), batch_sizes=1, max_length=16) == 0


def test_no_warning_where_all_is_compiled_already() -> None:
    plain = model()
    plain.compile(backend="fxopt", options={"host": "eager", "strict": True})
    assert fxopt.warmup(plain, batch_sizes=1, max_length=16) > 0
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message="fxopt")
        assert fxopt.warmup(plain, batch_sizes=1, max_length=16) == 0
