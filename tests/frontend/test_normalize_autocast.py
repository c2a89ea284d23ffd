"""Autocast regions stay as regions, values are what autocast makes of them, rewrites state their casts."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import fx, nn

from fxopt.ir.facts import dtype
from fxopt.ir.graph_facts import Facts
from fxopt.report.record import collect
from support.compiled import all_handled, compile_fxopt
from support.frontend import capture, targets
from support.numerics import assert_closer

ENTER, EXIT = "_enter_autocast", "_exit_autocast"
BF16 = torch.bfloat16


def in_region(x: torch.Tensor, w: torch.Tensor) -> torch.Tensor:
    with torch.autocast("cpu", dtype=BF16):
        y = x @ w
        return nn.functional.mse_loss(y, x)


def disabled_inside(x: torch.Tensor, w: torch.Tensor) -> tuple[torch.Tensor, ...]:
    with torch.autocast("cpu", dtype=BF16):
        y = x @ w
        with torch.autocast("cpu", enabled=False):
            z = y.float() @ w
        return z, z @ w


def named(gm: fx.GraphModule, name: str) -> list[fx.Node]:
    return [node for node in gm.graph.nodes if str(node.target) == name]


def test_values_are_what_autocast_makes_of_them() -> None:
    gm = capture(in_region, torch.randn(3, 3), torch.randn(3, 3)).graph
    (product,), (loss,) = named(gm, "aten.matmul.default"), named(gm, "aten.mse_loss.default")
    assert (dtype(product), dtype(loss)) == (BF16, torch.float32)
    # No cast is written: the host enters the region and casts as eager does.
    assert not named(gm, "aten.to.dtype")
    assert (targets(gm)[0], targets(gm)[-1]) == (ENTER, EXIT)


def test_regions_nest() -> None:
    found = capture(disabled_inside, torch.randn(3, 3), torch.randn(3, 3))
    gm = found.graph
    facts = Facts(gm.graph)
    inside, disabled, again = named(gm, "aten.matmul.default")
    assert [dtype(node) for node in (inside, disabled, again)] == [BF16, torch.float32, BF16]
    assert [facts.in_autocast(node) for node in (inside, disabled, again)] == [True, False, True]
    assert [name for name in targets(gm) if name in (ENTER, EXIT)] == [ENTER, ENTER, EXIT, EXIT]
    first, second = (node for node in gm.graph.nodes if getattr(node.target, "__name__", "") == ENTER)
    exits = [node.args[0] for node in gm.graph.nodes if getattr(node.target, "__name__", "") == EXIT]
    assert exits == [second, first]


@pytest.mark.parametrize("function", [in_region, disabled_inside])
@pytest.mark.parametrize("host", ["eager", "inductor"])
def test_answers_and_dtypes_are_eagers(function: Callable[..., Any], host: str) -> None:
    inputs = torch.randn(3, 3), torch.randn(3, 3)
    with all_handled():
        got = compile_fxopt(function, host)(*inputs)
    torch.testing.assert_close(got, function(*inputs))


def test_autocast_around_the_compiled_function() -> None:
    """Dynamo sees no region then: the mode is on while fxopt traces, and when the host runs."""

    def f(x: torch.Tensor, w: torch.Tensor) -> torch.Tensor:
        return torch.softmax(x @ w, -1) @ w

    inputs = torch.randn(3, 3), torch.randn(3, 3)
    compiled = compile_fxopt(f)
    with all_handled() as records:
        with torch.autocast("cpu", dtype=BF16):
            got, want = compiled(*inputs), f(*inputs)
        assert got.dtype == BF16
        torch.testing.assert_close(got, want)
        torch.testing.assert_close(compiled(*inputs), f(*inputs))
    assert len(records) == 2


def norm_and_attention(x: torch.Tensor, k: torch.Tensor, norm: nn.RMSNorm) -> torch.Tensor:
    q = x @ k
    q = q * torch.rsqrt(q.pow(2).mean(-1, keepdim=True) + 1e-6) * norm.weight
    return torch.softmax(q @ k.transpose(-1, -2) * 0.5, -1) @ k


def spelled_in_float64(x: torch.Tensor, k: torch.Tensor, norm: nn.RMSNorm) -> torch.Tensor:
    return norm_and_attention(x.double(), k.double(), copy.deepcopy(norm).double())


@pytest.mark.parametrize("inside", [True, False])
def test_rewrites_state_their_casts(inside: bool) -> None:
    """The region is in the graph or around it; the norm's result is float32, which the matmul converts."""

    def f(*inputs: Any) -> torch.Tensor:
        with torch.autocast("cpu", dtype=BF16, enabled=inside or torch.is_autocast_enabled("cpu")):
            return norm_and_attention(*inputs)

    inputs = torch.randn(1, 2, 4, 4), torch.randn(1, 2, 4, 4), nn.RMSNorm(4)
    with all_handled() as records, torch.autocast("cpu", dtype=BF16, enabled=not inside):
        got = compile_fxopt(f if inside else norm_and_attention)(*inputs)
        want = f(*inputs)
    assert records[0].applied("fuse-rms-norm")
    assert records[0].applied("rewrite-attention")
    assert got.dtype == want.dtype == BF16
    assert_closer(spelled_in_float64(*inputs), got, want)


def test_a_computation_that_crosses_a_border_is_left_alone() -> None:
    def f(x: torch.Tensor) -> torch.Tensor:
        with torch.autocast("cpu", dtype=BF16):
            scores = x @ x.transpose(-1, -2)
        return torch.softmax(scores * 0.5, -1) @ x.to(BF16)

    x = torch.randn(1, 2, 4, 4)
    with all_handled() as records:
        got = compile_fxopt(f)(x)
    assert not records[0].applied("rewrite-attention")
    assert torch.equal(got, f(x))


def test_autocast_that_is_switched_without_a_region_goes_to_the_host() -> None:
    def f(x: torch.Tensor) -> torch.Tensor:
        torch.set_autocast_enabled("cpu", True)
        y = x @ x
        torch.set_autocast_enabled("cpu", False)
        return y

    x = torch.randn(3, 3)
    with collect() as records:
        got = compile_fxopt(f)(x)
    assert [record.refusals for record in records] == [
        [("normalize", "autocast is switched by set_autocast_enabled, not by a region")]
    ]
    assert got.dtype == BF16
    assert torch.equal(got, f(x))


def test_a_trace_that_fails_inside_a_region_leaves_it(monkeypatch: pytest.MonkeyPatch) -> None:
    from fxopt.frontend.retrace import Retrace

    original = Retrace.call_function

    def failing(self: Retrace, target: Any, args: Any, kwargs: Any) -> Any:
        if target is nn.functional.mse_loss:
            raise RuntimeError("in the region")
        return original(self, target, args, kwargs)

    monkeypatch.setattr(Retrace, "call_function", failing)
    inputs = torch.randn(3, 3), torch.randn(3, 3)
    with collect() as records:
        got = torch.compile(in_region, backend="fxopt", options={"host": "eager"})(*inputs)
    assert "in the region" in records[0].failures[0][1]
    assert not torch.is_autocast_enabled("cpu")
    assert torch.equal(got, in_region(*inputs))
