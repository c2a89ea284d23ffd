"""Caches of 8 bits an entry and of a fixed size: what they hold, and the tokens of eager with them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from generation.test_quantized_cache import SMALL, generated, held, llama
from transformers import Qwen2Config, Qwen2ForCausalLM, StaticCache

import fxopt
from fxopt.errors import OptionValueError
from fxopt.integrations.quantized_cache import LAYERS
from fxopt.integrations.static_quantized_cache import STATIC_LAYERS
from fxopt.ir.contract import Status
from fxopt.ir.ops import quantized_attention
from fxopt.ir.row_codes import dequantized, quantized
from support.compiled import all_handled, compile_fxopt

ROOM = 40


@pytest.fixture(autouse=True)
def _afresh(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.compiler.reset()
    monkeypatch.setattr(quantized_attention, "ROW_NUMBERS", 0)


def filled(dtype: str, rows: int = 7) -> tuple[StaticCache, torch.Tensor]:
    """A cache with some rows, and these."""
    cache = fxopt.StaticQuantizedCache(llama().config, ROOM, dtype)
    states = torch.randn(2, 2, rows, 8)
    cache.update(states, states, 0)
    return cache, states


@pytest.mark.parametrize("dtype", list(LAYERS))
def test_rows_are_those_of_a_cache_that_grows(dtype: str) -> None:
    cache, states = filled(dtype)
    new = torch.randn(2, 2, 2, 8)
    got, _ = cache.update(new, new, 0)
    growing = fxopt.QuantizedCache(dtype=dtype)
    growing.update(states, states, 0)
    want, _ = growing.update(new, new, 0)
    assert torch.equal(got[:, :, :9], want)
    assert not got[:, :, 9:].any()
    assert int(cache.get_seq_length()) == 9
    assert cache.layers[0].keys.dtype is LAYERS[dtype].stored


@pytest.mark.parametrize("dtype", list(LAYERS))
def test_memory(dtype: str) -> None:
    cache, _ = filled(dtype)
    length = cache.layers[0].cumulative_length.nbytes
    # a byte for each entry, a float32 for each row
    assert held(cache) == 2 * 2 * 2 * ROOM * (8 + 4) + length  # type: ignore[arg-type]


@pytest.mark.parametrize("dtype", list(LAYERS))
def test_the_tokens_of_eager(dtype: str) -> None:
    model = llama()
    want = generated(model, past_key_values=fxopt.StaticQuantizedCache(model.config, ROOM, dtype))
    assert torch.equal(generated(model, past_key_values=fxopt.QuantizedCache(model.config, dtype)), want)
    with all_handled() as records:
        compiled = compile_fxopt(model, kv_cache_dtype=dtype)
        got = generated(compiled, return_dict_in_generate=True, cache_implementation="static")
    assert torch.equal(got.sequences, want)
    assert type(got.past_key_values.layers[0]) is STATIC_LAYERS[dtype]
    assert len(records) == 2
    found = [entry for record in records for entry in record.evidence if entry.rewrite == "fold-kv-scales"]
    assert [entry.status for entry in found] == [Status.APPLIED] * 2


def test_a_prompt_in_chunks() -> None:
    """The layers are made ahead of time."""
    model = llama()
    how = {"cache_implementation": "static", "prefill_chunk_size": 4}
    want = generated(model, past_key_values=fxopt.StaticQuantizedCache(model.config, ROOM))
    got = generated(compile_fxopt(model, kv_cache_dtype="int8"), return_dict_in_generate=True, **how)
    assert torch.equal(got.sequences, want)
    assert type(got.past_key_values.layers[0]) is STATIC_LAYERS["int8"]


def test_one_graph_serves_all_steps() -> None:
    """Also as a whole, and with the cache made outside."""
    model, cache = llama(), fxopt.StaticQuantizedCache(llama().config, ROOM)
    twin = fxopt.StaticQuantizedCache(model.config, ROOM)
    step = torch.compile(model, backend="fxopt", fullgraph=True, options={"host": "eager", "strict": True})
    with torch.no_grad(), all_handled() as records:
        for each, call in ((cache, model), (twin, model)):
            call(torch.arange(2, 8)[None], past_key_values=each)
        for token in range(2, 12):
            ids = torch.tensor([[token]])
            got, want = (call(ids, past_key_values=each) for call, each in ((step, cache), (model, twin)))
            assert torch.equal(got.logits.argmax(-1), want.logits.argmax(-1))
            assert torch.equal(
                cache.layers[0].keys[:, :, : token + 5].ne(0).any(-1), torch.ones(1, 2, token + 5) > 0
            )
    assert len(records) == 1
    assert torch.equal(cache.layers[0].keys, twin.layers[0].keys)
    assert torch.equal(cache.layers[0].value_scales, twin.layers[0].value_scales)


OPERATIONS: dict[str, Callable[[StaticCache], object]] = {
    "reorder": lambda cache: cache.reorder_cache(torch.tensor([1, 1])),
    "move": lambda cache: (cache.layers[0].offload(), cache.layers[0].prefetch()),
    "reset": lambda cache: cache.reset(),
}


@pytest.mark.parametrize("operation", OPERATIONS)
def test_operations_of_caches(operation: str) -> None:
    """As on a cache of the numbers that the rows stand for."""
    cache, states = filled("int8")
    twin = StaticCache(llama().config, max_cache_len=ROOM)
    rows = dequantized(*quantized(states, torch.int8), torch.float32)
    twin.update(rows, rows, 0)
    for each in (cache, twin):
        OPERATIONS[operation](each)
    new = torch.randn(2, 2, 1, 8)
    rows = dequantized(*quantized(new, torch.int8), torch.float32)
    got, want = cache.update(new, new, 0), twin.update(rows, rows, 0)
    assert all(map(torch.equal, got, want))
    assert torch.equal(cache.get_seq_length(), twin.get_seq_length())


def test_windows_stay_as_they_are() -> None:
    kinds = ["sliding_attention", "full_attention"]
    sizes: dict[str, Any] = {**SMALL, "num_hidden_layers": 2}
    config = Qwen2Config(**sizes, use_sliding_window=True, sliding_window=6, layer_types=kinds)
    cache = fxopt.StaticQuantizedCache(Qwen2ForCausalLM(config).config, ROOM)
    assert [type(layer).__name__ for layer in cache.layers] == ["StaticSlidingWindowLayer", "StaticInt8Layer"]


def test_unknown_dtypes() -> None:
    with pytest.raises(OptionValueError, match="Valid: int8, fp8"):
        fxopt.StaticQuantizedCache(llama().config, ROOM, "int4")
