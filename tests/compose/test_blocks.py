"""Compiling block by block: equal blocks share one compiled graph, as they do with any other backend."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
import transformers
from accelerate.utils import compile_regions

from fxopt.report.record import GraphRecord
from support.architecture import BATCH, VOCAB, liven
from support.compile_stats import Counting, compile_stats
from support.compiled import all_handled
from support.numerics import assert_closer
from support.rounding import perturbed
from support.runs import infer, infer64, train, train64
from support.zoo_text import DENSE

LAYERS = 3
LENGTHS = (13, 17, 22)
OPTIONS = {"host": "eager", "strict": True}

Way = Callable[..., torch.nn.Module]


def each_layer(model: torch.nn.Module, **how: Any) -> torch.nn.Module:
    """In place, as a user's loop does it."""
    for layer in model.model.layers:
        layer.compile(**how)
    return model


WAYS: dict[str, Way] = {"each_layer": each_layer, "regions": compile_regions}


def make_model() -> torch.nn.Module:
    """Deep enough that a compilation for each layer would be seen."""
    torch.manual_seed(0)
    config = transformers.LlamaConfig(**DENSE | {"num_hidden_layers": LAYERS, "num_key_value_heads": 2})
    model: torch.nn.Module = transformers.LlamaForCausalLM._from_config(config, attn_implementation="sdpa")
    liven(model)
    return model.eval()


def make_inputs(length: int, *, use_cache: bool = False) -> dict[str, Any]:
    tokens = torch.randint(10, VOCAB, (BATCH, length))
    return {"input_ids": tokens, "labels": tokens, "use_cache": use_cache}


def layers_rewritten(records: Sequence[GraphRecord]) -> list[int]:
    """How many attentions were rewritten in each graph that has one."""
    counts = [len(record.applied("rewrite-attention")) for record in records]
    return [count for count in counts if count]


@pytest.mark.parametrize("way", WAYS)
def test_inference(way: str) -> None:
    model = make_model()
    inputs = [make_inputs(length) for length in LENGTHS]
    eager, exact = [infer(model, one) for one in inputs], [infer64(model, one) for one in inputs]
    with all_handled() as records:
        compiled = WAYS[way](model, backend="fxopt", options=OPTIONS)
        candidate = [infer(compiled, one) for one in inputs]
    others = perturbed(lambda: [infer(make_model(), one) for one in inputs])
    assert_closer(exact, candidate, eager, roundings=others)
    # One graph for all layers at the first length, one for all at any other.
    assert layers_rewritten(records) == [1, 1]


@pytest.mark.parametrize("way", WAYS)
def test_training(way: str) -> None:
    model, inputs = make_model().train(), make_inputs(LENGTHS[0])
    eager, exact = train(model, model, inputs), train64(model, inputs)
    with all_handled() as records:
        compiled = WAYS[way](model, backend="fxopt", options=OPTIONS)
        candidate = train(compiled, model, inputs)
    plain = make_model().train()
    assert_closer(exact, candidate, eager, roundings=perturbed(lambda: train(plain, plain, inputs)))
    assert layers_rewritten(records) == [1]


@pytest.mark.parametrize("use_cache", [False, True])
def test_layers_share_as_much_as_without_fxopt(use_cache: bool) -> None:
    """A cache is indexed by the number of the layer, for which Dynamo compiles each layer of its own."""

    def run(backend: Callable[..., Any]) -> None:
        model = each_layer(make_model(), backend=backend)
        for length in LENGTHS[:2]:
            infer(model, make_inputs(length, use_cache=use_cache))

    plain, fxopt = Counting("eager"), Counting("fxopt", options=OPTIONS)
    assert compile_stats(fxopt, run) == compile_stats(plain, run)
    assert fxopt.ids == plain.ids
    assert len(plain.ids) == (2 * LAYERS if use_cache else 2)
