"""Calls of semantic ops by themselves, as another process is given them."""

from __future__ import annotations

import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch

from fxopt.codegen.lone_call import Example, LoneCall, lone_call
from fxopt.ir.ops import register_ops, semantic_op
from support.frontend import capture


def attend(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, **more: Any) -> torch.Tensor:
    out: torch.Tensor = torch.ops.fxopt.attention(query, key, value, **more)
    return out


def heads(count: int, rows: int, width: int = 16) -> torch.Tensor:
    return torch.randn(2, rows, count, width).transpose(1, 2)


def call_of(
    function: Callable[..., Any], *inputs: Any, learned: tuple[int, ...] = (), dynamic: bool = False
) -> LoneCall:
    """Of the one semantic op in the graph of a function, after a way to another process and back."""
    register_ops()
    graph = capture(function, *inputs, dynamic=dynamic).graph.graph
    (node,) = (node for node in graph.nodes if semantic_op(node) is not None)
    call = lone_call(node, {node.args[place] for place in learned}.__contains__)
    again: LoneCall = pickle.loads(pickle.dumps(call))
    assert again == call
    return again


def test_tensors_have_the_layout_that_was_seen() -> None:
    call = call_of(lambda *each: attend(*each, enable_gqa=True), heads(4, 6), heads(2, 8), heads(2, 8, 24))
    assert [each.shape for each in call.examples] == [(2, 4, 6, 16), (2, 2, 8, 16), (2, 2, 8, 24)]
    for example in call.examples:
        made = example.make("cpu")
        assert (made.shape, made.stride()) == (example.shape, example.strides)
        assert made.std() > 0.5


def test_the_module_calls_the_op() -> None:
    slopes = torch.rand(4)

    def function(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, slopes: torch.Tensor) -> Any:
        more = {"mask": "k <= q", "score": "s + c0[h]*(k - q)", "captures": [slopes], "dead_rows": "mean"}
        return attend(query, key, value, **more)

    inputs = heads(4, 6), heads(4, 6), heads(4, 6), slopes
    call = call_of(function, *inputs)
    torch.testing.assert_close(call.module()(*inputs), function(*inputs))


def test_gradients_are_computed_of_what_learns() -> None:
    call = call_of(attend, *(heads(2, 4) for _ in range(3)), learned=(0, 2))
    assert [each.learned for each in call.examples] == [True, False, True]
    assert call.is_training
    gradients = call.runner(call.module(), "cpu")()
    assert [each.shape for each in gradients] == [(2, 2, 4, 16)] * 2


def test_without_gradients_the_result_is_computed() -> None:
    call = call_of(attend, *(heads(2, 4) for _ in range(3)))
    assert not call.is_training
    assert call.runner(call.module(), "cpu")().shape == (2, 2, 4, 16)


@pytest.mark.parametrize(
    ("more", "number"),
    [
        pytest.param({"mask": "k < c0[b]"}, 20, id="of a length half of the keys are live"),
        pytest.param({"score": "s + c1[c0[k], h]"}, 0, id="of an index the first entry is read"),
        pytest.param({"mask": "k < c0[b]", "score": "s + c1[c0[k], h]"}, 0, id="of both"),
    ],
)
def test_integers_stand_for_what_they_are_used_as(more: dict[str, str], number: int) -> None:
    def function(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, *captures: Any) -> Any:
        return attend(query, key, value, **more, captures=list(captures))

    inputs = heads(2, 40), heads(2, 40), heads(2, 40), torch.zeros(40, dtype=torch.int64), torch.rand(7, 2)
    call = call_of(function, *inputs)
    assert [each.number for each in call.examples if each.dtype is torch.int64] == [number]
    made = [each.make("cpu") for each in call.examples]
    assert call.module()(*made).isfinite().all()


def test_sizes_that_change_are_those_that_were_seen() -> None:
    call = call_of(attend, heads(2, 5), heads(2, 9), heads(2, 9), dynamic=True)
    assert [each.shape[2] for each in call.examples] == [5, 9, 9]
    assert all(type(size) is int for each in call.examples for size in (*each.shape, *each.strides))


def test_booleans_and_empty_tensors() -> None:
    mask = Example((64, 64), (64, 1), torch.bool).make("cpu")
    assert 0.7 < mask.float().mean() < 1.0
    assert Example((0, 4), (4, 1), torch.float32).make("cpu").shape == (0, 4)
