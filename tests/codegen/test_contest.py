"""What becomes of measurements of a semantic op with kernels and without."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import fx

from fxopt.codegen.contest import Contest, Referee
from fxopt.codegen.lone_call import LoneCall
from fxopt.codegen.tune import Budget, CannotMeasure, Samples
from fxopt.ir.contract import Verdict
from fxopt.ir.graph_facts import Facts, Kernels
from fxopt.ir.ops import register_ops, semantic_op
from fxopt.runtime.kernel_cache import KernelCache
from support.frontend import capture

FASTER = Contest(Samples((1e-5,)), Samples((2e-5,)))
SLOWER = Contest(Samples((2e-5,)), Samples((1e-5,)))


class Arena:
    """Finds what it is told to."""

    device = "a card"

    def __init__(self, found: Contest | str) -> None:
        self.found = found
        self.calls: list[LoneCall] = []
        self.seconds: list[float] = []

    def contest(self, call: LoneCall, options: Mapping[str, Any], seconds: float) -> Contest:
        self.calls.append(call)
        self.seconds.append(seconds)
        if isinstance(self.found, str):
            raise CannotMeasure(self.found)
        return self.found


def calls(rows: int = 8, count: int = 1) -> tuple[list[fx.Node], Facts]:
    """Some attentions, one after the other."""
    register_ops()

    def function(query: torch.Tensor, key: torch.Tensor) -> torch.Tensor:
        for _ in range(count):
            query = torch.ops.fxopt.attention(query, key, key, mask="k <= q")
        return query

    graph = capture(function, torch.randn(1, 2, rows, 16), torch.randn(1, 2, rows, 16)).graph.graph
    return [node for node in graph.nodes if semantic_op(node) is not None], Facts(graph)


def referee(path: Path, arena: Arena, seconds: float = 60.0, **options: Any) -> Referee:
    return Referee(KernelCache(path), arena, options, Budget(seconds), shown=False)


def test_the_faster_wins(tmp_path: Path) -> None:
    (node,), facts = calls()
    assert referee(tmp_path / "a", Arena(FASTER))(node, facts) == Verdict.yes(
        "measured on a card: 10.0 us in the kernel, 20.0 us without"
    )
    assert referee(tmp_path / "b", Arena(SLOWER))(node, facts) == Verdict.no(
        "measured on a card: 20.0 us in the kernel, 10.0 us without, slower"
    )


def test_what_differs_by_less_than_it_varies_is_no_gain(tmp_path: Path) -> None:
    (node,), facts = calls()
    close = Contest(Samples((1e-5, 1.4e-5, 1.8e-5)), Samples((1.2e-5, 1.5e-5, 1.9e-5)))
    found = referee(tmp_path, Arena(close))(node, facts)
    assert not found
    assert found.reason.endswith("which differs by less than the measurements vary")


def test_a_wrong_kernel_never_wins(tmp_path: Path) -> None:
    (node,), facts = calls()
    wrong = Contest(Samples((1e-9,)), Samples((1.0,)), ("attention_forward: result 0: largest error 3",))
    assert referee(tmp_path, Arena(wrong))(node, facts) == Verdict.no(
        "measured on a card: it is not used: attention_forward: result 0: largest error 3"
    )


def test_what_is_alike_is_measured_once_also_by_later_processes(tmp_path: Path) -> None:
    arena = Arena(FASTER)
    first, (nodes, facts) = referee(tmp_path, arena), calls(count=3)
    assert all(first(node, facts) for node in nodes)
    assert referee(tmp_path, arena)(nodes[0], facts)
    assert len(arena.calls) == 1


@pytest.mark.parametrize("other", ["sizes", "options", "device"])
def test_what_is_not_alike_is_measured_by_itself(tmp_path: Path, other: str) -> None:
    (node,), facts = calls()
    referee(tmp_path, Arena(SLOWER), mode="default")(node, facts)
    arena = Arena(FASTER)
    if other == "device":
        arena.device = "another card"
    if other == "sizes":
        (node,), facts = calls(16)
    mode = "max-autotune" if other == "options" else "default"
    assert referee(tmp_path, arena, mode=mode)(node, facts)


def test_what_could_not_be_measured_is_left_to_the_host_and_tried_again(tmp_path: Path) -> None:
    (node,), facts = calls()
    arena = Arena("no memory")
    assert referee(tmp_path, arena)(node, facts) == Verdict.no("not measured: no memory")
    arena.found = FASTER
    assert referee(tmp_path, arena)(node, facts)


def test_the_time_for_measuring_ends(tmp_path: Path) -> None:
    (node,), facts = calls()
    arena = Arena(FASTER)
    now = [0.0]
    budget = Budget(5.0, clock=lambda: now[0])
    one = Referee(KernelCache(tmp_path), arena, {}, budget, shown=False)
    assert one(node, facts)
    assert arena.seconds == [5.0]
    now[0] = 6.0
    (later,), others = calls(16)
    assert one(later, others) == Verdict.no("not measured: the 5 s for measuring were spent")
    assert one(node, facts), "what was measured is known"


def test_only_calls_that_a_kernel_can_take_are_measured() -> None:
    (node,), facts = calls()
    asked: list[fx.Node] = []

    def judge(node: fx.Node, facts: Facts) -> Verdict:
        asked.append(node)
        return Verdict.yes("measured")

    cannot = Kernels(frozenset({"cpu"}), lambda node, facts: Verdict.no("of two parts"), judge)
    assert cannot(node, facts) == Verdict.no("of two parts")
    assert asked == []
    can = Kernels(frozenset({"cpu"}), lambda node, facts: Verdict.yes("a window"), judge)
    assert can(node, facts) == Verdict.yes("a window; measured")
    assert asked == [node]
