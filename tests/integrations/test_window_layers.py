"""Layers that keep a window, as one code for all lengths: they do what transformers' own do."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from transformers import DynamicCache, EncoderDecoderCache, MistralConfig
from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer

from fxopt.integrations.window_layers import WindowLayer, hold_windows, release_windows

CHANCE = torch.Generator()


def rows(count: int) -> torch.Tensor:
    return torch.randn(2, 3, count, 4, generator=CHANCE)


def agree(mine: Any, theirs: Any) -> None:
    assert mine.cumulative_length == theirs.cumulative_length
    assert mine.get_seq_length() == theirs.get_seq_length()
    for name in ("keys", "values"):
        assert torch.equal(getattr(mine, name), getattr(theirs, name))
    for queries in (1, 2, 7):
        assert mine.get_mask_sizes(queries) == theirs.get_mask_sizes(queries)


@pytest.mark.parametrize("window", [2, 3, 8])
@pytest.mark.parametrize("prompt", [1, 2, 5, 7, 8, 9, 20])
@pytest.mark.parametrize("records", [False, True])
def test_the_same_rows(window: int, prompt: int, records: bool) -> None:
    CHANCE.manual_seed(window)
    theirs, mine = DynamicSlidingWindowLayer(window), WindowLayer(window)
    assert mine.get_mask_sizes(prompt) == theirs.get_mask_sizes(prompt)
    for each in (theirs, mine):
        if records:
            each.activate_past_recording()
    for count in (prompt, *[1] * 12, 3, 1, window + 1, 1):
        new = rows(count), rows(count)
        for found, wanted in zip(mine.update(*new), theirs.update(*new), strict=True):
            assert torch.equal(found, wanted)
        agree(mine, theirs)
        if records:
            mine.crop(-1)
            theirs.crop(-1)
            agree(mine, theirs)


@pytest.mark.parametrize("encodes", [False, True])
def test_layers_are_held_and_released(encodes: bool) -> None:
    kinds = ["sliding_attention", "full_attention"]
    own = DynamicCache(config=MistralConfig(num_hidden_layers=2, sliding_window=4, layer_types=kinds))
    cache: Any = EncoderDecoderCache(own, DynamicCache()) if encodes else own
    before = [vars(copy.copy(layer)) for layer in own.layers]
    held = hold_windows(cache)
    assert [type(layer) for layer in own.layers] == [WindowLayer, DynamicLayer]
    assert hold_windows(cache) == []
    release_windows(held)
    assert [type(layer) for layer in own.layers] == [DynamicSlidingWindowLayer, DynamicLayer]
    assert [vars(layer).keys() for layer in own.layers] == [each.keys() for each in before]


class Other(DynamicSlidingWindowLayer):
    """Whatever it does differently."""


@pytest.mark.parametrize("layer", [Other(4), DynamicSlidingWindowLayer(1), DynamicLayer()])
def test_other_layers_stay(layer: Any) -> None:
    """A window of one token keeps all rows in transformers: ``-1 + 1`` is where all of them begin."""
    kind = type(layer)
    cache = DynamicCache()
    cache.layers = [layer]
    assert hold_windows(cache) == []
    assert type(layer) is kind


def test_what_is_no_cache() -> None:
    assert hold_windows(None) == []
