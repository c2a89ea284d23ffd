"""`fullgraph` and `dynamic` mean with fxopt what they mean with any backend."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch._dynamo.exc import Unsupported

from support.compile_stats import Counting, compile_stats
from support.compiled import all_handled
from support.numerics import assert_closer
from support.rounding import perturbed
from support.runs import infer, infer64, train, train64
from support.zoo import ZOO

LAYERS = 2
OPTIONS = {"host": "eager", "strict": True}
# (batch, length): one changes, then the other, down to one, which is a size of its own for Dynamo.
SIZES = ((2, 13), (2, 17), (3, 17), (1, 22), (5, 19))


def compile_with(model: Callable[..., Any], **arguments: Any) -> Callable[..., Any]:
    compiled: Callable[..., Any] = torch.compile(model, backend="fxopt", options=OPTIONS, **arguments)
    return compiled


@pytest.mark.parametrize("name", ["bert", "llama"])
def test_whole_graph(name: str) -> None:
    architecture = ZOO[name]
    model = architecture.make_model().train()
    inputs = architecture.make_inputs(training=True, mask=architecture.masks[-1])
    with all_handled() as records:
        candidate = train(compile_with(model, fullgraph=True), model, inputs)
    others = perturbed(lambda: train(model, model, inputs))
    eager = train(model, model, inputs)
    assert_closer(train64(model, inputs), candidate, eager, roundings=others)
    (record,) = records
    assert len(record.applied("rewrite-attention")) == LAYERS


def test_whole_graph_is_refused_by_dynamo_where_there_is_none() -> None:
    def model(x: torch.Tensor) -> torch.Tensor:
        weights = torch.softmax(x, dim=-1)
        return weights if weights.sum() > 0 else x

    with pytest.raises(Unsupported, match="Data-dependent branching"):
        compile_with(model, fullgraph=True)(torch.rand(2, 3))
    x = torch.rand(2, 3)
    torch.testing.assert_close(compile_with(model)(x), model(x), rtol=0, atol=0)


@pytest.mark.parametrize("dynamic", [None, True, False])
def test_shapes(dynamic: bool | None) -> None:
    llama = dataclasses.replace(ZOO["llama"], config=ZOO["llama"].config | {"num_hidden_layers": 1})
    model = llama.make_model()
    inputs = [llama.make_inputs(batch, length, mask="left") for batch, length in SIZES]
    with all_handled() as records:
        compiled = compile_with(model, dynamic=dynamic)
        for one in inputs:
            candidate, eager = infer(compiled, one), infer(model, one)
            others = perturbed(lambda one=one: infer(model, one))
            what = f"{tuple(one['input_ids'].shape)}"
            assert_closer(infer64(model, one), candidate, eager, roundings=others, what=what)
    assert [len(record.applied("rewrite-attention")) for record in records] == [1] * len(records)
    if dynamic is False:
        assert [record.dynamic for record in records] == [False] * len(inputs)
    else:
        assert len(records) < len(inputs)
        assert records[0].dynamic is bool(dynamic)
        assert records[1].dynamic


@pytest.mark.parametrize("dynamic", [None, True, False])
def test_as_many_graphs_as_without_fxopt(dynamic: bool | None) -> None:
    def attend(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        return torch.softmax(q @ k.transpose(-1, -2) / math.sqrt(q.shape[-1]), dim=-1) @ v

    def run(backend: Callable[..., Any]) -> None:
        compiled = torch.compile(attend, backend=backend, dynamic=dynamic)
        for batch, length in SIZES * 2:
            compiled(*torch.randn(3, batch, 4, length, 8))

    plain, ours = Counting("eager"), Counting("fxopt", options=OPTIONS)
    with all_handled() as records:
        assert compile_stats(ours, run) == compile_stats(plain, run)
    assert ours.ids == plain.ids
    assert [len(record.applied("rewrite-attention")) for record in records] == [1] * len(plain.ids)
