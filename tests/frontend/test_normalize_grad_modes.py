"""no_grad, enable_grad and inference_mode in the middle of a graph keep their borders."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from fxopt.ir.graph_facts import Facts
from support.compiled import all_handled, compile_fxopt
from support.frontend import capture, targets

SET = "_set_grad_enabled"


def nested(x: torch.Tensor) -> tuple[torch.Tensor, ...]:
    y = x * 2.0
    with torch.no_grad():
        a = y * 3.0
        with torch.enable_grad():
            b = y * 4.0
        c = y * 5.0
    return y, a, b, c, y * 6.0


def in_inference_mode(x: torch.Tensor) -> tuple[torch.Tensor, ...]:
    with torch.inference_mode():
        scale = x.abs().max() + 1.0
    return (x.sin() / scale.clone(),)


def switched_off_and_on(x: torch.Tensor) -> tuple[torch.Tensor, ...]:
    torch._C._set_grad_enabled(False)
    y = x * 2.0
    torch._C._set_grad_enabled(True)
    return y, x * 3.0 + y


def attention_weights_cut_off(x: torch.Tensor) -> tuple[torch.Tensor, ...]:
    with torch.no_grad():
        weights = torch.softmax(x @ x.transpose(-1, -2) * 0.5, -1)
    return (weights @ x,)


def attention_in_no_grad(x: torch.Tensor) -> tuple[torch.Tensor, ...]:
    with torch.no_grad():
        target = torch.softmax(x @ x.transpose(-1, -2) * 0.5, -1) @ x
    return ((x.sin() - target).square(),)


def noops_at_a_border(x: torch.Tensor) -> tuple[torch.Tensor, ...]:
    with torch.no_grad():
        a = x.contiguous()
        b = x.sin() * 1.0
    return (a + b + x,)


def detached(x: torch.Tensor) -> tuple[torch.Tensor, ...]:
    return (x.detach() * x, x.detach().requires_grad_(False) * x)


FUNCTIONS = [
    nested,
    in_inference_mode,
    switched_off_and_on,
    attention_weights_cut_off,
    attention_in_no_grad,
    detached,
]


@pytest.mark.parametrize("function", FUNCTIONS)
@pytest.mark.parametrize("host", ["eager", "inductor"])
def test_answers_and_gradients_are_eagers(function: Callable[..., Any], host: str) -> None:
    results = []
    with all_handled():
        for call in (function, compile_fxopt(function, host)):
            x = torch.linspace(-1.0, 1.0, 16).view(1, 1, 4, 4).requires_grad_()
            out = call(x)
            sum(y.sum() for y in out if y.requires_grad).backward()
            results.append((out, [y.requires_grad for y in out], x.grad))
    torch.testing.assert_close(results[1], results[0])
    assert torch.is_grad_enabled()


def test_borders_stay_in_the_graph() -> None:
    gm = capture(nested, torch.ones(3, requires_grad=True)).graph
    assert [node.args for node in gm.graph.nodes if getattr(node.target, "__name__", "") == SET] == [
        (False,),
        (True,),
        (False,),
        (True,),
    ]
    facts = Facts(gm.graph)
    products = gm.graph.find_nodes(op="call_function", target=torch.ops.aten.mul.Tensor)
    recorded = {node.args[1]: facts.differentiates(node) for node in products}
    assert recorded == {2.0: True, 3.0: False, 4.0: True, 5.0: False, 6.0: True}


def test_inference_mode_stays_in_the_graph() -> None:
    gm = capture(in_inference_mode, torch.ones(3, requires_grad=True)).graph
    names = targets(gm)
    inside = names[names.index("_enter_inference_mode") : names.index("_exit_inference_mode")]
    assert "aten.abs.default" in inside
    assert "aten.sin.default" not in inside
    (absolute,) = gm.graph.find_nodes(op="call_function", target=torch.ops.aten.abs.default)
    (sine,) = gm.graph.find_nodes(op="call_function", target=torch.ops.aten.sin.default)
    facts = Facts(gm.graph)
    assert (facts.differentiates(absolute), facts.differentiates(sine)) == (False, True)


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_modes_around_the_compiled_function(mode: Any) -> None:
    x = torch.randn(1, 1, 4, 4, requires_grad=True)
    compiled = compile_fxopt(attention_in_no_grad)
    with all_handled() as records, mode():
        got = compiled(x)
        torch.testing.assert_close(got, attention_in_no_grad(x))
    assert not got[0].requires_grad
    assert records[0].applied("rewrite-attention")


def test_whole_computations_are_rewritten_in_their_mode_cut_ones_are_not() -> None:
    x = torch.randn(1, 1, 4, 4, requires_grad=True)
    with all_handled() as records:
        compile_fxopt(attention_in_no_grad)(x)
        compile_fxopt(attention_weights_cut_off)(x)
    whole, cut = records
    assert len(whole.applied("rewrite-attention")) == 1
    assert not cut.applied("rewrite-attention")
    reasons = [entry.reason for entry in cut.evidence if entry.rewrite == "rewrite-attention"]
    assert any("grad" in reason for reason in reasons), reasons


def test_gradients_do_not_flow_through_what_was_cut_off() -> None:
    grads = []
    for call in (noops_at_a_border, compile_fxopt(noops_at_a_border)):
        x = torch.ones(3, requires_grad=True)
        call(x)[0].sum().backward()
        grads.append(x.grad)
    assert torch.equal(grads[0], grads[1])  # type: ignore[arg-type]
