"""Caches of 8 bits an entry: what they hold, how much of it, and the tokens that eager gives with them."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from transformers import (
    DynamicCache,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    Qwen2Config,
    Qwen2ForCausalLM,
    T5Config,
    T5ForConditionalGeneration,
)

import fxopt
from fxopt.errors import OptionValueError
from fxopt.integrations.quantized_cache import LAYERS, Int8Layer
from fxopt.ir.contract import Status
from fxopt.ir.ops import quantized_attention
from fxopt.ir.row_codes import dequantized, quantized
from fxopt.runtime.kv_state import MOST, STATE
from support.compiled import all_handled, compile_fxopt

SMALL: dict[str, Any] = {
    "vocab_size": 61, "hidden_size": 32, "intermediate_size": 40, "num_hidden_layers": 1,
    "num_attention_heads": 4, "num_key_value_heads": 2, "pad_token_id": 0, "eos_token_id": None,
    "bos_token_id": 1, "initializer_range": 0.5,
}  # fmt: skip


def llama(seed: int = 0) -> LlamaForCausalLM:
    torch.manual_seed(seed)
    return LlamaForCausalLM(LlamaConfig(**SMALL)).eval()


def padded() -> dict[str, torch.Tensor]:
    """A left-padded batch."""
    ids = torch.randint(2, 61, (2, 9), generator=torch.Generator().manual_seed(3))
    mask = torch.ones_like(ids)
    mask[0, :4] = 0
    return {"input_ids": ids.masked_fill(mask == 0, 0), "attention_mask": mask}


def generated(model: Any, new: int = 14, *, alone: bool = False, **how: Any) -> Any:
    torch.manual_seed(11)
    given = {name: each[1:] if alone else each for name, each in padded().items()}
    how = {"do_sample": False, "max_new_tokens": new, "min_new_tokens": new, **how}
    return model.generate(**given, **how)


@pytest.fixture(autouse=True)
def _afresh(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.compiler.reset()
    monkeypatch.setattr(quantized_attention, "ROW_NUMBERS", 0)


@pytest.mark.parametrize("dtype", list(LAYERS))
def test_rows_are_half_a_step_away_at_most(dtype: str) -> None:
    stored = LAYERS[dtype].stored
    states = torch.randn(2, 3, 50, 16) * torch.logspace(-6, 6, 50)[:, None]
    states[0, 0, 0] = 0.0
    rows, scales = quantized(states, stored)
    assert (rows.dtype, scales.dtype, scales.shape) == (stored, torch.float32, (2, 3, 50, 1))
    error = (dequantized(rows, scales, torch.float64) - states.double()).abs()
    # float8_e4m3fn has three bits of fraction, and 2**-9 for its smallest number
    step = scales / 2 if dtype == "int8" else torch.maximum(states.abs() * 2**-4, scales * 2**-10)
    assert (error <= step * 1.0001).all()
    assert not dequantized(rows, scales, torch.float32)[0, 0, 0].any()


@pytest.mark.parametrize("dtype", list(LAYERS))
def test_half_of_the_memory(dtype: str) -> None:
    cache, wide = fxopt.QuantizedCache(dtype=dtype), DynamicCache()
    heads, width = 2, 64
    for rows in (9, 1, 1):
        new = torch.randn(3, heads, rows, width).bfloat16()
        assert all(each.dtype is torch.bfloat16 for each in cache.update(new, new, 0))
        wide.update(new, new, 0)
    # a byte for each entry, a float32 for each row
    assert held(cache) == 2 * 3 * heads * 11 * (width + 4)
    assert held(wide) == 2 * 3 * heads * 11 * width * 2


def held(cache: DynamicCache) -> int:
    """Bytes that a cache holds."""
    values = [value for layer in cache.layers for value in vars(layer).values()]
    return sum(value.nbytes for value in values if isinstance(value, torch.Tensor))


STRATEGIES: dict[str, dict[str, Any]] = {
    "greedy": {},
    "beam": {"num_beams": 3},
    "lookup": {"prompt_lookup_num_tokens": 3, "alone": True},
}


@pytest.mark.parametrize(
    ("dtype", "strategy"), [("int8", "greedy"), ("fp8", "greedy"), ("int8", "beam"), ("int8", "lookup")]
)
def test_the_tokens_of_eager(dtype: str, strategy: str) -> None:
    model, how = llama(), STRATEGIES[strategy]
    want = generated(model, past_key_values=fxopt.QuantizedCache(model.config, dtype), **how)
    in_place, copied = STATE.in_place, STATE.copied
    with all_handled() as records, warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        compiled = compile_fxopt(model, kv_cache_dtype=dtype)
        got = generated(compiled, return_dict_in_generate=True, **how)
        assert torch.equal(got.sequences, want)
    if strategy != "beam":  # which makes new tensors at each step
        assert STATE.in_place - in_place > STATE.copied - copied
    found = [entry for record in records for entry in record.evidence if entry.rewrite == "fold-kv-scales"]
    assert len(found) >= len(records)
    if strategy != "lookup":  # which has graphs for any number of queries, too
        assert all(entry.status is Status.APPLIED for entry in found)
    layer = got.past_key_values.layers[0]
    for each in (layer.keys, layer.values, layer.key_scales, layer.value_scales):
        room = each.untyped_storage().nbytes() * each.shape[2] / each.nbytes - each.shape[2]
        assert room <= MOST


def test_assisted_decoding_gives_the_tokens_of_greedy() -> None:
    """What attention sees depends on the tokens alone, not on how many were checked at once."""
    model = llama()
    assistant = llama(1)
    for mine, other in zip(assistant.parameters(), model.parameters(), strict=True):
        mine.data.lerp_(other.data, 0.9)  # which is right about some tokens
    compiled = compile_fxopt(model, kv_cache_dtype="int8")
    assert torch.equal(
        generated(compiled, alone=True, assistant_model=assistant), generated(compiled, alone=True)
    )


def test_a_cache_that_is_passed() -> None:
    """Also where the module is compiled in place, and across calls."""
    model = llama()
    eager, mine = fxopt.QuantizedCache(model.config), fxopt.QuantizedCache()
    want = [generated(model, past_key_values=eager)]
    want.append(model.generate(want[0], past_key_values=eager, max_new_tokens=9, do_sample=False))
    model.compile(backend="fxopt", options={"host": "eager", "strict": True})
    got = [generated(model, past_key_values=mine)]
    got.append(model.generate(got[0], past_key_values=mine, max_new_tokens=9, do_sample=False))
    assert all(map(torch.equal, got, want))
    assert all(type(layer) is Int8Layer for layer in mine.layers)


OPERATIONS: dict[str, Callable[[DynamicCache], object]] = {
    "crop": lambda cache: cache.crop(-3),
    "crop nothing": lambda cache: cache.crop(0),
    "reorder": lambda cache: cache.reorder_cache(torch.tensor([1, 1])),
    "repeat": lambda cache: cache.batch_repeat_interleave(2),
    "select": lambda cache: cache.batch_select_indices(torch.tensor([1])),
    "move": lambda cache: (cache.layers[0].offload(), cache.layers[0].prefetch()),
    "reset": lambda cache: cache.reset(),
}


@pytest.mark.parametrize("operation", OPERATIONS)
@pytest.mark.parametrize("dtype", list(LAYERS))
def test_operations_of_caches(dtype: str, operation: str) -> None:
    """As on a cache of the numbers that the rows stand for."""
    cache, twin = fxopt.QuantizedCache(dtype=dtype), DynamicCache()
    keys, values = torch.randn(2, 2, 2, 7, 16)
    twin.update(*cache.update(keys, values, 0), 0)
    for each in (cache, twin):
        OPERATIONS[operation](each)
    assert cache.get_seq_length() == twin.get_seq_length()
    new = torch.randn(twin.layers[0].keys.shape[0] if cache.get_seq_length() else 2, 2, 1, 16)
    rows = dequantized(*quantized(new, cache.layers[0].stored), torch.float32)
    got, want = cache.update(new, new, 0), twin.update(rows, rows, 0)
    assert all(map(torch.equal, got, want))


def test_windows_stay_as_they_are() -> None:
    """They bound their memory themselves."""
    torch.manual_seed(0)
    kinds = ["sliding_attention", "full_attention"]
    sizes = {**SMALL, "num_hidden_layers": 2}
    config = Qwen2Config(**sizes, use_sliding_window=True, sliding_window=6, layer_types=kinds)
    model = Qwen2ForCausalLM(config).eval()
    cache = fxopt.QuantizedCache(model.config)
    assert [type(layer).__name__ for layer in cache.layers] == ["DynamicSlidingWindowLayer", "Int8Layer"]
    want = generated(model, past_key_values=cache)
    compiled = compile_fxopt(model, kv_cache_dtype="int8")
    got = generated(compiled, return_dict_in_generate=True)
    assert torch.equal(got.sequences, want)
    assert list(map(type, got.past_key_values.layers)) == list(map(type, cache.layers))


def t5() -> T5ForConditionalGeneration:
    config = T5Config(
        vocab_size=61, d_model=24, d_kv=6, d_ff=40, num_layers=1, num_heads=4, pad_token_id=0,
        decoder_start_token_id=0, eos_token_id=None,
    )  # fmt: skip
    return T5ForConditionalGeneration(config).eval()


def only_windows() -> MistralForCausalLM:
    return MistralForCausalLM(MistralConfig(**SMALL, sliding_window=16)).eval()


@pytest.mark.parametrize(
    ("make", "how", "reason"),
    [
        (llama, {"use_cache": False}, "wanted a DynamicCache or a StaticCache in memory, saw NoneType"),
        (t5, {}, "wanted a DynamicCache or a StaticCache in memory, saw EncoderDecoderCache"),
        (only_windows, {}, "wanted layers of full attention, saw none"),
    ],
)
def test_other_caches_stay_with_a_warning(make: Callable[[], Any], how: dict[str, Any], reason: str) -> None:
    model = make()
    with pytest.warns(UserWarning, match=f"kv_cache_dtype='int8' changes nothing: {reason}"):
        got = generated(compile_fxopt(model, kv_cache_dtype="int8"), 1, **how)
    assert torch.equal(got, generated(model, 1, **how))


def test_a_cache_of_the_caller_stays_with_a_warning() -> None:
    model, cache = llama(), DynamicCache()
    with pytest.warns(UserWarning, match="the cache was passed by the caller"):
        generated(compile_fxopt(model, kv_cache_dtype="int8"), 1, past_key_values=cache)
    assert not any(isinstance(layer, Int8Layer) for layer in cache.layers)


def test_unknown_dtypes() -> None:
    with pytest.raises(OptionValueError, match="has no value 'int4'.*Valid: auto, int8, fp8"):
        torch.compile(llama(), backend="fxopt", options={"kv_cache_dtype": "int4"})
    with pytest.raises(
        OptionValueError, match="has no value 'int9'.*Nearest valid values: int8.*Valid: int8, fp8"
    ):
        fxopt.QuantizedCache(dtype="int9")


def test_inductor_compiles_steps_over_rows_of_8_bits() -> None:
    """Their number and that of their scales are one symbol, under the name of another one."""
    model = llama().bfloat16()
    compiled = compile_fxopt(model, host="inductor", kv_cache_dtype="int8")
    with all_handled():
        found = generated(compiled, 4, alone=True)
    assert found.shape[1] == 9 + 4
