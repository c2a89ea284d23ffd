"""Quantized layers in the caches that `generate` makes: `options={"kv_cache_dtype": ...}`.

Imports transformers; imported on first use only.
"""

from __future__ import annotations

from typing import Any

from transformers import DynamicCache, StaticCache

from fxopt.integrations.quantized_cache import QuantizedRows, layer_class, quantize_layers
from fxopt.integrations.static_quantized_cache import quantize_static_layers


def quantize_made(cache: Any, passed: bool, dtype: str) -> str:
    """Have the cache that `generate` has made quantized layers. Returns what stands against it, or nothing.

    Args:
        passed: the caller of `generate` made it.
    """
    if passed:
        kept = any(isinstance(layer, QuantizedRows) for layer in getattr(cache, "layers", ()))
        return "" if kept else "the cache was passed by the caller; fxopt.QuantizedCache makes quantized ones"
    if type(cache) not in (DynamicCache, StaticCache) or cache.offloading:
        kind = "an offloaded cache" if getattr(cache, "offloading", False) else type(cache).__name__
        return f"wanted a DynamicCache or a StaticCache in memory, saw {kind}"
    if isinstance(cache, StaticCache):
        changed = quantize_static_layers(cache, dtype)
    else:
        changed = quantize_layers(cache, layer_class(dtype))
    return "" if changed else "wanted layers of full attention, saw none"
