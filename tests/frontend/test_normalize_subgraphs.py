"""Higher-order ops stay calls; the code that they call is normalized as well, however deep it is."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import fx, nn
from torch._higher_order_ops.map import map as map_rows
from torch._higher_order_ops.scan import scan
from torch._higher_order_ops.while_loop import while_loop
from torch.nn.attention.flex_attention import flex_attention
from torch.utils.checkpoint import checkpoint

from fxopt.frontend.subgraphs import OUTER_KEY
from fxopt.ir.ops import semantic_op
from fxopt.report.record import collect
from support.compiled import all_handled, compile_fxopt
from support.frontend import calls, capture, subgraph_targets, targets, watch_lowered


def soften(x: torch.Tensor) -> torch.Tensor:
    """Two ops that Dynamo writes as a method and as a function of torch.nn."""
    return nn.functional.softmax(x.mul(2.0), dim=-1)


SOFTEN = ["aten.mul.Tensor", "aten.softmax.int"]


@torch.compiler.nested_compile_region
def region(x: torch.Tensor) -> torch.Tensor:
    return soften(x)


@torch.compiler.nested_compile_region
def region_with_a_branch(x: torch.Tensor) -> torch.Tensor:
    return torch.cond(x.sum() > 0, soften, torch.cos, (x,))


class TwiceInBackward(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: torch.Tensor) -> torch.Tensor:
        return x * 2.0

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> torch.Tensor:
        return grad * 5.0


def branch(x: torch.Tensor) -> torch.Tensor:
    return torch.cond(x.sum() > 0, soften, torch.cos, (x,)) + 1.0


def branch_in_branch(x: torch.Tensor) -> torch.Tensor:
    def outer(x: torch.Tensor) -> torch.Tensor:
        return torch.cond(x.max() > 1.0, soften, torch.sin, (x,))

    return torch.cond(x.sum() > 0, outer, torch.cos, (x,))


def checkpointed(x: torch.Tensor) -> torch.Tensor:
    return checkpoint(soften, x, use_reentrant=False)


def checkpoint_in_checkpoint(x: torch.Tensor) -> torch.Tensor:
    return checkpoint(lambda x: checkpointed(x) + 1.0, x, use_reentrant=False)


def in_regions(x: torch.Tensor) -> torch.Tensor:
    return region(x) + region(x + 1.0)


def branch_in_regions(x: torch.Tensor) -> torch.Tensor:
    return region_with_a_branch(x) + region_with_a_branch(x - 9.0)


NORMALIZED: dict[str, tuple[Callable[..., Any], str]] = {
    "cond": (branch, "cond"),
    "cond in cond": (branch_in_branch, "cond"),
    "checkpoint": (checkpointed, "tag_activation_checkpoint"),
    "checkpoint in checkpoint": (checkpoint_in_checkpoint, "tag_activation_checkpoint"),
    "nested region": (in_regions, "invoke_subgraph"),
    "cond in nested region": (branch_in_regions, "invoke_subgraph"),
}


def loop(x: torch.Tensor) -> torch.Tensor:
    return while_loop(lambda i, x: i < 3, lambda i, x: (i + 1, soften(x)), (torch.tensor(0), x))[1]


KEPT: dict[str, tuple[Callable[..., Any], str]] = {
    "while_loop": (loop, "while_loop"),
    "map": (lambda x: map_rows(soften, x), "map_impl"),
    "scan": (lambda x: scan(lambda c, row: (c + row, c * row), torch.zeros(4), x)[1], "scan"),
    "autograd.Function": (lambda x: TwiceInBackward.apply(x) * 3.0, "autograd_function_apply"),
    "flex_attention": (
        lambda x: flex_attention(*[x.expand(1, 2, 4, 4)] * 3, score_mod=lambda s, *at: s * 2.0),
        "flex_attention",
    ),
}


FORWARD_ONLY = ("while_loop", "scan", "flex_attention")  # no backward, or none on the CPU


@pytest.mark.parametrize("name", NORMALIZED)
def test_called_code_is_normalized(name: str) -> None:
    function, op = NORMALIZED[name]
    x = torch.rand(4, 4)
    found = capture(function, x, dynamic=False)
    assert op in " ".join(targets(found.graph))
    modules = [module for module in found.graph.modules() if isinstance(module, fx.GraphModule)]
    assert len(modules) > 1
    assert [node.op for module in modules for node in module.graph.nodes if node.op.startswith("call_")] == [
        "call_function"
    ] * sum(1 for _ in calls(found.graph))
    assert any(targets(module)[: len(SOFTEN)] == SOFTEN for module in modules[1:])
    torch.testing.assert_close(found.result, function(x))


@pytest.mark.parametrize("name", KEPT)
def test_code_that_is_no_plain_call_is_as_dynamo_wrote_it(name: str) -> None:
    function, op = KEPT[name]
    x = torch.rand(4, 4, requires_grad=name == "autograd.Function")
    found = capture(function, x)
    assert op in " ".join(targets(found.graph))
    assert subgraph_targets(found.graph) == subgraph_targets(found.dynamo[0])
    torch.testing.assert_close(found.result, function(x))


@pytest.mark.parametrize("name", [*NORMALIZED, *KEPT])
def test_answers_and_gradients_are_eagers(name: str) -> None:
    function, _ = {**NORMALIZED, **KEPT}[name]
    results = []
    with all_handled():
        for call in (function, compile_fxopt(function)):
            x = torch.linspace(-1.0, 2.0, 16).view(4, 4)
            x.requires_grad_(name not in FORWARD_ONLY)
            y = call(x)
            if x.requires_grad:
                y.square().sum().backward()
            results.append((y, x.grad))
    torch.testing.assert_close(results[1], results[0])


@pytest.mark.parametrize("name", NORMALIZED)
def test_passes_rewrite_called_code(name: str) -> None:
    """Attention that stands where `soften` stood."""
    function, _ = NORMALIZED[name]
    q = torch.rand(1, 2, 4, 4)

    def attend(x: torch.Tensor) -> torch.Tensor:
        return torch.softmax(x @ x.transpose(-1, -2) * 0.5, -1) @ x

    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(globals(), "soften", attend)
        want = function(q)
        with all_handled() as records:
            got = compile_fxopt(function)(q)
    assert records[0].applied("rewrite-attention")
    torch.testing.assert_close(got, want)


def test_both_branches_are_rewritten_and_the_right_one_runs() -> None:
    def f(x: torch.Tensor) -> torch.Tensor:
        return torch.cond(x.sum() > 0, lambda x: x * 1.0 + 1.0, lambda x: x * 1.0 - 1.0, (x,))

    compiled = compile_fxopt(f)
    with all_handled() as records:
        for sign in (1.0, -1.0):
            assert torch.equal(compiled(sign * torch.ones(3)), sign * 2.0 * torch.ones(3))
    assert len(records) == 1
    assert len(records[0].applied("eliminate-noops")) == 2


def test_a_region_called_twice_is_one_module() -> None:
    gm = capture(in_regions, torch.rand(4, 4)).graph
    held = [node.args[0].target for node in gm.graph.nodes if "invoke_subgraph" in str(node.target)]
    assert len(held) == 2
    assert len({id(getattr(gm, name)) for name in held}) == 1


def test_what_surrounds_a_call_keeps_its_name_free() -> None:
    """Sub-graph modules are registered by names that nothing else has."""

    def f(x: torch.Tensor) -> torch.Tensor:
        y = torch.cond(x.sum() > 0, soften, torch.cos, (x,))
        return torch.cond(y.sum() > 100.0, torch.sin, soften, (y,))

    x = torch.rand(4, 4)
    gm = capture(f, x).graph
    assert len([module for module in gm.children() if isinstance(module, fx.GraphModule)]) == 4
    torch.testing.assert_close(compile_fxopt(f)(x), f(x))


@pytest.mark.parametrize("in_dims", [0, 1])
def test_vmap_becomes_plain_aten(in_dims: int) -> None:
    def f(x: torch.Tensor) -> torch.Tensor:
        return torch.vmap(soften, in_dims=in_dims)(x) + 1.0

    x = torch.rand(3, 4)
    found = capture(f, x)
    assert all(isinstance(node.target, torch._ops.OpOverload) for node in calls(found.graph))
    torch.testing.assert_close(found.result, f(x))


def test_vmap_in_vmap() -> None:
    def f(x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        return torch.vmap(lambda a: torch.vmap(lambda b: (a * b).sum())(y))(x)

    x, y = torch.rand(3, 4), torch.rand(2, 4)
    found = capture(f, x, y)
    assert all(isinstance(node.target, torch._ops.OpOverload) for node in calls(found.graph))
    torch.testing.assert_close(found.result, f(x, y))


def test_a_grad_transform_is_left_to_the_host() -> None:
    def f(x: torch.Tensor) -> torch.Tensor:
        return torch.func.grad(lambda y: (y.sin() * y).sum())(x) * 2.0

    x = torch.rand(4)
    with collect() as records:
        got = compile_fxopt(f)(x)
    assert [record.normalized for record in records] == [False]
    (refusal,) = records[0].refusals
    assert refusal[0] == "normalize"
    assert "grad transform" in refusal[1]
    torch.testing.assert_close(got, f(x))


def test_nothing_of_fxopt_stays_in_the_lowered_graphs(monkeypatch: pytest.MonkeyPatch) -> None:
    lowered = watch_lowered(monkeypatch)
    norm = nn.RMSNorm(4)

    def f(x: torch.Tensor) -> torch.Tensor:
        def body(x: torch.Tensor) -> torch.Tensor:
            return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-6) * norm.weight

        return checkpoint(body, x, use_reentrant=False) + body(x)

    with all_handled() as records:
        compile_fxopt(f)(torch.rand(2, 4))
    assert len(records[0].applied("fuse-rms-norm")) == 2
    assert [node for node in calls(lowered[0]) if semantic_op(node) is not None] == []
    modules = [module for module in lowered[0].modules() if isinstance(module, fx.GraphModule)]
    assert len(modules) == 2
    inputs = [node for module in modules for node in module.graph.find_nodes(op="placeholder")]
    assert not any(OUTER_KEY in node.meta for node in inputs)
