"""`generate` of a compiled model goes past Dynamo's guards, with the model's own tokens."""

from __future__ import annotations

import functools
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from generation.test_generate import llama, prompts

from fxopt.runtime.decode_path import DecodePath
from support.runs import at_once

NEW = 20


@pytest.fixture(scope="module")
def pair() -> tuple[Any, Any]:
    """A model, and the same compiled."""
    torch._dynamo.reset()
    model = llama()
    return model, torch.compile(model, backend="fxopt", options={"host": "eager"})


@pytest.fixture(autouse=True)
def fresh_compiler() -> Iterator[None]:
    """One compiled model serves this whole file."""
    yield


def tokens(model: Any, **how: Any) -> torch.Tensor:
    how = {"max_new_tokens": NEW, "do_sample": False} | how
    found: torch.Tensor = model.generate(**how)
    return found


def one_prompt() -> dict[str, torch.Tensor]:
    return {"input_ids": prompts(1)["input_ids"].clamp(min=2)}


@pytest.mark.parametrize(
    ("how", "least"),
    [
        (one_prompt(), NEW - 8),
        (prompts(), NEW - 8),
        (prompts(3), NEW - 8),
        ({**prompts(), "num_beams": 2}, 0),
        ({**one_prompt(), "prompt_lookup_num_tokens": 2}, 0),
    ],
    ids=["greedy", "padded", "batch", "beam", "lookup"],
)
def test_tokens(pair: Any, how: Any, least: int) -> None:
    model, compiled = pair
    wanted, before = tokens(model, **how), DecodePath.taken
    assert torch.equal(tokens(compiled, **how), wanted)
    assert DecodePath.taken - before >= least


def test_assisted(pair: Any) -> None:
    model, compiled = pair
    how = {**one_prompt(), "assistant_model": llama()}
    assert torch.equal(tokens(compiled, **how), tokens(model, **how))


def test_a_callback_that_changes_the_model(pair: Any) -> None:
    """What runs between two steps is the user's own code."""
    model, compiled = pair
    kept = model.lm_head.weight

    def change(ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        if ids.shape[1] == 20:
            model.lm_head.weight = torch.nn.Parameter(kept.detach().flip(0))
        return scores

    found = []
    for each in (model, compiled):
        model.lm_head.weight = kept
        found.append(tokens(each, **one_prompt(), logits_processor=[change]))
    model.lm_head.weight = kept
    assert torch.equal(*found)
    assert not torch.equal(found[0], tokens(model, **one_prompt()))


def test_threads(pair: Any) -> None:
    model, compiled = pair
    hows = [one_prompt(), {"input_ids": one_prompt()["input_ids"].flip(1)}]
    wanted = [tokens(model, **how) for how in hows]
    tokens(compiled, **one_prompt())
    found = at_once([functools.partial(tokens, compiled, **how) for how in hows])
    assert all(map(torch.equal, found, wanted))


def test_can_be_turned_off(pair: Any) -> None:
    model, _ = pair
    torch._dynamo.reset()
    compiled = torch.compile(model, backend="fxopt", options={"host": "eager", "fast_decode": False})
    before = DecodePath.taken
    assert torch.equal(tokens(compiled, **one_prompt()), tokens(model, **one_prompt()))
    assert DecodePath.taken == before
