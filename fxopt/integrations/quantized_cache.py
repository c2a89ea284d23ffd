"""Key-value caches of 8 bits an entry: `fxopt.QuantizedCache`, and quantized layers in transformers' own.

A row is one token of one head, stored as `fxopt.ir.row_codes` has it. `update` returns
``(row * scale).to(dtype)`` of all rows, the new ones included: what attention sees depends on the tokens
alone, not on how many came at once.

Imports transformers; imported on first use only.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, ClassVar

import torch
from transformers import DynamicCache
from transformers.cache_utils import DynamicLayer

from fxopt.errors import OptionValueError
from fxopt.ir.row_codes import dequantized, quantized
from fxopt.options import KV_CACHE_DTYPES, nearest


def _behind(past: torch.Tensor | None, new: torch.Tensor) -> torch.Tensor:
    """New rows behind those that are there."""
    assert past is not None
    return torch.cat([past, new], dim=-2)


class QuantizedRows:
    """Of a layer: rows of `stored` in `keys` and `values`, (B, H, S, D), and their scales, (B, H, S, 1)."""

    stored: ClassVar[torch.dtype]
    key_scales: torch.Tensor | None = None
    value_scales: torch.Tensor | None = None

    def _change_scales(self, change: Callable[[torch.Tensor], torch.Tensor]) -> None:
        if self.key_scales is not None and self.value_scales is not None:
            self.key_scales, self.value_scales = change(self.key_scales), change(self.value_scales)

    def offload(self) -> None:
        super().offload()  # type: ignore[misc]
        self._change_scales(lambda scales: scales.to("cpu", non_blocking=True))

    def prefetch(self) -> None:
        super().prefetch()  # type: ignore[misc]
        device: torch.device = self.device  # type: ignore[attr-defined]
        self._change_scales(lambda scales: scales.to(device, non_blocking=True))

    def reorder_cache(self, beam_idx: torch.LongTensor) -> None:
        super().reorder_cache(beam_idx)  # type: ignore[misc]
        self._change_scales(lambda scales: scales.index_select(0, beam_idx.to(scales.device)))


class QuantizedLayer(QuantizedRows, DynamicLayer):
    """A growing layer."""

    def lazy_initialization(self, key_states: torch.Tensor, value_states: torch.Tensor) -> None:
        super().lazy_initialization(key_states, value_states)
        self.keys, self.values = (torch.tensor([], dtype=self.stored, device=self.device) for _ in range(2))
        self.key_scales, self.value_scales = (
            torch.tensor([], dtype=torch.float32, device=self.device) for _ in range(2)
        )

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *args: Any, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Append, and return all keys and values in the dtype of the new ones."""
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        keys, key_scales = quantized(key_states, self.stored)
        values, value_scales = quantized(value_states, self.stored)
        self.keys, self.key_scales = _behind(self.keys, keys), _behind(self.key_scales, key_scales)
        self.values, self.value_scales = (
            _behind(self.values, values),
            _behind(self.value_scales, value_scales),
        )
        return (
            dequantized(self.keys, self.key_scales, key_states.dtype),
            dequantized(self.values, self.value_scales, value_states.dtype),
        )

    def crop(self, tokens_to_remove: int) -> None:
        super().crop(tokens_to_remove)
        rows = self.get_seq_length()
        self._change_scales(lambda scales: scales[..., :rows, :])

    def reset(self) -> None:
        super().reset()
        if not self.is_initialized:  # transformers before 5.18 keeps the rows, as zeros
            self.key_scales = self.value_scales = None

    def batch_repeat_interleave(self, repeats: int) -> None:
        super().batch_repeat_interleave(repeats)
        self._change_scales(lambda scales: scales.repeat_interleave(repeats, dim=0))

    def batch_select_indices(self, indices: torch.Tensor) -> None:
        super().batch_select_indices(indices)
        self._change_scales(lambda scales: scales[indices, ...])


class Int8Layer(QuantizedLayer):
    """Rows of int8."""

    stored = torch.int8


class Fp8Layer(QuantizedLayer):
    """Rows of float8_e4m3fn."""

    stored = torch.float8_e4m3fn


LAYERS: dict[str, type[QuantizedLayer]] = {"int8": Int8Layer, "fp8": Fp8Layer}


class QuantizedCache(DynamicCache):
    """transformers' `DynamicCache` with quantized rows in the layers of full attention.

    Layers of other kinds stay what they are: a sliding window bounds its memory itself, linear attention has
    no rows. Without a config all layers are taken for full attention, as `DynamicCache` does.

    Args:
        config: of the model.
        dtype: ``"int8"`` or ``"fp8"``.

    Raises:
        OptionValueError: another dtype.
    """

    def __init__(self, config: Any = None, dtype: str = "int8") -> None:
        kind = layer_class(dtype)
        super().__init__(config=config)
        if config is None:
            self.layer_class_to_replicate = kind
        else:
            quantize_layers(self, kind)


def layer_class(dtype: str) -> type[QuantizedLayer]:
    """The layer that stores rows of `dtype`."""
    check_dtype(dtype)
    return LAYERS[dtype]


def check_dtype(dtype: str) -> None:
    """Raises OptionValueError where rows of `dtype` are not known."""
    if dtype not in LAYERS:
        near = nearest("valid values", dtype, KV_CACHE_DTYPES)
        raise OptionValueError(name="dtype", value=dtype, nearest=near, valid=", ".join(LAYERS))


def quantize_layers(cache: DynamicCache, kind: type[QuantizedLayer]) -> int:
    """Put new quantized layers in the place of the empty ones of full attention. Returns how many."""
    places = [
        place
        for place, layer in enumerate(cache.layers)
        if type(layer) is DynamicLayer and not layer.is_initialized
    ]
    for place in places:
        cache.layers[place] = kind()
    return len(places)
