"""The training and scoring call of decoders, which get no mask and build one: no S x S value is left."""

from __future__ import annotations

import re

import pytest
import torch

from fxopt.pipeline import pass_names
from support.numerics import assert_closer
from support.reference import double_model, reference_mode
from support.rewriting import Rewritten, rewriting
from support.zoo import ZOO

NAME = "fold-causal-mask"
# With sdpa, OPT asks for causal attention by itself.
DECODERS = [(name, attention) for name in ("llama", "gpt2", "gpt_neox") for attention in ("eager", "sdpa")]
DECODERS.append(("opt", "eager"))


class Scores(torch.nn.Module):
    """`model(input_ids, use_cache=False)`, the logits alone."""

    def __init__(self, model: torch.nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        logits: torch.Tensor = self.model(input_ids=ids, use_cache=False).logits
        return logits


def score(
    name: str, attention: str, batch: int, dynamic: bool, training: bool, **config: int
) -> tuple[Rewritten, int]:
    """Compile the call, compare with float64, return what was done and the number of layers."""
    architecture = ZOO[name]
    architecture = type(architecture)(**{**vars(architecture), "config": architecture.config | config})
    module = Scores(architecture.make_model(attention)).train(training)
    found = rewriting(module, pass_names(), dynamic=None)
    ids = architecture.make_inputs(batch=batch)["input_ids"]
    if dynamic:
        torch._dynamo.mark_dynamic(ids, [0, 1])
    wide = Scores(double_model(module.model))
    with torch.set_grad_enabled(training):
        out, eager = found.call(ids), module(ids)
        with reference_mode():
            assert_closer(wide(ids), out, eager)
    if training:
        weights = list(module.parameters())
        got, plain = (torch.autograd.grad(each.square().mean(), weights) for each in (out, eager))
        with reference_mode():
            exact = torch.autograd.grad(wide(ids).square().mean(), list(wide.parameters()))
        assert_closer(exact, got, plain)
    return found, int(module.model.config.num_hidden_layers)


def square_values(found: Rewritten) -> list[str]:
    """The values of the rewritten graph with the length in both of the last dimensions."""
    text = found.after[-1]
    length = re.search(r"= placeholder : int64\[\w+, (\w+)\]", text)
    assert length is not None
    return re.findall(rf".*\b{length[1]}, {length[1]}\]$", text, re.MULTILINE)


@pytest.mark.parametrize("dynamic", [False, True])
@pytest.mark.parametrize(("name", "attention"), DECODERS)
def test_fires_in_inference(name: str, attention: str, dynamic: bool) -> None:
    found, layers = score(name, attention, 4, dynamic, training=False)
    assert found.applied(NAME) == layers, found.reasons(NAME)
    assert square_values(found) == []


@pytest.mark.parametrize(("name", "attention"), DECODERS)
def test_fires_in_training_of_one_row(name: str, attention: str) -> None:
    found, layers = score(name, attention, 1, False, training=True)
    assert found.applied(NAME) == layers, found.reasons(NAME)
    assert square_values(found) == []


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
def test_fires_on_a_window_longer_than_the_sequence(attention: str) -> None:
    found, layers = score("mistral", attention, 4, False, training=False, sliding_window=40)
    assert found.applied(NAME) == layers
    assert square_values(found) == []


@pytest.mark.parametrize("dynamic", [False, True])
def test_near_miss_window_shorter_than_the_sequence(dynamic: bool) -> None:
    found, _ = score("mistral", "sdpa", 4, dynamic, training=False, sliding_window=5)
    assert found.applied(NAME) == 0
    assert "k <= q and k > q - 5" in found.reasons(NAME)


def test_dynamic_length_is_compiled_once() -> None:
    found, _ = score("llama", "sdpa", 4, True, training=False)
    for batch, length in ((3, 7), (5, 21)):
        with torch.no_grad():
            found.call(torch.randint(10, 100, (batch, length)))
    assert found.graphs == 1
