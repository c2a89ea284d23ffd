"""In-place ops stay in place and in order, and are barriers: no pass moves a read across a write."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import fx, nn

import fxopt.pipeline as pipeline
from fxopt.ir.contract import Status
from fxopt.ir.facts import is_write
from fxopt.ir.graph_facts import Facts
from fxopt.options import Options
from fxopt.report.record import GraphRecord
from support.compiled import all_handled, compile_fxopt
from support.frontend import capture, targets


@torch.library.custom_op("fxopt_tests::add_one_", mutates_args=("x",))
def add_one_(x: torch.Tensor) -> None:
    x.add_(1.0)


def hand_written(x: torch.Tensor) -> torch.Tensor:
    y = x.clone()
    y[1:] = 0.0
    y[0] += x[2]
    y.view(-1).mul_(2.0)
    torch.add(y, 1.0, out=y)
    nn.functional.relu(y, inplace=True)
    return y


def writes_of(graph: fx.Graph) -> list[tuple[Any, str]]:
    return [(node.target, node.name) for node in graph.nodes if is_write(node)]


def test_writes_stay_as_they_are_written() -> None:
    x = torch.randn(3, 2)
    found = capture(hand_written, x)
    writes = [str(target) for target, _ in writes_of(found.graph.graph)]
    assert writes == [
        "aten.fill_.Tensor",
        "aten.add_.Tensor",
        "aten.copy_.default",
        "aten.mul_.Tensor",
        "aten.add.out",
        "aten.relu_.default",
    ]
    torch.testing.assert_close(found.result, hand_written(x))


def test_inputs_are_written_where_they_are() -> None:
    def f(x: torch.Tensor, index: torch.Tensor) -> None:
        x.index_add_(0, index, torch.ones(2, 3))
        x[0].mul_(4.0)
        add_one_(x)

    want, got = torch.ones(4, 3), torch.ones(4, 3)
    index = torch.tensor([0, 2])
    f(want, index)
    compiled = compile_fxopt(f)
    with all_handled():
        compiled(got, index)
    assert torch.equal(got, want)


Hazard = tuple[Callable[..., torch.Tensor], str]


def scores_written(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    scores = q @ k.transpose(-1, -2)
    scores[..., 0] = 0.0
    return torch.softmax(scores * 0.5, -1) @ v


def weights_written(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    weights = torch.softmax(q @ k.transpose(-1, -2) * 0.5, -1)
    weights.mul_(2.0)
    return weights @ v


def keys_written(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    scores = q @ k.transpose(-1, -2)
    k.add_(1.0)
    return torch.softmax(scores * 0.5, -1) @ v + k


def queries_written_through_a_view(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    part = q[..., :1]
    scores = q @ k.transpose(-1, -2)
    part.zero_()
    return torch.softmax(scores * 0.5, -1) @ v + q


def queries_written_by_a_custom_op(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    scores = q @ k.transpose(-1, -2)
    add_one_(q)
    return torch.softmax(scores * 0.5, -1) @ v + q


def repeated_keys_written(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    keys = k[:, :1, None].expand(1, 1, 2, 3, 4).reshape(1, 2, 3, 4)
    values = v[:, :1, None].expand(1, 1, 2, 3, 4).reshape(1, 2, 3, 4)
    k.mul_(3.0)
    v.mul_(5.0)
    return nn.functional.scaled_dot_product_attention(q, keys, values) + k + v


def mask_written(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    mask = torch.ones(3, 3, dtype=torch.bool).tril()
    mask[0, 1] = True
    return nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=mask)


def norm_input_written(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    square = q.pow(2).mean(-1, keepdim=True)
    q.mul_(2.0)
    return q * torch.rsqrt(square + 1e-6) * k


def norm_weight_written(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    weight = k[0, 0, 0]
    normed = (q - q.mean(-1, keepdim=True)) * torch.rsqrt(q.var(-1, keepdim=True, unbiased=False) + 1e-6)
    scaled = normed * weight
    weight.fill_(7.0)
    return scaled + weight


def source_of_a_dropout_written(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    """In eager, the dropout returns its input."""
    same = nn.functional.dropout(q, 0.5, training=False)
    q.add_(1.0)
    return same * 2.0


def copy_written(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    copied = q * 1.0
    copied.add_(1.0)
    return copied + q


def source_of_a_copy_written(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    copied = nn.functional.dropout(q, 0.5, training=False).clone()
    q.add_(1.0)
    return copied + q


def written_in_a_region(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    copied = q * 1.0
    with torch.no_grad():
        q.view(-1)[:4].add_(1.0)
    return copied + q


HAZARDS = [
    scores_written,
    weights_written,
    keys_written,
    queries_written_through_a_view,
    queries_written_by_a_custom_op,
    repeated_keys_written,
    mask_written,
    norm_input_written,
    norm_weight_written,
    copy_written,
    source_of_a_dropout_written,
    source_of_a_copy_written,
    written_in_a_region,
]


@pytest.mark.parametrize("function", HAZARDS)
@pytest.mark.parametrize("dynamic", [False, True])
def test_answers_do_not_change(function: Callable[..., torch.Tensor], dynamic: bool) -> None:
    want_inputs = [torch.randn(1, 2, 3, 4) for _ in range(3)]
    got_inputs = [x.clone() for x in want_inputs]
    compiled = torch.compile(
        function, backend="fxopt", options={"host": "eager", "strict": True}, dynamic=dynamic
    )
    with all_handled():
        got = compiled(*got_inputs)
    torch.testing.assert_close(got, function(*want_inputs))
    torch.testing.assert_close(got_inputs, want_inputs)


def seen_writes(graph: fx.Graph) -> list[tuple[Any, str]]:
    """The writes to memory that the caller sees."""
    facts = Facts(graph)
    inputs = {facts.alias_class(node) for node in graph.find_nodes(op="placeholder")}
    nodes = {node.name: node for node in graph.nodes}
    writes = [(write, nodes[write[1]].args[0]) for write in writes_of(graph)]
    return [write for write, first in writes if facts.alias_class(first) in inputs]


@pytest.mark.parametrize("function", HAZARDS)
def test_no_pass_removes_adds_or_reorders_writes(function: Callable[..., torch.Tensor]) -> None:
    """But the one whose purpose is to do without those that nobody sees."""
    inputs = [torch.randn(1, 2, 3, 4) for _ in range(3)]
    gm = capture(function, *inputs).graph
    before = writes_of(gm.graph)
    assert before
    pipeline.rewrite(gm, Options(strict=True, disable=("functionalize-writes",)), GraphRecord(0))
    assert writes_of(gm.graph) == before

    gm = capture(function, *inputs).graph
    before = seen_writes(gm.graph)
    pipeline.rewrite(gm, Options(strict=True), GraphRecord(0))
    assert seen_writes(gm.graph) == before


def test_the_same_code_without_a_write_is_rewritten() -> None:
    """What stands in the way above is the write."""

    def attend(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        return torch.softmax(q @ k.transpose(-1, -2) * 0.5, -1) @ v + k

    inputs = [torch.randn(1, 2, 3, 4) for _ in range(3)]
    with all_handled() as records:
        compile_fxopt(attend)(*inputs)
        compile_fxopt(keys_written)(*inputs)
    assert [len(record.applied("rewrite-attention")) for record in records] == [1, 0]
    reasons = [e.reason for e in records[1].evidence if e.rewrite == "rewrite-attention"]
    assert [e.status for e in records[1].evidence if e.rewrite == "rewrite-attention"] == [Status.ILLEGAL]
    assert "written by add_" in reasons[0]


def test_a_write_to_what_is_not_read_is_no_barrier() -> None:
    def f(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        other = torch.zeros(3)
        scores = q @ k.transpose(-1, -2) * 0.5
        other.add_(1.0)
        return torch.softmax(scores, -1) @ v + other.sum()

    with all_handled() as records:
        compile_fxopt(f)(*(torch.randn(1, 2, 3, 4) for _ in range(3)))
    assert len(records[0].applied("rewrite-attention")) == 1


def test_reads_after_writes_are_no_views_of_before() -> None:
    gm = capture(keys_written, *(torch.randn(1, 2, 3, 4) for _ in range(3))).graph
    assert targets(gm).index("aten.matmul.default") < targets(gm).index("aten.add_.Tensor")


def test_reads_for_nothing_are_dropped_and_effects_stay() -> None:
    """A dead reader would hide from the passes that a value has one reader only."""

    def f(x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        z = x.sin()
        z.cos().exp()
        y.add_(1.0).tan()
        torch.rand(3)
        add_one_(y)
        return z * 2.0

    gm = capture(f, torch.ones(3), torch.ones(3)).graph
    names = targets(gm)
    assert not {"aten.cos.default", "aten.exp.default", "aten.tan.default"} & set(names)
    kept = ("aten.sin.default", "aten.add_.Tensor", "aten.rand.default", "fxopt_tests.add_one_.default")
    assert [name for name in names if name in kept] == list(kept)
    (sine,) = gm.graph.find_nodes(op="call_function", target=torch.ops.aten.sin.default)
    assert len(sine.users) == 1
