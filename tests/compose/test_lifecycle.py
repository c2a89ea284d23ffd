"""What happens around compiled code: reset, copies and pickles, new weights, other backends at a time."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch

from fxopt.report.record import GraphRecord
from fxopt.report.record import records as kept_records
from support.architecture import liven
from support.compiled import all_handled, compile_fxopt
from support.numerics import assert_closer
from support.rounding import perturbed
from support.runs import infer, infer64, train, train64
from support.zoo import ZOO

LAYERS = 2
LLAMA = ZOO["llama"]
H, S, D = 3, 7, 8

Copier = Callable[[torch.nn.Module], torch.nn.Module]


def unpickled(model: torch.nn.Module) -> torch.nn.Module:
    copied: torch.nn.Module = pickle.loads(pickle.dumps(model))
    return copied


COPIERS: dict[str, Copier] = {"deepcopy": copy.deepcopy, "pickle": unpickled}


def make_model() -> tuple[torch.nn.Module, dict[str, Any]]:
    inputs = LLAMA.make_inputs(training=True, mask="right") | {"use_cache": False}
    return LLAMA.make_model(), inputs


def attentions(records: Sequence[GraphRecord]) -> list[int]:
    return [len(record.applied("rewrite-attention")) for record in records]


def assert_trains_like_eager(call: Callable[..., Any], model: torch.nn.Module, inputs: Any) -> None:
    eager, candidate = train(model, model, inputs), train(call, model, inputs)
    others = perturbed(lambda: train(model, model, inputs))
    assert_closer(train64(model, inputs), candidate, eager, roundings=others)


@pytest.mark.parametrize("in_place", [False, True])
@pytest.mark.parametrize("name", COPIERS)
def test_copies_of_a_model_in_use(name: str, in_place: bool) -> None:
    """A copy can be compiled in its turn; it has weights of its own, and leaves the first one's alone."""
    model, inputs = make_model()
    with all_handled() as records:
        if in_place:
            model.compile(backend="fxopt", options={"host": "eager", "strict": True})
        compiled = model if in_place else compile_fxopt(model)
        before = train(compiled, model, inputs)
        copied = COPIERS[name](model)
        liven(copied)
        assert_trains_like_eager(compile_fxopt(copied), copied, inputs)
        again = train(compiled, model, inputs)
    torch.testing.assert_close(again["gradients"], before["gradients"], rtol=0, atol=0)
    assert not torch.allclose(train(copied, copied, inputs)["loss"], before["loss"])
    # Equal code is compiled once: weights are inputs of the graph.
    assert attentions(records) == [LAYERS]


def test_new_weights_are_used_without_a_new_graph() -> None:
    model, inputs = make_model()
    compiled = compile_fxopt(model)
    with all_handled() as records:
        first = train(compiled, model, inputs)
        model.load_state_dict(LLAMA.make_model(seed=1).state_dict())
        assert_trains_like_eager(compiled, model, inputs)
    assert not torch.allclose(first["loss"], train(compiled, model, inputs)["loss"])
    assert attentions(records) == [LAYERS]


def attend(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    return torch.softmax(q @ k.transpose(-1, -2) * D**-0.5, dim=-1) @ v


def test_reset_forgets_graphs_records_and_fuel() -> None:
    inputs = dict(zip("qkv", torch.randn(3, 2, H, S, D), strict=True))
    reference, eager = infer64_of(attend, inputs), infer(attend, inputs)
    with all_handled() as records:
        for _ in range(2):
            compiled = compile_fxopt(attend, fuel=1)
            for _ in range(2):
                assert_closer(reference, infer(compiled, inputs), eager)
            assert len(kept_records()) == 1
            torch.compiler.reset()
            assert not kept_records()
    # One unit of fuel each time: reset fills it up.
    assert attentions(records) == [1, 1]


def test_a_function_compiled_before_the_reset_is_compiled_again() -> None:
    model, inputs = make_model()
    compiled = compile_fxopt(model)
    with all_handled() as records:
        for _ in range(2):
            assert_trains_like_eager(compiled, model, inputs)
            torch.compiler.reset()
    assert attentions(records) == [LAYERS, LAYERS]


def infer64_of(function: Callable[..., Any], inputs: dict[str, torch.Tensor]) -> Any:
    return infer(function, {name: value.double() for name, value in inputs.items()})


@pytest.mark.parametrize("other", ["eager", "aot_eager", "inductor"])
def test_another_backend_in_turns(other: str) -> None:
    """Each keeps its own graphs of the same function: a call never ends up in the other's."""
    inputs = dict(zip("qkv", torch.randn(3, 2, H, S, D), strict=True))
    longer = dict(zip("qkv", torch.randn(3, 2, H, S + 2, D), strict=True))
    ours, theirs = compile_fxopt(attend), torch.compile(attend, backend=other)
    with all_handled() as records:
        for _ in range(2):
            for one in (inputs, longer):
                reference, eager = infer64_of(attend, one), infer(attend, one)
                others = perturbed(lambda one=one: infer(attend, one))
                assert_closer(reference, infer(theirs, one), eager, roundings=others)
                assert_closer(reference, infer(ours, one), eager, roundings=others)
    assert attentions(records) == [1, 1]


def test_the_same_model_with_other_options_in_turns() -> None:
    model, inputs = make_model()
    with all_handled() as records:
        ours, idle = compile_fxopt(model), compile_fxopt(model, disable=("all",))
        for _ in range(2):
            for compiled in (ours, idle):
                assert_trains_like_eager(compiled, model, inputs)
    assert attentions(records) == [LAYERS, 0]


def test_a_part_compiled_by_another_backend() -> None:
    """fxopt around a model of which one layer is compiled by another backend already."""
    model, inputs = make_model()
    model.model.layers[0].compile(backend="aot_eager")  # type: ignore[union-attr, index]
    eager, reference = infer(LLAMA.make_model(), inputs), infer64(LLAMA.make_model(), inputs)
    others = perturbed(lambda: infer(LLAMA.make_model(), inputs))
    with all_handled():
        assert_closer(reference, infer(compile_fxopt(model), inputs), eager, roundings=others)


class Pairs(torch.nn.Module):
    """Blocks that are taken out of a list in the loop, as many models have them."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = torch.nn.ModuleList(
            torch.nn.ModuleList([torch.nn.LayerNorm(D), torch.nn.Linear(D, D)]) for _ in range(LAYERS)
        )

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for norm, linear in self.blocks:
            x = x + linear(norm(x)).tanh()
        return x


@pytest.mark.parametrize("backend", ["eager", "fxopt"])
def test_a_part_that_is_a_compiled_module(backend: str) -> None:
    """Dynamo reads attributes of the compiled part while it traces the model: one graph, as without fxopt."""
    model, x = Pairs(), torch.randn(2, S, D)
    wanted = model(x)
    for pair in model.blocks:
        pair[1] = torch.compile(pair[1], backend="eager")  # type: ignore[index]
    options = {"options": {"host": "eager"}} if backend == "fxopt" else {}
    for fullgraph in (False, True):
        torch._dynamo.reset()
        compiled = torch.compile(model, backend=backend, fullgraph=fullgraph, **options)
        torch.testing.assert_close(compiled(x), wanted)
