"""A graph that cannot be normalized goes to the host as Dynamo gave it, and the record says why."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import fx

import fxopt.pipeline as pipeline
from fxopt.frontend.normalize import normalize
from fxopt.frontend.retrace import CannotNormalize
from fxopt.hosts.host import Host
from fxopt.report.record import collect
from support.compiled import all_handled, compile_fxopt

EAGER = {"host": "eager"}


def attend(q: torch.Tensor) -> torch.Tensor:
    return torch.softmax(q @ q.transpose(-1, -2) * 0.5, -1) @ q


Hosted = list[tuple[fx.GraphModule, str]]


@pytest.fixture
def hosted(monkeypatch: pytest.MonkeyPatch) -> Hosted:
    """What the host was given: the module, and its code at that time."""
    given: Hosted = []

    def take(gm: fx.GraphModule, inputs: Any, options: Any, notes: Any) -> Callable[..., Any]:
        given.append((gm, gm.code))
        return gm.forward

    monkeypatch.setattr(pipeline, "choose_host", lambda options, inputs: Host("watched", take))
    return given


def dynamos_code(function: Callable[..., Any], *inputs: Any) -> str:
    seen: list[str] = []

    def backend(gm: fx.GraphModule, example_inputs: Any) -> Callable[..., Any]:
        seen.append(gm.code)
        return gm.forward

    torch._dynamo.reset()
    torch.compile(function, backend=backend)(*inputs)
    torch._dynamo.reset()
    return seen[0]


def failing(error: BaseException) -> Callable[..., Any]:
    def fail(*args: Any, **kwargs: Any) -> Any:
        raise error

    return fail


# What is broken, with what, and what the record says.
FAULTS: dict[str, tuple[str, BaseException]] = {
    "no fake mode": ("fxopt.frontend.normalize._fake_mode", CannotNormalize("no fake mode")),
    "inputs": ("fxopt.frontend.normalize._fake_inputs", ValueError("inputs")),
    "a call": ("fxopt.frontend.retrace._refuse_call", CannotNormalize("a call")),
    "tracing": ("fxopt.frontend.retrace._tracer", RuntimeError("tracing")),
    "metadata": ("fxopt.frontend.normalize._carry_over", KeyError("metadata")),
}


@pytest.mark.parametrize("name", FAULTS)
def test_the_untouched_graph_goes_to_the_host(
    monkeypatch: pytest.MonkeyPatch, hosted: Hosted, name: str
) -> None:
    where, error = FAULTS[name]
    text = str(error)  # the interpreter appends to it where it stood
    q = torch.randn(1, 2, 4, 4)
    wanted = dynamos_code(attend, q)
    monkeypatch.setattr(where, failing(error))
    with collect() as records:
        got = torch.compile(attend, backend="fxopt")(q)
    assert torch.equal(got, attend(q))
    assert [code for _, code in hosted] == [wanted]
    (record,) = records
    assert (record.normalized, record.evidence, record.error) == (False, [], "")
    (entry,) = record.refusals if isinstance(error, CannotNormalize) else record.failures
    assert entry[0] == "normalize"
    assert text in entry[1]


@pytest.mark.parametrize("stage", ["rewrite", "lower"])
def test_a_later_stage_that_fails_hands_over_dynamos_graph_too(
    monkeypatch: pytest.MonkeyPatch, hosted: Hosted, stage: str
) -> None:
    q = torch.randn(1, 2, 4, 4)
    wanted = dynamos_code(attend, q)
    monkeypatch.setattr(pipeline, stage, failing(RuntimeError(f"broken {stage}")))
    with collect() as records:
        got = torch.compile(attend, backend="fxopt")(q)
    assert torch.equal(got, attend(q))
    assert [code for _, code in hosted] == [wanted]
    assert records[0].failures == [("passes", f"RuntimeError: broken {stage}")]


def test_a_refusal_is_no_error_even_if_strict(monkeypatch: pytest.MonkeyPatch) -> None:
    """Only faults of fxopt are."""
    monkeypatch.setattr("fxopt.frontend.retrace._refuse_call", failing(CannotNormalize("by design")))
    q = torch.randn(1, 2, 4, 4)
    got = torch.compile(attend, backend="fxopt", options={**EAGER, "strict": True})(q)
    assert torch.equal(got, attend(q))


def test_a_fault_is_raised_if_strict(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("fxopt.frontend.retrace._refuse_call", failing(ZeroDivisionError("a fault")))
    compiled = torch.compile(attend, backend="fxopt", options={**EAGER, "strict": True})
    with pytest.raises(Exception, match="a fault"):
        compiled(torch.randn(1, 2, 4, 4))


def test_the_rest_of_a_model_is_optimized(monkeypatch: pytest.MonkeyPatch) -> None:
    """A refusal is of one graph."""

    def f(q: torch.Tensor) -> torch.Tensor:
        y = torch.func.grad(lambda x: x.sin().sum())(q)
        torch._dynamo.graph_break()
        return attend(y)

    q = torch.randn(1, 2, 4, 4)
    with collect() as records:
        got = torch.compile(f, backend="fxopt", options=EAGER)(q)
    assert [record.normalized for record in records] == [False, True]
    assert len(records[1].applied("rewrite-attention")) == 1, records[1].evidence
    torch.testing.assert_close(got, f(q))


def test_dynamos_own_exceptions_pass_through(monkeypatch: pytest.MonkeyPatch) -> None:
    """With these Dynamo restarts its analysis or skips the frame: they are no faults."""
    from torch._dynamo.exc import SkipFrame

    monkeypatch.setattr("fxopt.frontend.normalize._fake_inputs", failing(SkipFrame("wanted by the test")))
    q = torch.randn(1, 2, 4, 4)
    with collect() as records:
        got = torch.compile(attend, backend="fxopt", options={**EAGER, "strict": True})(q)
    assert torch.equal(got, attend(q))
    assert [record.failures for record in records] == [[]]


def test_a_graph_that_dynamo_did_not_capture_is_refused() -> None:
    gm = fx.symbolic_trace(lambda x: x + 1)
    with pytest.raises(CannotNormalize, match="no fake mode"):
        normalize(gm, [torch.ones(2)])


def test_inputs_that_do_not_fit_are_refused() -> None:
    def backend(gm: fx.GraphModule, inputs: Any) -> Callable[..., Any]:
        with pytest.raises(CannotNormalize, match="1 placeholders, 2 inputs"):
            normalize(gm, [*inputs, *inputs])
        return gm.forward

    torch.compile(lambda x: x + 1, backend=backend)(torch.ones(2))


@torch.library.custom_op("fxopt_tests::without_fake", mutates_args=())
def without_fake(x: torch.Tensor) -> torch.Tensor:
    return x.sin()


@pytest.mark.parametrize("fullgraph", [False, True])
def test_a_custom_op_without_fake_implementation(fullgraph: bool) -> None:
    """Dynamo itself refuses it, before any backend is asked: the error is the one of every backend."""

    def f(x: torch.Tensor) -> torch.Tensor:
        return without_fake(x * 1.0) + 1.0

    errors = []
    for backend in ("eager", "fxopt"):
        torch._dynamo.reset()
        with pytest.raises(Exception, match="fake impl") as caught:
            torch.compile(f, backend=backend, fullgraph=fullgraph)(torch.ones(2))
        errors.append(type(caught.value))
    assert errors[0] is errors[1]


def test_a_custom_op_with_fake_implementation_stays_a_call() -> None:
    @torch.library.custom_op("fxopt_tests::with_fake", mutates_args=())
    def with_fake(x: torch.Tensor) -> torch.Tensor:
        return x.sin()

    with_fake.register_fake(torch.empty_like)
    with collect() as records:
        got = torch.compile(lambda x: with_fake(x) * 1.0 + 1.0, backend="fxopt", options=EAGER)(torch.ones(2))
    assert records[0].normalized
    torch.testing.assert_close(got, torch.ones(2).sin() + 1.0)


def centred(x: torch.Tensor) -> torch.Tensor:
    """Attention to what is left of x without its mean, which gets no gradient."""
    return attend(x) * (x - x.data.mean(1, keepdim=True))


def test_data_of_a_tensor_is_read() -> None:
    x = torch.randn(2, 5, 8, requires_grad=True)
    with all_handled() as records:
        found = compile_fxopt(centred)(x)
    assert len(records[0].applied("rewrite-attention")) == 1
    wanted = centred(x)
    torch.testing.assert_close(found, wanted)
    torch.testing.assert_close(
        torch.autograd.grad(found.square().sum(), x), torch.autograd.grad(wanted.square().sum(), x)
    )


@pytest.mark.parametrize("view", [False, True])
def test_a_write_to_the_data_of_a_tensor_is_refused(view: bool) -> None:
    def write(x: torch.Tensor) -> torch.Tensor:
        data = x.data.view(-1)[:4] if view else x.data
        data.mul_(2.0)
        return x * 3

    given, other = torch.ones(3, 4), torch.ones(3, 4)
    with collect() as records:
        found = compile_fxopt(write)(given)
    assert "writes to the .data of a tensor" in records[0].refusals[0][1]
    assert torch.equal(found, write(other))
    assert torch.equal(given, other)
