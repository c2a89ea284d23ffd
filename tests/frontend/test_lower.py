"""Lowering: semantic ops become what their providers compute; nothing of fxopt is left for the host."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import fx, nn

import fxopt.pipeline as pipeline
from fxopt.frontend import lower as module
from fxopt.frontend.lower import lower
from fxopt.frontend.retrace import traced
from fxopt.hosts.eager import EAGER
from fxopt.ir.contract import Verdict
from fxopt.ir.ops import Provider, SemanticOp, semantic_op
from fxopt.options import Options
from fxopt.report.record import GraphRecord, collect
from support.compiled import all_handled, compile_fxopt
from support.frontend import calls, capture, targets

Function = Callable[..., Any]


def lowered(function: Function, *inputs: Any, **how: Any) -> tuple[fx.GraphModule, GraphRecord]:
    """The graph of a function after all passes and lowering."""
    gm = capture(function, *inputs, **how).graph
    record = GraphRecord(0)
    pipeline.rewrite(gm, Options(strict=True), record)
    assert any(semantic_op(node) is not None for node in calls(gm))
    return lower(gm, record), record


def norm(x: torch.Tensor) -> torch.Tensor:
    return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-6)


def attend(q: torch.Tensor) -> torch.Tensor:
    return torch.softmax(q @ q.transpose(-1, -2) * 0.5, -1) @ q


def sum_and_norm(x: torch.Tensor, y: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    total = x + y
    return norm(total), total * 2.0


def layers(x: torch.Tensor) -> torch.Tensor:
    for _ in range(4):
        x = x + attend(norm(x))
    return x


FXOPT: dict[str, Any] = {"backend": "fxopt", "options": {"host": "eager", "strict": True}}
X = torch.linspace(-1.0, 1.0, 24).view(1, 2, 3, 4)
CASES: dict[str, tuple[Function, tuple[torch.Tensor, ...]]] = {
    "norm": (norm, (X,)),
    "attention": (attend, (X,)),
    "two results": (sum_and_norm, (X, X + 1.0)),
    "layers": (layers, (X,)),
    "in a branch": (lambda x: torch.cond(x.sum() > 9.0, norm, attend, (x,)), (X,)),
}


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("dynamic", [False, True])
def test_the_host_gets_plain_aten_with_the_same_answer(name: str, dynamic: bool) -> None:
    function, inputs = CASES[name]
    gm, record = lowered(function, *inputs, dynamic=dynamic)
    assert not [node for node in calls(gm) if semantic_op(node) is not None]
    gm.graph.lint()
    want = function(*inputs)
    if not dynamic:  # the order of a dynamic graph's inputs, which begin with sizes, is Dynamo's business
        got = EAGER.compile(gm, inputs, Options(), GraphRecord(0))(*inputs)
        torch.testing.assert_close(got, want if isinstance(want, tuple) else (want,))
    assert len(record.providers) == len(record.chosen) >= 1
    with all_handled():
        torch.testing.assert_close(torch.compile(function, dynamic=dynamic, **FXOPT)(*inputs), want)


def test_values_of_what_is_inserted_are_those_of_the_graph() -> None:
    gm, _ = lowered(layers, X)
    for node in gm.graph.nodes:
        if isinstance(node.target, torch._ops.OpOverload):
            assert isinstance(node.meta["val"], torch.Tensor)
    (returned,) = gm.graph.output_node().all_input_nodes
    assert returned.meta["val"].shape == X.shape


class Norm(nn.Module):
    def __init__(self, eps: float) -> None:
        super().__init__()
        self.eps = eps

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + self.eps)


# With dynamic=True each module's number is a symbol of its own.
NORMS = nn.Sequential(*(Norm(eps) for eps in (1e-6, 0.5, 2.0)))


@pytest.mark.parametrize(("function", "dynamic"), [(layers, False), (NORMS, True)])
def test_equal_calls_are_traced_once(
    function: Function, dynamic: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[int] = []

    def counting(*args: Any) -> fx.GraphModule:
        seen.append(1)
        return traced(*args)

    gm = capture(function, X, dynamic=dynamic).graph
    record = GraphRecord(0)
    pipeline.rewrite(gm, Options(strict=True), record)
    monkeypatch.setattr(module, "traced", counting)
    lower(gm, record)
    kinds = {str(entry) for entry in record.providers}
    assert len(seen) == len(kinds) < len(record.providers)
    with all_handled():
        got = torch.compile(function, dynamic=dynamic, **FXOPT)(X)
    torch.testing.assert_close(got, function(X))


def scores(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    return torch.softmax(q @ k.transpose(-1, -2) * 0.5, -1) @ v


def normed_queries_and_keys(x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    """The norms share a trace, so that queries and keys are copies of one node of it."""
    return scores(norm(x), norm(y), y * x)


def attention_to_itself_first(x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    """The trace of a call with one argument three times is that of the call with three."""
    return scores(x, x, x) + scores(x, y, y * x)


@pytest.mark.parametrize("dynamic", [False, True])
@pytest.mark.parametrize("function", [normed_queries_and_keys, attention_to_itself_first])
def test_arguments_of_one_form_are_not_taken_for_one(function: Function, dynamic: bool) -> None:
    inputs = [X.clone().requires_grad_(), X.flip(-1).sin().requires_grad_()]
    with all_handled():
        got = torch.compile(function, dynamic=dynamic, **FXOPT)(*inputs)
    want = function(*inputs)
    torch.testing.assert_close(got, want)
    grads = (torch.autograd.grad(one.square().sum(), inputs) for one in (got, want))
    for mine, theirs in zip(*grads, strict=True):
        torch.testing.assert_close(mine, theirs)


def test_calls_that_differ_in_dtype_or_shape_are_traced_apart() -> None:
    def function(x: torch.Tensor, y: torch.Tensor, z: torch.Tensor) -> tuple[torch.Tensor, ...]:
        return norm(x), norm(y), norm(z)

    inputs = X, X.double(), X[..., :2].contiguous()
    with all_handled() as records:
        got = compile_fxopt(function)(*inputs)
    assert len(records[0].applied("fuse-rms-norm")) == 3
    torch.testing.assert_close(got, function(*inputs))


def test_inside_of_autocast_the_ops_stand_in_a_region_that_is_off() -> None:
    def function(x: torch.Tensor) -> torch.Tensor:
        with torch.autocast("cpu", dtype=torch.bfloat16):
            return attend(x @ x.transpose(-1, -2) @ x)

    gm, _ = lowered(function, X)
    enters = [
        node.args for node in gm.graph.nodes if getattr(node.target, "__name__", "") == "_enter_autocast"
    ]
    assert [args[2] for args in enters] == [True, False]
    names = targets(gm)
    off = names.index("_enter_autocast", names.index("_enter_autocast") + 1)
    inside = names[off : names.index("_exit_autocast")]
    assert "aten.softmax.int" in inside or "aten.scaled_dot_product_attention.default" in inside
    with all_handled():
        got = compile_fxopt(function)(X)
    assert got.dtype == torch.bfloat16
    assert not torch.is_autocast_enabled("cpu")


def test_outside_of_autocast_no_region_is_opened() -> None:
    gm, _ = lowered(layers, X)
    assert "_enter_autocast" not in targets(gm)


def test_the_chosen_provider_and_the_refused_ones_are_recorded() -> None:
    _, record = lowered(attend, X)
    ((op, provider, refused),) = record.providers
    assert op == "attention"
    assert list(record.chosen.values()) == [provider]
    long = torch.ones(1, 1, 80, 4)
    _, other = lowered(attend, long)
    assert {op, other.providers[0][0]} == {"attention"}
    assert (provider, other.providers[0][1]) == ("decomposed", "sdpa")
    assert refused == "blocks: the CPU's kernel knows this mask"
    assert "decomposed: " in other.providers[0][2]


def test_a_graph_without_semantic_ops_stays_as_it_is() -> None:
    gm = capture(lambda x: x.sin() * 2.0, X).graph
    before = gm.code
    assert lower(gm, GraphRecord(0)) is gm
    assert gm.code == before


def test_a_body_that_holds_state_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """A tensor made at trace time would be shared by all calls: the untouched graph goes to the host."""
    stateful = Provider("stateful", lambda *_: Verdict.yes(), lambda x, *_, **__: x * torch.tensor([2.0] * 4))
    monkeypatch.setattr(SemanticOp, "choose", lambda op, node, facts: (stateful, []))
    with collect() as records:
        got = torch.compile(norm, backend="fxopt", options={"host": "eager"})(X)
    assert "holds state" in records[0].failures[0][1]
    torch.testing.assert_close(got, norm(X))


def test_training_gives_eagers_gradients_through_lowered_ops() -> None:
    weight = nn.Parameter(torch.ones(4))
    gradients = []
    for call in (layers, compile_fxopt(layers)):
        x = (X * weight).detach().requires_grad_()
        call(x).square().sum().backward()
        gradients.append(x.grad)
    torch.testing.assert_close(gradients[1], gradients[0])
