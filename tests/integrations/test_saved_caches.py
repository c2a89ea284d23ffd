"""A cache that grew in a buffer is saved, pickled and copied as large as its rows, and goes on alike."""

from __future__ import annotations

import copy
import io
import pickle
from collections.abc import Callable
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch
from transformers import DynamicCache, LlamaConfig, LlamaForCausalLM, MistralConfig, MistralForCausalLM

from fxopt.integrations.saved_caches import extend_cache_layers

SMALL: dict[str, Any] = {
    "vocab_size": 61, "hidden_size": 24, "intermediate_size": 40, "num_hidden_layers": 2,
    "num_attention_heads": 4, "num_key_value_heads": 2, "pad_token_id": 0, "eos_token_id": None,
    "initializer_range": 0.5,
}  # fmt: skip
MODELS: dict[str, Callable[[], Any]] = {
    "llama": lambda: LlamaForCausalLM(LlamaConfig(**SMALL)),
    "mistral": lambda: MistralForCausalLM(MistralConfig(**SMALL, sliding_window=16)),
}
Way = Callable[[DynamicCache], DynamicCache]


def saved(cache: DynamicCache) -> DynamicCache:
    file = io.BytesIO()
    torch.save(cache, file)
    file.seek(0)
    found: DynamicCache = torch.load(file, weights_only=False)
    return found


def pickled(cache: DynamicCache) -> DynamicCache:
    found: DynamicCache = pickle.loads(pickle.dumps(cache))
    return found


WAYS: list[Way] = [saved, pickled, copy.deepcopy]


def tensors(cache: DynamicCache) -> list[torch.Tensor]:
    return [tensor for layer in cache.layers for tensor in (layer.keys, layer.values)]


def grown(name: str) -> tuple[Any, DynamicCache, torch.Tensor]:
    """A model, a cache with room behind its rows, and the tokens that it is of."""
    torch.compiler.reset()
    torch.manual_seed(0)
    model = MODELS[name]().eval()
    compiled = torch.compile(model, backend="fxopt", options={"host": "eager"})
    cache, ids = DynamicCache(config=model.config), torch.randint(2, 61, (1, 9))
    tokens = compiled.generate(ids, past_key_values=cache, max_new_tokens=30, do_sample=False)
    assert all(tensor.untyped_storage().nbytes() > tensor.nbytes for tensor in tensors(cache))
    return compiled, cache, tokens


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("name", MODELS)
def test_rows_without_the_room(name: str, way: Way) -> None:
    compiled, cache, tokens = grown(name)
    other = way(cache)
    for found, kept in zip(tensors(other), tensors(cache), strict=True):
        assert torch.equal(found, kept)
        assert found.untyped_storage().nbytes() == found.nbytes
    goes_on = [
        compiled.generate(tokens, past_key_values=each, max_new_tokens=20, do_sample=False)
        for each in (other, cache)
    ]
    assert torch.equal(*goes_on)


def test_the_file_is_as_large_as_that_of_eager() -> None:
    _, cache, tokens = grown("llama")
    sizes = []
    eager = DynamicCache()
    for number, layer in enumerate(cache.layers):
        eager.update(layer.keys.clone(), layer.values.clone(), number)
    for each in (cache, eager):
        file = io.BytesIO()
        torch.save(each, file)
        sizes.append(len(file.getvalue()))
    rows = sum(tensor.nbytes for tensor in tensors(cache))
    assert abs(sizes[0] - sizes[1]) < 0.2 * rows < 2000


def test_a_layer_that_is_copied_by_itself_shares_its_tensors() -> None:
    _, cache, _ = grown("llama")
    layer = copy.copy(cache.layers[0])
    assert layer is not cache.layers[0] and layer.keys is cache.layers[0].keys


def test_other_tensors_are_saved_as_they_are() -> None:
    cache, whole = DynamicCache(), torch.randn(1, 2, 8, 4)
    cache.update(whole[:, :, :3], whole[:, :, :3], 0)
    held = cache.layers[0]
    held.keys = held.values = whole[:, :, :3]
    layer = saved(cache).layers[0]
    assert layer.keys.untyped_storage()._cdata == layer.values.untyped_storage()._cdata
    assert torch.equal(layer.keys, whole[:, :, :3])


def test_layers_with_a_state_of_their_own_keep_it() -> None:
    class CacheLayerMixin:
        def __getstate__(self) -> dict[str, Any]:
            return {}

    module: Any = SimpleNamespace(CacheLayerMixin=CacheLayerMixin)
    before = CacheLayerMixin.__getstate__
    assert extend_cache_layers(module).startswith("not done")
    assert CacheLayerMixin.__getstate__ is before
    assert extend_cache_layers(ModuleType("without")).startswith("not done")
