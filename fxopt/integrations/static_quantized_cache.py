"""Key-value caches of 8 bits an entry and of a fixed size: `fxopt.StaticQuantizedCache`.

Rows and scales are those of `fxopt.QuantizedCache`, written in place at the positions of the new tokens.

Imports transformers; imported on first use only.
"""

from __future__ import annotations

from typing import Any

import torch
from transformers import StaticCache
from transformers.cache_utils import StaticLayer

from fxopt.integrations.quantized_cache import QuantizedRows, check_dtype
from fxopt.ir.row_codes import dequantized, quantized, write_rows


class StaticQuantizedLayer(QuantizedRows, StaticLayer):
    """A layer of `max_cache_len` rows, of which those that are not filled are zeros."""

    key_scales: torch.Tensor
    value_scales: torch.Tensor

    def lazy_initialization(self, key_states: torch.Tensor, value_states: torch.Tensor) -> None:
        rows = (each.new_empty(each.shape, dtype=self.stored) for each in (key_states, value_states))
        super().lazy_initialization(*rows)
        self.dtype = key_states.dtype
        shape = (*self.keys.shape[:3], 1)
        self.key_scales, self.value_scales = (torch.zeros(shape, device=self.device) for _ in range(2))
        if not torch.compiler.is_dynamo_compiling():
            for scales in (self.key_scales, self.value_scales):
                torch._dynamo.mark_static_address(scales)

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *args: Any, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Write new rows, and return all keys and values in the dtype of the new ones."""
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        new = key_states.shape[-2]
        positions = torch.arange(new, device=self.device) + self.cumulative_length
        self.cumulative_length.add_(new)
        return (
            self._written(self.keys, self.key_scales, positions, key_states),
            self._written(self.values, self.value_scales, positions, value_states),
        )

    def _written(
        self, stored: torch.Tensor, scales: torch.Tensor, positions: torch.Tensor, states: torch.Tensor
    ) -> torch.Tensor:
        rows, new_scales = quantized(states, self.stored)
        write_rows(stored, positions, rows)
        scales.index_copy_(2, positions, new_scales)
        return dequantized(stored, scales, states.dtype)

    def reset(self) -> None:
        super().reset()
        if self.is_initialized:
            self.key_scales.zero_()
            self.value_scales.zero_()


class StaticInt8Layer(StaticQuantizedLayer):
    """Rows of int8."""

    stored = torch.int8


class StaticFp8Layer(StaticQuantizedLayer):
    """Rows of float8_e4m3fn."""

    stored = torch.float8_e4m3fn


STATIC_LAYERS: dict[str, type[StaticQuantizedLayer]] = {"int8": StaticInt8Layer, "fp8": StaticFp8Layer}


class StaticQuantizedCache(StaticCache):
    """transformers' `StaticCache` with quantized rows in the layers of full attention.

    Layers of other kinds stay what they are.

    Args:
        config: of the model.
        max_cache_len: tokens that there is room for.
        dtype: ``"int8"`` or ``"fp8"``.

    Raises:
        OptionValueError: another dtype.
    """

    def __init__(self, config: Any, max_cache_len: int, dtype: str = "int8") -> None:
        check_dtype(dtype)
        super().__init__(config=config, max_cache_len=max_cache_len)
        quantize_static_layers(self, dtype)


def quantize_static_layers(cache: StaticCache, dtype: str) -> int:
    """Put quantized layers in the place of the empty ones of full attention. Returns how many."""
    places = [place for place, layer in enumerate(cache.layers) if type(layer) is StaticLayer]
    for place in places:
        layer = cache.layers[place]
        made = cache.layers[place] = STATIC_LAYERS[dtype](layer.max_cache_len)
        if layer.is_initialized:  # ahead of time, as for a prompt in chunks
            made.lazy_initialization(layer.keys, layer.values)
    return len(places)
