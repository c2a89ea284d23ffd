"""`fxopt.explain`: what it finds, and that it leaves everything else as it was."""

from __future__ import annotations

import gc
import json
import random
import weakref
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from torch import fx, nn

import fxopt
from fxopt.errors import NotAModel, UnknownOption
from fxopt.ir.contract import Status
from fxopt.report.record import records
from support.compile_stats import Counting

explain = fxopt.explain.with_options(options={"host": "eager"})


def line_of(function: Callable[..., Any], text: str) -> str:
    """`file:line` of the first line of a function that holds `text`."""
    import inspect

    lines, start = inspect.getsourcelines(function)
    number = next(number for number, line in enumerate(lines) if text in line)
    return f"{inspect.getsourcefile(function)}:{start + number}"


class Block(nn.Module):
    """State of every kind that a careless call would change."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(6, 6)
        self.norm = nn.BatchNorm1d(6)
        self.register_buffer("seen", torch.zeros(()))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.seen.add_(1)
        return nn.functional.dropout(self.norm(self.linear(x)), 0.5, self.training)


def with_breaks(x: torch.Tensor) -> torch.Tensor:
    y = x.sin()
    torch._dynamo.graph_break()  # first
    y = y + 1
    if y.sum() > 0:  # second
        y = y * 2
    return y


def first_statement_breaks(x: torch.Tensor) -> torch.Tensor:
    torch._dynamo.graph_break()
    return x.cos()


def test_one_graph() -> None:
    report = explain(nn.Sequential(nn.Linear(6, 4), nn.GELU()), torch.randn(3, 6))
    (graph,) = report.graphs
    assert graph.normalized
    assert graph.host == "eager"
    assert graph.trains
    assert set(graph.seconds) == {"normalize", "passes", "lower", "host"}
    assert (report.breaks, report.recompiles, report.calls) == ([], [], 1)
    assert report.summary.startswith("1 graph (1 with a backward graph), 0 breaks, 0 recompiles; ")


def test_no_backward_graph_without_grad() -> None:
    with torch.no_grad():
        report = explain(nn.Linear(6, 4), torch.randn(3, 6))
    assert [graph.trains for graph in report.graphs] == [False]
    assert "backward" not in report.summary


def test_breaks_have_the_users_line_and_dynamos_reason() -> None:
    report = explain(with_breaks, torch.ones(3))
    found = {one.location: one.reason for one in report.breaks or ()}
    assert set(found) == {line_of(with_breaks, "first"), line_of(with_breaks, "second")}
    assert "graph_break" in found[line_of(with_breaks, "first")]
    assert "Data-dependent" in found[line_of(with_breaks, "second")]
    assert len(report.graphs) == 3
    assert found.keys() <= {line.strip() for line in report.to_json().replace('"', "\n").splitlines()}


def test_a_break_before_the_first_operation_counts() -> None:
    report = explain(first_statement_breaks, torch.ones(3))
    assert [one.location for one in report.breaks or ()] == [line_of(first_statement_breaks, "graph_break")]


def test_recompiles_name_the_guard_that_failed() -> None:
    def scale(x: torch.Tensor, by: int) -> torch.Tensor:
        return x * by

    report = explain(scale, torch.ones(3), 2)
    assert report.recompiles == []
    report.call(torch.ones(3), 2)
    assert report.recompiles == []
    report.call(torch.ones(5), 2)
    (first,) = report.recompiles or ()
    assert first.function == "scale"
    assert "size mismatch at index 0. expected 3, actual 5" in first.reasons[0]
    report.call(torch.ones(5, dtype=torch.float64), 2)
    assert len(report.recompiles or ()) == 2
    assert "dtype mismatch" in (report.recompiles or ())[1].reasons[0]
    assert [graph.dynamic for graph in report.graphs] == [False, True, True]
    assert report.calls == 4


def test_nothing_of_the_model_changes() -> None:
    model = Block().train()
    model.norm.eval()
    model.linear.weight.grad = torch.ones(6, 6)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    buffers = dict(model.named_buffers())
    torch.manual_seed(3)
    random.seed(3)
    torch_state, python_state = torch.get_rng_state(), random.getstate()

    explain(model, torch.randn(4, 6, generator=torch.Generator().manual_seed(0)))

    assert torch.equal(torch.get_rng_state(), torch_state)
    assert random.getstate() == python_state
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert all(value is buffers[name] for name, value in model.named_buffers())
    assert [part.training for part in model.modules()] == [True, True, False]
    assert torch.equal(model.linear.weight.grad, torch.ones(6, 6))
    assert model.linear.bias.grad is None
    hooks = [part._forward_hooks | part._forward_pre_hooks | part._backward_hooks for part in model.modules()]
    assert not any(hooks)


def test_state_is_put_back_when_the_model_raises() -> None:
    class Failing(Block):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            super().forward(x)
            self.eval()
            raise LookupError("no such thing")

    model = Failing().train()
    state = torch.get_rng_state()
    with pytest.raises(LookupError, match="no such thing"):
        explain(model, torch.randn(4, 6, generator=torch.Generator().manual_seed(0)))
    assert model.training
    assert model.seen.item() == 0
    assert torch.equal(torch.get_rng_state(), state)
    assert explain(nn.Linear(2, 2), torch.ones(1, 2)).graphs


def test_compiled_functions_of_the_user_are_not_disturbed() -> None:
    model = Block().eval()
    backend = Counting("eager")
    compiled = torch.compile(model, backend=backend)
    compiled(torch.randn(3, 6))
    assert len(backend.ids) == 1
    report = explain(model, torch.randn(3, 6)).call(torch.randn(5, 6))
    assert len(report.graphs) == 2
    assert len(report.recompiles or ()) == 1
    compiled(torch.randn(3, 6))
    assert len(backend.ids) == 1, "the user's compilation is gone"
    report.close()
    compiled(torch.randn(3, 6))
    assert len(backend.ids) == 1, "closing the report drops the user's compilation"


def test_sizes_seen_by_explain_make_nothing_dynamic_for_the_user() -> None:
    class Dynamic:
        """Notes which graphs have a symbolic input."""

        def __init__(self) -> None:
            self.found: list[bool] = []

        def __call__(self, gm: fx.GraphModule, inputs: Sequence[Any]) -> Callable[..., Any]:
            self.found.append(any(isinstance(value, torch.SymInt) for value in inputs))
            return gm.forward

    def double(x: torch.Tensor) -> torch.Tensor:
        return x * 2

    explain(double, torch.ones(3)).call(torch.ones(4))
    backend = Dynamic()
    compiled = torch.compile(double, backend=backend)
    compiled(torch.ones(5))
    assert backend.found == [False]
    report = explain(double, torch.ones(6))
    assert [graph.dynamic for graph in report.graphs] == [False], "what the user has run is not explain's"
    compiled(torch.ones(7))
    assert backend.found == [False, True]


def test_explained_again_it_is_compiled_again() -> None:
    model = nn.Linear(3, 3)
    first, second = explain(model, torch.ones(2, 3)), explain(model, torch.ones(2, 3))
    assert len(first.graphs) == len(second.graphs) == 1
    assert second.recompiles == []


def test_every_keyword_of_the_model_is_its_own() -> None:
    def model(self: torch.Tensor, /, *, model: int, options: int, mode: int, dynamic: int, args: int) -> Any:
        return self * (model + options + mode + dynamic + args)

    report = explain(model, torch.ones(2), model=1, options=2, mode=3, dynamic=4, args=5)
    assert len(report.graphs) == 1


def test_what_is_compiled_already_is_explained_underneath() -> None:
    x = torch.ones(2, 6)
    assert len(explain(torch.compile(Block().eval(), backend="eager"), x).graphs) == 1
    assert len(explain(torch.compile(lambda y: y + 1, backend="eager"), x).graphs) == 1


def test_modules_compiled_in_place_are_explained_underneath_and_stay_compiled() -> None:
    class Outer(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.block = Block()

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.block(x) * 2

    model, x, backend = Outer().eval(), torch.ones(2, 6), Counting("eager")
    model.compile(backend=backend)
    model.block.compile(backend=backend)
    calls = [part._compiled_call_impl for part in model.modules()]
    assert len(explain(model, x).graphs) == 1
    assert backend.ids == []
    assert [part._compiled_call_impl for part in model.modules()] == calls
    model(x)
    assert len(backend.ids) == 1


def test_a_bound_method_keeps_its_module() -> None:
    model = Block().train()
    explain(model.forward, torch.randn(4, 6))
    assert model.seen.item() == 0


def test_options_are_checked_at_once() -> None:
    with pytest.raises(UnknownOption, match="strict"):
        fxopt.explain.with_options(options={"strickt": True})


def test_options_reach_the_compilation() -> None:
    def model(x: torch.Tensor) -> torch.Tensor:
        return nn.functional.dropout(x, 0.5, False).sin()

    options = {"host": "eager", "disable": "eliminate-noops"}
    report = fxopt.explain.with_options(options=options, dynamic=True)(model, torch.ones(3, 4))
    assert report.graphs[0].dynamic
    disabled = [e for e in report.graphs[0].evidence if e.status is Status.DISABLED]
    assert [entry.rewrite for entry in disabled] == ["eliminate-noops"]


def test_it_stays_out_of_the_records_of_the_process() -> None:
    before = len(records())
    explain(nn.Linear(2, 2), torch.ones(1, 2))
    assert len(records()) == before
    torch.compile(nn.Linear(2, 2), backend="fxopt", options={"host": "eager"})(torch.ones(1, 2))
    process = fxopt.Report.of_process()
    assert len(process.graphs) == before + 1
    assert process.breaks is None
    assert "break" not in process.summary
    with pytest.raises(ValueError, match="only a report made by"):
        process.call()


def test_a_report_lets_go_of_its_model() -> None:
    model = nn.Linear(2, 2)
    gone = weakref.ref(model)
    report = explain(model, torch.ones(1, 2))
    report.close()
    with pytest.raises(ValueError, match="closed"):
        report.call(torch.ones(1, 2))
    del model
    gc.collect()
    assert gone() is None
    assert len(report.graphs) == 1
    assert json.loads(report.to_json())["summary"]["graphs"] == 1


def test_a_report_that_is_dropped_takes_its_model_along() -> None:
    model = nn.Linear(2, 2)
    gone = weakref.ref(model)
    report = explain(model, torch.ones(1, 2))
    del model, report
    gc.collect()
    assert gone() is None


def test_the_next_explain_frees_what_a_dropped_report_had_compiled() -> None:
    from torch._dynamo.eval_frame import _debug_get_cache_entry_list

    def model(x: torch.Tensor) -> torch.Tensor:
        return x.tan()

    report = explain(model, torch.ones(2))
    assert len(_debug_get_cache_entry_list(model)) == 1
    del report
    gc.collect()
    explain(torch.sin, torch.ones(2))
    assert _debug_get_cache_entry_list(model) == []


@pytest.mark.parametrize("model", [3, None])
def test_what_is_no_model_is_refused(model: Any) -> None:
    with pytest.raises(NotAModel, match="wanted a module or a function"):
        fxopt.explain(model)
