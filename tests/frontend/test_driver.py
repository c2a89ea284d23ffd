"""The driver: what a pass does wrong is undone and becomes evidence; the answer stays eager's."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, ClassVar

import pytest
import torch
from torch import fx

from fxopt.errors import InternalError
from fxopt.frontend.driver import run_rewrite
from fxopt.ir.contract import Context, Evidence, Match, Miss, Status, Verdict
from fxopt.options import Options
from fxopt.report.record import GraphRecord, collect
from support.frontend import capture
from support.golden import render

aten = torch.ops.aten
Replace = Callable[[Match, fx.Graph], Any]


@dataclass(frozen=True)
class ReplaceTanh:
    """A pass on tanh, whose answers are given by the test."""

    with_: Replace
    match_: Callable[[fx.Node], Any] = lambda node: Match(node, (node,))
    legal_: Callable[[Match, Context], Verdict] = lambda match, ctx: Verdict.yes("because")
    profit_: Callable[[Match, Context], Verdict] = lambda match, ctx: Verdict.yes()

    name: ClassVar[str] = "replace-tanh"
    anchors: ClassVar[tuple[Any, ...]] = (aten.tanh.default,)
    after: ClassVar[tuple[str, ...]] = ()

    def match(self, node: fx.Node) -> Match | Miss | None:
        found: Match | Miss | None = self.match_(node)
        return found

    def legal(self, match: Match, ctx: Context) -> Verdict:
        return self.legal_(match, ctx)

    def profit(self, match: Match, ctx: Context) -> Verdict:
        return self.profit_(match, ctx)

    def replace(self, match: Match, graph: fx.Graph) -> Any:
        return self.with_(match, graph)


def source(match: Match) -> fx.Node:
    return match.anchor.args[0]  # type: ignore[return-value]


def same(match: Match, graph: fx.Graph) -> fx.Node:
    """tanh(x) = 2 sigmoid(2x) - 1, which is right."""
    double = graph.call_function(aten.mul.Tensor, (source(match), 2.0))
    sigmoid = graph.call_function(aten.sigmoid.default, (double,))
    return graph.call_function(aten.sub.Tensor, (graph.call_function(aten.mul.Tensor, (sigmoid, 2.0)), 1.0))


def raising(match: Match, graph: fx.Graph) -> fx.Node:
    graph.call_function(aten.sin.default, (source(match),))
    raise ZeroDivisionError("half-way")


def of_another_dtype(match: Match, graph: fx.Graph) -> fx.Node:
    return graph.call_function(aten.to.dtype, (same(match, graph), torch.float64))


def of_another_shape(match: Match, graph: fx.Graph) -> fx.Node:
    return graph.call_function(aten.unsqueeze.default, (same(match, graph), 0))


def of_another_device(match: Match, graph: fx.Graph) -> fx.Node:
    return graph.call_function(aten.to.device, (same(match, graph), "meta", torch.float32))


def of_another_kind(match: Match, graph: fx.Graph) -> fx.Node:
    return graph.call_function(aten.unbind.int, (same(match, graph),))


def too_many(match: Match, graph: fx.Graph) -> tuple[fx.Node, ...]:
    return same(match, graph), same(match, graph)


def impossible(match: Match, graph: fx.Graph) -> fx.Node:
    """Its fake evaluation raises."""
    return graph.call_function(
        aten.matmul.default, (source(match), graph.call_function(aten.ones.default, ([9, 9],)))
    )


def not_to_be_read_on(match: Match, graph: fx.Graph) -> fx.Node:
    """Strides with which a reader further down, a view, cannot live."""
    transposed = graph.call_function(aten.permute.default, (same(match, graph), [1, 0]))
    dense = graph.call_function(aten.clone.default, (transposed,), {"memory_format": torch.contiguous_format})
    return graph.call_function(aten.permute.default, (dense, [1, 0]))


def late(match: Match, graph: fx.Graph) -> fx.Node:
    """A node that comes after all that read it."""
    with graph.inserting_before(graph.output_node()):
        return graph.call_function(aten.sin.default, (source(match),))


def out_of_order(match: Match, graph: fx.Graph) -> fx.Node:
    """Inserts a node that reads one which comes after it."""
    new = same(match, graph)
    new.replace_input_with(new.args[0], late(match, graph))  # type: ignore[arg-type]
    return new


def no_node(match: Match, graph: fx.Graph) -> Any:
    return None


def tanh_then_view(x: torch.Tensor) -> torch.Tensor:
    return (x + 1.0).tanh().view(-1) * 3.0


FAULTS: dict[str, tuple[Replace, str]] = {
    "raises": (raising, "ZeroDivisionError: half-way"),
    "dtype": (of_another_dtype, "float64"),
    "shape": (of_another_shape, "(1, 3, 4)"),
    "device": (of_another_device, "on meta"),
    "kind": (of_another_kind, "replaced"),
    "number": (too_many, "1 roots, 2 replacements"),
    "no evaluation": (impossible, "RuntimeError"),
    "strides": (not_to_be_read_on, "Cannot view"),
    "order": (out_of_order, "KeyError"),
    "no node": (no_node, "AttributeError"),
}


def normalized(function: Callable[..., Any], *inputs: Any) -> fx.GraphModule:
    return capture(function, *inputs).graph


def answers_stay(monkeypatch: pytest.MonkeyPatch, rewrite: Any, function: Callable[..., Any]) -> GraphRecord:
    """Compile with this pass alone; the answer is eager's, whatever the pass does. Returns the record."""
    monkeypatch.setattr("fxopt.pipeline.load_passes", lambda: (rewrite,))
    x = torch.randn(3, 4)
    torch._dynamo.reset()
    with collect() as records:
        got = torch.compile(function, backend="fxopt", options={"host": "eager"})(x)
    torch.testing.assert_close(got, function(x))
    return records[0]


