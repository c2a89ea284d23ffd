"""Tracing leaves the state of torch as it found it, and what a graph does to that state is still done."""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from fxopt.frontend.normalize import normalize
from fxopt.frontend.retrace import CannotNormalize
from fxopt.report.record import collect
from support.compiled import all_handled, compile_fxopt
from support.frontend import capture, targets

SDP = (
    "flash_sdp_enabled",
    "mem_efficient_sdp_enabled",
    "math_sdp_enabled",
    "cudnn_sdp_enabled",
)


def state() -> dict[str, Any]:
    return {
        "default dtype": torch.get_default_dtype(),
        "deterministic": torch.are_deterministic_algorithms_enabled(),
        "warn only": torch.is_deterministic_algorithms_warn_only_enabled(),
        "precision": torch.get_float32_matmul_precision(),
        "grad": torch.is_grad_enabled(),
        "inference": torch.is_inference_mode_enabled(),
        "autocast": torch.is_autocast_enabled("cpu"),
        "anomaly": torch.is_anomaly_enabled(),
        "threads": torch.get_num_threads(),
        "random": torch.get_rng_state().tolist(),
        **{name: getattr(torch.backends.cuda, name)() for name in SDP},
    }


@pytest.fixture(autouse=True)
def state_put_back() -> Iterator[None]:
    before = state()
    yield
    torch.set_default_dtype(before["default dtype"])
    torch.use_deterministic_algorithms(before["deterministic"], warn_only=before["warn only"])
    torch.set_float32_matmul_precision(before["precision"])
    torch.set_grad_enabled(before["grad"])
    for name in SDP:
        getattr(torch.backends.cuda, f"enable_{name.removesuffix('_enabled')}")(before[name])


def switches(x: torch.Tensor) -> torch.Tensor:
    """Leaves everything changed."""
    torch.set_default_dtype(torch.float64)
    torch.set_float32_matmul_precision("medium")
    torch._C._set_grad_enabled(False)
    return torch.ones(3) + x


def random_numbers(x: torch.Tensor) -> torch.Tensor:
    return nn.functional.dropout(x, 0.5, training=True) + torch.rand(3) + torch.randn_like(x)


def one_kernel(x: torch.Tensor) -> torch.Tensor:
    with sdpa_kernel(SDPBackend.MATH):
        y = nn.functional.scaled_dot_product_attention(x, x, x)
    return y + nn.functional.scaled_dot_product_attention(y, x, x)


def inference_mode_inside(x: torch.Tensor) -> torch.Tensor:
    with torch.inference_mode(), torch.autocast("cpu", dtype=torch.bfloat16):
        y = x @ x
    return y.clone() * 2.0


FUNCTIONS: dict[str, tuple[Callable[..., torch.Tensor], tuple[int, ...]]] = {
    "switches": (switches, (3,)),
    "random numbers": (random_numbers, (3,)),
    "one kernel": (one_kernel, (1, 1, 3, 3)),
    "inference mode inside": (inference_mode_inside, (3, 3)),
}


States = list[tuple[dict[str, Any], dict[str, Any]]]


@pytest.fixture
def states(monkeypatch: pytest.MonkeyPatch) -> States:
    """The state before and after each normalization; Dynamo, around it, puts back some of it itself."""
    seen: States = []

    def watched(gm: Any, inputs: Any) -> Any:
        before = state()
        try:
            return normalize(gm, inputs)
        finally:
            seen.append((before, state()))

    monkeypatch.setattr("support.frontend.normalize", watched)
    return seen


@pytest.mark.parametrize("name", FUNCTIONS)
def test_compiling_changes_nothing(states: States, name: str) -> None:
    function, shape = FUNCTIONS[name]
    capture(function, torch.ones(shape))
    ((before, after),) = states
    assert after == before


@pytest.mark.parametrize(
    ("name", "at"),
    [
        ("switches", operator.add),
        ("random numbers", torch.rand),
        ("inference mode inside", operator.matmul),
        ("one kernel", nn.functional.scaled_dot_product_attention),
    ],
)
def test_a_trace_that_stops_half_way_changes_nothing(
    monkeypatch: pytest.MonkeyPatch, states: States, name: str, at: Any
) -> None:
    def refuse(target: Any) -> None:
        if target is at:
            raise CannotNormalize("wanted by the test")

    monkeypatch.setattr("fxopt.frontend.retrace._refuse_call", refuse)
    function, shape = FUNCTIONS[name]
    with pytest.raises(Exception, match="wanted by the test"):
        capture(function, torch.ones(shape))
    ((before, after),) = states
    assert after == before


@pytest.mark.parametrize("name", FUNCTIONS)
def test_the_compiled_function_does_to_the_state_what_the_function_does(name: str) -> None:
    function, shape = FUNCTIONS[name]
    results = []
    before = state()
    compiled = compile_fxopt(function)
    for call in (function, compiled):
        torch.set_default_dtype(before["default dtype"])
        torch.set_float32_matmul_precision(before["precision"])
        torch.set_grad_enabled(True)
        torch.manual_seed(5)
        y = call(torch.ones(shape))
        results.append((y, state()))
    (want, want_state), (got, got_state) = results
    torch.testing.assert_close(got, want)
    assert got.dtype == want.dtype
    assert got_state == want_state


def test_calls_that_act_on_the_state_alone_are_kept_in_order() -> None:
    names = targets(capture(switches, torch.ones(3)).graph)
    assert names == [
        "set_default_dtype",
        "set_float32_matmul_precision",
        "_set_grad_enabled",
        "aten.ones.default",
        "aten.add.Tensor",
    ]


def test_kernels_chosen_by_the_user_bracket_the_same_attention() -> None:
    names = targets(capture(one_kernel, torch.ones(1, 1, 3, 3)).graph)
    attention = "aten.scaled_dot_product_attention.default"
    kept = [name for name in names if name in ("_sdpa_kernel", attention)]
    assert kept == ["_sdpa_kernel", attention, "_sdpa_kernel", attention]


def test_random_numbers_are_the_same_at_every_call() -> None:
    compiled = compile_fxopt(random_numbers)
    x = torch.ones(3)
    with all_handled() as records:
        for seed in (0, 1):
            torch.manual_seed(seed)
            got = [compiled(x), compiled(x)]
            torch.manual_seed(seed)
            assert torch.equal(torch.stack(got), torch.stack([random_numbers(x), random_numbers(x)]))
    assert len(records) == 1


def test_compiling_draws_no_random_number() -> None:
    torch.manual_seed(7)
    torch.compile(random_numbers, backend="fxopt", options={"host": "eager"})(torch.ones(3))
    drawn = torch.rand(2)
    torch.manual_seed(7)
    random_numbers(torch.ones(3))
    assert torch.equal(drawn, torch.rand(2))


def test_deterministic_algorithms_are_on_while_the_graph_runs() -> None:
    def f(x: torch.Tensor) -> torch.Tensor:
        return torch.empty(4) + x.sum() * 0.0

    compiled = compile_fxopt(f)
    torch.use_deterministic_algorithms(True)
    with collect() as records:
        assert compiled(torch.ones(3)).isnan().all()  # as eager fills uninitialised memory then
    assert records[0].normalized
    assert torch.are_deterministic_algorithms_enabled()
