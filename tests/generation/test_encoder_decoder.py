"""`generate` of encoder-decoders: graphs for all lengths of what is read, and steps past Dynamo's guards."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from benchmarks.equality_models import Writer, writer
from benchmarks.equality_scenarios import write
from fxopt.runtime.decode_path import DecodePath
from support.compiled import all_handled, compile_fxopt

NEW = 16


@pytest.mark.parametrize("name", ["bart", "t5"])
def test_a_second_length_needs_one_graph(name: str) -> None:
    """That of the prompt: those of the steps are for all lengths from the start."""
    one, graphs = writer(name), []
    compiled = compile_fxopt(one.model)
    with all_handled() as records:
        for length in (9, 20, 31, 14):
            prompt = one.prompt(length=length)
            before = DecodePath.taken
            assert torch.equal(write(compiled, prompt, NEW), write(one.model, prompt, NEW))
            assert DecodePath.taken - before >= NEW - 7
            graphs.append(len(records))
            assert not hasattr(prompt["attention_mask"], "_dynamo_propagated_dynamic_indices")
    assert graphs == [3, 4, 4, 4]


def _shorter(rows: torch.Tensor) -> None:
    rows.data = rows.data[:, :, :-2].clone()


def _other_strides(rows: torch.Tensor) -> None:
    rows.data = rows.data.transpose(1, 2).contiguous().transpose(1, 2)


def _written(rows: torch.Tensor) -> None:
    rows.mul_(0.5)


@pytest.mark.parametrize(("change", "least"), [(_shorter, 6), (_other_strides, 6), (_written, 8)])
def test_rows_of_the_encoder_that_change(change: Callable[[torch.Tensor], None], least: int) -> None:
    """In the middle of a text, and without Dynamo's being asked, as the tensors stay the same objects."""
    one = writer("whisper")
    taken = DecodePath.taken
    found = [_read_on(one, call, change) for call in (DecodePath(compile_fxopt(one.model)), one.model)]
    assert torch.equal(*found)
    assert DecodePath.taken - taken >= least


@torch.no_grad()
def _read_on(one: Writer, call: Any, change: Callable[[torch.Tensor], None]) -> torch.Tensor:
    sound, cache = one.model.get_encoder()(**one.prompt()), one.cache()
    new, found = torch.tensor([[1, 7]]), []
    for step in range(NEW):
        if step == NEW - 4:
            for layer in cache.cross_attention_cache.layers:
                change(layer.keys)
                change(layer.values)
        logits = call(encoder_outputs=sound, decoder_input_ids=new, past_key_values=cache).logits
        new = logits[:, -1:].argmax(-1)
        found.append(logits[:, -1])
    return torch.cat(found)