@pytest.mark.parametrize("name", FAULTS)
def test_a_faulty_replacement_is_undone(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    replace, reason = FAULTS[name]
    gm = normalized(tanh_then_view, torch.randn(3, 4))
    before, values = render(gm), {node.name: node.meta.get("val") for node in gm.graph.nodes}
    (entry,) = run_rewrite(ReplaceTanh(replace), gm, Options())
    assert (entry.status, entry.before, entry.after) == (Status.ERROR, None, None)
    assert reason in entry.reason
    assert entry.location.startswith(f"{__file__}:")
    gm.graph.lint()
    assert render(gm) == before
    assert all(node.meta.get("val") is values[node.name] for node in gm.graph.nodes)

    record = answers_stay(monkeypatch, ReplaceTanh(replace), tanh_then_view)
    assert (record.normalized, record.failures) == (True, [])
    assert [found.status for found in record.evidence] == [Status.ERROR]


@pytest.mark.parametrize("name", FAULTS)
def test_a_faulty_replacement_raises_if_strict(name: str) -> None:
    replace, _ = FAULTS[name]
    gm = normalized(tanh_then_view, torch.randn(3, 4))
    before = render(gm)
    with pytest.raises(InternalError, match="pass replace-tanh") as caught:
        run_rewrite(ReplaceTanh(replace), gm, Options(strict=True))
    assert f"at {__file__}:" in str(caught.value)
    assert render(gm) == before


def fail(*args: object) -> Any:
    raise ZeroDivisionError("in a question")


@pytest.mark.parametrize("question", ["match_", "legal_", "profit_"])
def test_a_question_that_raises_is_evidence(monkeypatch: pytest.MonkeyPatch, question: str) -> None:
    rewrite = ReplaceTanh(same, **{question: fail})
    record = answers_stay(monkeypatch, rewrite, tanh_then_view)
    (entry,) = record.evidence
    assert (entry.status, entry.reason) == (Status.ERROR, "ZeroDivisionError: in a question")


def test_a_right_replacement_is_applied(monkeypatch: pytest.MonkeyPatch) -> None:
    record = answers_stay(monkeypatch, ReplaceTanh(same), tanh_then_view)
    (entry,) = record.evidence
    assert (entry.status, entry.reason) == (Status.APPLIED, "because")
    assert entry.before is not None
    assert entry.after is not None
    assert (entry.before.launches, entry.after.launches) == (1, 4)
    assert "aten.sub.Tensor" in entry.detail


ANSWERS: dict[str, tuple[dict[str, Any], Status, str]] = {
    "miss": ({"match_": lambda node: Miss("a sine", "tanh")}, Status.MISS, "wanted a sine, saw tanh"),
    "illegal": ({"legal_": lambda *_: Verdict.no("aliased")}, Status.ILLEGAL, "aliased"),
    "unprofitable": ({"profit_": lambda *_: Verdict.no("slower")}, Status.UNPROFITABLE, "slower"),
}


@pytest.mark.parametrize("name", ANSWERS)
def test_each_no_is_evidence_with_its_reason(name: str) -> None:
    answers, status, reason = ANSWERS[name]
    gm = normalized(tanh_then_view, torch.randn(3, 4))
    before = render(gm)
    (entry,) = run_rewrite(ReplaceTanh(fail, **answers), gm, Options())
    assert (entry.status, entry.reason) == (status, reason)
    assert render(gm) == before


def test_what_is_no_candidate_leaves_no_evidence() -> None:
    gm = normalized(tanh_then_view, torch.randn(3, 4))
    assert run_rewrite(ReplaceTanh(fail, match_=lambda node: None), gm, Options()) == []


def test_one_bad_site_does_not_stop_the_others(monkeypatch: pytest.MonkeyPatch) -> None:
    def second_fails(match: Match, graph: fx.Graph) -> fx.Node:
        return raising(match, graph) if match.anchor.name == "tanh_1" else same(match, graph)

    record = answers_stay(
        monkeypatch,
        ReplaceTanh(second_fails),
        lambda x: (x + 1.0).tanh() + (x * 2.0).tanh() + (x - 3.0).tanh(),
    )
    assert [entry.status for entry in record.evidence] == [Status.APPLIED, Status.ERROR, Status.APPLIED]


def whole(node: fx.Node) -> Match:
    """tanh(sin(x)), replaced as one."""
    return Match(node, (node,), {"x": node.args[0].args[0]})  # type: ignore[union-attr]


def sine_and_tanh(match: Match, graph: fx.Graph) -> fx.Node:
    sine = graph.call_function(aten.sin.default, (match["x"],))
    return graph.call_function(aten.tanh.default, (sine,))


def sine_in_no_grad(x: torch.Tensor) -> torch.Tensor:
    with torch.no_grad():
        y = x.sin()
    return y.tanh() * x


def sine_in_autocast(x: torch.Tensor) -> torch.Tensor:
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y = x.sin()
    return y.tanh() * x


def both_in_no_grad(x: torch.Tensor) -> torch.Tensor:
    with torch.no_grad():
        y = x.sin().tanh()
    return y * x


@pytest.mark.parametrize(
    ("function", "status"),
    [
        (sine_in_no_grad, Status.ILLEGAL),
        (sine_in_autocast, Status.ILLEGAL),
        (both_in_no_grad, Status.APPLIED),
        (lambda x: x.sin().tanh() * x, Status.APPLIED),
    ],
)
def test_what_crosses_grad_or_autocast_modes_is_undone(
    function: Callable[..., torch.Tensor], status: Status
) -> None:
    gm = normalized(function, torch.randn(3, 4, requires_grad=True))
    before = render(gm)
    (entry,) = run_rewrite(ReplaceTanh(sine_and_tanh, whole), gm, Options())
    assert entry.status is status
    if status is Status.ILLEGAL:
        assert entry.reason == "sin and tanh run in different grad or autocast modes"
        assert render(gm) == before


def test_gradients_of_what_crosses_modes_are_eagers(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("fxopt.pipeline.load_passes", lambda: (ReplaceTanh(sine_and_tanh, whole),))
    gradients = []
    for call in (sine_in_no_grad, torch.compile(sine_in_no_grad, backend="fxopt", options={"host": "eager"})):
        x = torch.ones(3, requires_grad=True)
        call(x).sum().backward()
        gradients.append(x.grad)
    assert torch.equal(gradients[0], gradients[1])  # type: ignore[arg-type]


def transposed(match: Match, graph: fx.Graph) -> fx.Node:
    """The right values in other strides."""
    node = graph.call_function(aten.permute.default, (same(match, graph), [1, 0]))
    node = graph.call_function(aten.clone.default, (node,), {"memory_format": torch.contiguous_format})
    return graph.call_function(aten.permute.default, (node, [1, 0]))


@pytest.mark.parametrize(
    "function",
    [
        lambda x: (x + 1.0).tanh(),
        lambda x: ((x + 1.0).tanh() * 2.0, x.tanh()),
        lambda x: {"y": x.tanh(), "z": x.tanh().relu()},
    ],
)
@pytest.mark.parametrize("dynamic", [False, True])
def test_strides_of_outputs_are_put_back(
    monkeypatch: pytest.MonkeyPatch, function: Callable[..., Any], dynamic: bool
) -> None:
    monkeypatch.setattr("fxopt.pipeline.load_passes", lambda: (ReplaceTanh(transposed),))
    x = torch.randn(3, 4)
    with collect() as records:
        got = torch.compile(function, backend="fxopt", options={"host": "eager"}, dynamic=dynamic)(x)
    assert all(entry.status is Status.APPLIED for entry in records[0].evidence)
    torch.testing.assert_close(got, function(x), check_stride=True)


def test_strides_inside_of_a_graph_may_change(monkeypatch: pytest.MonkeyPatch) -> None:
    """And whatever reads them is brought up to date."""
    gm = normalized(lambda x: (x.tanh() * 2.0).sum(-1), torch.randn(3, 4))
    (entry,) = run_rewrite(ReplaceTanh(transposed), gm, Options())
    assert entry.status is Status.APPLIED
    product = next(node for node in gm.graph.nodes if node.name == "mul")
    assert product.meta["val"].stride() == (1, 3)


def test_writes_that_only_serve_what_is_replaced_are_not_lost(monkeypatch: pytest.MonkeyPatch) -> None:
    def function(x: torch.Tensor) -> torch.Tensor:
        return x.add_(1.0).tanh() * 2.0

    def forget(match: Match, graph: fx.Graph) -> fx.Node:
        return graph.call_function(aten.zeros_like.default, (match["x"],))

    gm = normalized(function, torch.randn(3, 4))
    run_rewrite(ReplaceTanh(forget, whole), gm, Options())
    assert [str(node.target) for node in gm.graph.nodes if "add_" in str(node.target)] == ["aten.add_.Tensor"]


@dataclass(frozen=True)
class TwoRoots(ReplaceTanh):
    """tanh and the sine of the same input, together."""

    with_: Replace = field(default=lambda match, graph: _both(match, graph))

    def match(self, node: fx.Node) -> Match | Miss | None:
        (sine,) = node.graph.find_nodes(op="call_function", target=aten.sin.default)
        roots = sorted((sine, node))
        return Match(node, tuple(roots))


def _both(match: Match, graph: fx.Graph) -> tuple[fx.Node, ...]:
    return tuple(graph.call_function(root.target, root.args) for root in match.roots)


def test_an_earlier_root_that_is_read_too_early_is_refused() -> None:
    early = normalized(lambda x: (x.sin() * 2.0, x.tanh()), torch.randn(3, 4))
    late = normalized(lambda x: (lambda s, t: (s * 2.0, t))(x.sin(), x.tanh()), torch.randn(3, 4))
    (refused,) = run_rewrite(TwoRoots(), early, Options())
    assert (refused.status, refused.reason) == (Status.ERROR, "Violation: mul reads sin before tanh")
    (applied,) = run_rewrite(TwoRoots(), late, Options())
    assert applied.status is Status.APPLIED


def test_a_graph_that_fails_the_last_check_goes_to_the_host_untouched(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    record = answers_stay(monkeypatch, ReplaceTanh(late), tanh_then_view)
    ((stage, message),) = record.failures
    assert stage == "passes"
    assert "was used before it has been defined" in message


def test_metadata_of_the_anchor_is_copied() -> None:
    gm = normalized(tanh_then_view, torch.randn(3, 4))
    run_rewrite(ReplaceTanh(same), gm, Options())
    inserted = [
        node for node in gm.graph.nodes if str(node.target) in ("aten.sigmoid.default", "aten.sub.Tensor")
    ]
    assert len(inserted) == 2
    assert all(__file__ in node.meta["stack_trace"] for node in inserted)
    assert all(node.meta["val"].shape == (3, 4) for node in inserted)


def test_fuel_counts_over_all_graphs(monkeypatch: pytest.MonkeyPatch) -> None:
    from fxopt.frontend.driver import FUEL

    FUEL.reset()
    found: list[Evidence] = []
    for _ in range(3):
        gm = normalized(tanh_then_view, torch.randn(3, 4))
        found += run_rewrite(ReplaceTanh(same), gm, Options(fuel=2))
    FUEL.reset()
    assert [entry.status for entry in found] == [Status.APPLIED, Status.APPLIED, Status.OUT_OF_FUEL]
