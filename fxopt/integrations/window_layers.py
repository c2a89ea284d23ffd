"""Layers of transformers' caches that keep a window, as code that is the same however full the window is.

transformers' layer takes another way while its window fills, at the token with which it is full, and behind
that. Dynamo compiles a graph for each. The layer here computes the same numbers with minima and maxima, of
which one graph holds for all lengths.

Caches within a call of `generate` have these layers, and transformers' own again when it ends.

Imports transformers; imported on first use only.
"""

from __future__ import annotations

from typing import Any

import torch
from transformers.cache_utils import DynamicSlidingWindowLayer


class WindowLayer(DynamicSlidingWindowLayer):
    """transformers' layer: it keeps the newest W - 1 rows, and gives out these and the new ones."""

    keys: torch.Tensor
    values: torch.Tensor

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *args: Any, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Append (B, H, S, D), and return all keys and values that the new rows may see."""
        # That a window of one token keeps all rows is transformers' business. Where its size is an input of a
        # graph, the question also tells that there is something to keep.
        if getattr(self, "record_past", False) or self.sliding_window < 2:
            given: tuple[torch.Tensor, torch.Tensor] = super().update(
                key_states, value_states, *args, **kwargs
            )
            return given
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        self.cumulative_length += key_states.shape[-2]
        keys = torch.cat([self.keys, key_states], dim=-2)
        values = torch.cat([self.values, value_states], dim=-2)
        self.keys, self.values = self._newest(keys), self._newest(values)
        return keys, values

    def _newest(self, rows: torch.Tensor) -> torch.Tensor:
        return rows[:, :, max(rows.shape[-2] - (self.sliding_window - 1), 0) :]

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """How many keys `update` gives out, and the position of the first one."""
        most = self.sliding_window - 1
        return min(self.cumulative_length, most) + query_length, max(self.cumulative_length - most, 0)


def hold_windows(cache: Any) -> list[Any]:
    """Have the layers of a cache that keep a window be `WindowLayer`. Returns them, for `release_windows`."""
    found = [
        layer
        for layer in getattr(getattr(cache, "self_attention_cache", cache), "layers", ())
        if type(layer) is DynamicSlidingWindowLayer and layer.sliding_window > 1
    ]
    for layer in found:
        layer.__class__ = WindowLayer
    return found


def release_windows(layers: list[Any]) -> None:
    """Have them be transformers' own again."""
    for layer in layers:
        layer.__class__ = DynamicSlidingWindowLayer
