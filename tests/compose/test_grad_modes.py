"""Gradients on, off and impossible: around a compiled model, inside of it, and in turns."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from support.architecture import liven
from support.compiled import all_handled, compile_fxopt
from support.numerics import assert_closer
from support.reference import double_model, reference_mode, to_double
from support.rounding import perturbed
from support.runs import train, train64
from support.zoo import ZOO

B, H, S, D = 2, 3, 7, 8
LAYERS = 2
LLAMA = ZOO["llama"]
MODES = {"no_grad": torch.no_grad, "inference_mode": torch.inference_mode}

Mode = Callable[[], Any]


def call_in(mode: Mode, call: Callable[..., Any], inputs: dict[str, Any]) -> Any:
    with mode():
        return call(**inputs)


def kinds(output: Any) -> list[tuple[bool, bool]]:
    return [
        (value.requires_grad, value.is_inference())
        for value in output.values()
        if isinstance(value, torch.Tensor)
    ]


@pytest.mark.parametrize("name", MODES)
@pytest.mark.parametrize("attention", ["eager", "sdpa"])
def test_around_a_model(attention: str, name: str) -> None:
    mode = MODES[name]
    model, inputs = LLAMA.make_model(attention), LLAMA.make_inputs(training=True, mask="left")
    inputs |= {"use_cache": False}
    eager = call_in(mode, model, inputs)
    with all_handled() as records:
        candidate = call_in(mode, compile_fxopt(model), inputs)
    with reference_mode():
        exact = call_in(mode, double_model(model), to_double(inputs))
    others = perturbed(lambda: call_in(torch.no_grad, model, inputs))
    assert_closer(exact, candidate, eager, roundings=others)
    assert kinds(candidate) == kinds(eager)
    (record,) = records
    assert not record.trains
    assert len(record.applied("rewrite-attention")) == LAYERS


def test_in_turns() -> None:
    """A graph made for one mode must not answer in another."""
    model, inputs = LLAMA.make_model(), LLAMA.make_inputs(training=True, mask="right")
    inputs |= {"use_cache": False}
    eager, reference = train(model, model, inputs), train64(model, inputs)
    others = perturbed(lambda: train(model, model, inputs))
    compiled = compile_fxopt(model)
    with all_handled() as records:
        for _ in range(2):
            for mode in MODES.values():
                assert kinds(call_in(mode, compiled, inputs)) == kinds(call_in(mode, model, inputs))
            assert_closer(reference, train(compiled, model, inputs), eager, roundings=others)
    # The second round compiles nothing.
    assert [record.trains for record in records] == [False, False, True]


class Frozen(torch.nn.Module):
    """Attention of which a part runs without gradients, as frozen encoders are called."""

    def __init__(self, mode: Mode) -> None:
        super().__init__()
        self.project = torch.nn.ModuleList(torch.nn.Linear(H * D, H * D) for _ in range(6))
        self.mode = mode

    def attend(self, x: torch.Tensor, first: int) -> torch.Tensor:
        q, k, v = (
            linear(x).unflatten(-1, (H, D)).transpose(1, 2) for linear in self.project[first : first + 3]
        )
        weights = torch.softmax(q @ k.transpose(-1, -2) * D**-0.5, dim=-1)
        return (weights @ v).transpose(1, 2).flatten(-2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        with self.mode():
            features = self.attend(x, 0)
        # What inference mode made cannot be saved for a backward pass.
        return x + self.attend(features.clone(), 3)


@pytest.mark.parametrize(
    ("name", "host"), [("no_grad", "eager"), ("inference_mode", "eager"), ("no_grad", "inductor")]
)
def test_inside_a_model(name: str, host: str) -> None:
    model, inputs = Frozen(MODES[name]), {"x": torch.randn(B, S, H * D)}
    liven(model)
    eager = train(model, model, inputs)
    with all_handled() as records:
        candidate = train(compile_fxopt(model, host), model, inputs)
    others = perturbed(lambda: train(model, model, inputs))
    assert_closer(train64(model, inputs), candidate, eager, roundings=others)
    frozen = [f"project.{number}." for number in range(3)]
    assert all((value is None) == key.startswith(tuple(frozen)) for key, value in eager["gradients"].items())
    assert sum(len(record.applied("rewrite-attention")) for record in records) == 2


def test_only_the_input_needs_a_gradient() -> None:
    model = Frozen(torch.enable_grad).requires_grad_(False)
    liven(model)
    inputs = {"x": torch.randn(B, S, H * D, requires_grad=True)}
    with all_handled() as records:
        candidate = train(compile_fxopt(model), model, inputs)
    others = perturbed(lambda: train(model, model, inputs))
    assert_closer(train64(model, inputs), candidate, train(model, model, inputs), roundings=others)
    assert candidate["inputs"]["x"].grad is not None
    assert sum(len(record.applied("rewrite-attention")) for record in records) == 2
