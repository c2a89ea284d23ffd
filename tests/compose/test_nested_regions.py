"""Regions that the user marks inside a compiled model: each is rewritten once, and differentiable still."""

from __future__ import annotations

import contextlib
import functools

import pytest
import torch

from support.architecture import liven
from support.compiled import all_handled, compile_fxopt
from support.numerics import assert_closer
from support.rounding import perturbed
from support.runs import infer, infer64, train, train64

B, H, S, D = 2, 3, 7, 8
LAYERS = 3


class Block(torch.nn.Module):
    """Attention spelled out, to be compiled once for all blocks of a model."""

    def __init__(self) -> None:
        super().__init__()
        self.project = torch.nn.ModuleList(torch.nn.Linear(H * D, H * D) for _ in range(4))

    @torch.compiler.nested_compile_region
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        q, k, v = (linear(x).unflatten(-1, (H, D)).transpose(1, 2) for linear in self.project[:3])
        weights = torch.softmax(q @ k.transpose(-1, -2) * D**-0.5, dim=-1)
        return x + self.project[3]((weights @ v).transpose(1, 2).flatten(-2))


class Stack(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.blocks = torch.nn.ModuleList(Block() for _ in range(LAYERS))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for block in self.blocks:
            x = block(x)
        return x


def make_stack() -> Stack:
    stack = Stack()
    liven(stack)
    return stack


def test_inference() -> None:
    model, inputs = make_stack(), {"x": torch.randn(B, S, H * D)}
    with all_handled() as records:
        candidate = infer(compile_fxopt(model), inputs)
    others = perturbed(lambda: infer(model, inputs))
    assert_closer(infer64(model, inputs), candidate, infer(model, inputs), roundings=others)
    (record,) = records
    assert len(record.applied("rewrite-attention")) == 1


@pytest.mark.parametrize(("host", "lengths"), [("eager", (S, S + 4)), ("inductor", (S,))])
def test_training(host: str, lengths: tuple[int, ...]) -> None:
    """The inputs require grad, so that all blocks are alike. A second length has a symbol in its place."""
    model = make_stack()
    with all_handled() as records:
        compiled = compile_fxopt(model, host)
        for length in lengths:
            inputs = {"x": torch.randn(B, length, H * D, requires_grad=True)}
            candidate, eager = train(compiled, model, inputs), train(model, model, inputs)
            others = perturbed(functools.partial(train, model, model, inputs))
            assert_closer(train64(model, inputs), candidate, eager, roundings=others)
    assert [len(record.applied("rewrite-attention")) for record in records] == [1] * len(lengths)
    assert [record.dynamic for record in records] == [False, True][: len(lengths)]


@pytest.mark.parametrize("mode", [contextlib.nullcontext, torch.no_grad])
def test_a_branch_whose_size_depends_on_data(mode: type) -> None:
    """Dynamo gives the result of such a call a size of its own, which the rewritten graph keeps."""

    def model(x: torch.Tensor) -> torch.Tensor:
        def long(x: torch.Tensor) -> torch.Tensor:
            return torch.softmax(x[:3] * 2.0, dim=-1)

        def short(x: torch.Tensor) -> torch.Tensor:
            return torch.softmax(x[:2] * 3.0, dim=-1)

        return torch.cond(x.sum() > 0, long, short, (x,)) + 1.0

    x = torch.rand(4, 5)
    with mode(), all_handled() as records:
        compiled = compile_fxopt(model)
        results = [compiled(x), compiled(-x)]
    assert len(records) == 1
    torch.testing.assert_close(results, [model(x), model(-x)], rtol=0, atol=0)
