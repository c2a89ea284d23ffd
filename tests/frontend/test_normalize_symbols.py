"""Sizes, numbers and sizes that depend on data stay symbols; nothing is specialized or guarded."""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch

from fxopt.ir.facts import same_shape
from support.compile_stats import Counting, compile_stats
from support.compiled import all_handled, compile_fxopt
from support.frontend import capture

HOSTS = ["eager", "inductor"]


@pytest.fixture
def captures_data_dependent_values() -> Iterator[None]:
    with torch._dynamo.config.patch(capture_scalar_outputs=True, capture_dynamic_output_shape_ops=True):
        yield


def sizes(x: torch.Tensor) -> tuple[torch.Tensor, ...]:
    rows, columns = x.shape
    half = columns // 2
    positions = torch.arange(rows)[:, None] * 1.0
    return x[:, :half] + positions, x.view(rows * columns) * (columns - rows), torch.ones(rows + 1)


def numbers(x: torch.Tensor, scale: float, count: int) -> torch.Tensor:
    return x * scale + torch.softmax(x * (scale / 2.0), -1) * count


def repeated(x: torch.Tensor, count: int) -> torch.Tensor:
    return x.repeat(count, 1) + count


def of_items(x: torch.Tensor) -> tuple[torch.Tensor, ...]:
    count = x.sum().item()
    torch._check(count >= 2)
    torch._check(count < 100)
    return torch.arange(count) * 1.0, torch.ones(count, 3) + count


def of_nonzero(x: torch.Tensor) -> tuple[torch.Tensor, ...]:
    where = x.nonzero()
    return x[where.view(-1)] * 2.0, torch.zeros(where.shape[0] + 1)


def of_masks(x: torch.Tensor) -> torch.Tensor:
    kept = x[x > 0]
    return (kept * 1.0).sum() + kept.shape[0]


def of_floats(x: torch.Tensor) -> torch.Tensor:
    return torch.softmax(x * x.double().mean().item(), -1)


def test_sizes_are_the_symbols_of_dynamo() -> None:
    found = capture(sizes, torch.randn(3, 4), dynamic=True)
    before, after = (gm.graph.find_nodes(op="placeholder") for gm in (found.dynamo[0], found.graph))
    assert [str(node.meta["val"]) for node in after if _is_symbol(node)] == [
        str(node.meta["example_value"]) for node in before if _is_symbol(node)
    ]
    assert len([node for node in after if _is_symbol(node)]) == 2
    outputs = found.graph.graph.output_node().all_input_nodes
    assert all(any(_symbolic(size) for size in node.meta["val"].shape) for node in outputs)


def _is_symbol(node: torch.fx.Node) -> bool:
    return isinstance(node.meta["example_value"], torch.SymInt)


def _symbolic(size: Any) -> bool:
    return isinstance(size, torch.SymInt) and bool(size.node.expr.free_symbols)


Case = tuple[Callable[..., Any], list[tuple[Any, ...]]]
CASES: dict[str, Case] = {
    "sizes": (sizes, [(torch.randn(r, c),) for r, c in ((3, 4), (5, 6), (7, 9))]),
    "numbers": (numbers, [(torch.randn(3, 4), s, n) for s, n in ((0.5, 3), (-2.0, 4), (0.1, 7))]),
    "repeated": (repeated, [(torch.randn(2, 4), n) for n in (3, 5, 8)]),
    "of_items": (of_items, [(torch.tensor(v),) for v in ([1, 2, 1], [3, 4, 1], [2, 0, 0])]),
    "of_nonzero": (of_nonzero, [(torch.tensor(v),) for v in ([1.0, 0.0, 2.0], [1.0, 2.0, 3.0], [0.0] * 3)]),
    "of_masks": (of_masks, [(torch.tensor(v),) for v in ([1.0, -1.0, 2.0], [1.0, 2.0, 3.0], [-1.0] * 3)]),
    "of_floats": (of_floats, [(torch.randn(3),) for _ in range(3)]),
}


@pytest.mark.usefixtures("captures_data_dependent_values")
@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("host", HOSTS)
def test_one_graph_serves_all_values(name: str, host: str) -> None:
    function, calls = CASES[name]
    options = {"host": host, "strict": True}
    compiled = torch.compile(function, backend="fxopt", options=options, dynamic=True, fullgraph=True)
    with all_handled() as records:
        for inputs in calls:
            torch.testing.assert_close(compiled(*inputs), function(*inputs), check_stride=host == "eager")
    assert len(records) == 1


@pytest.mark.usefixtures("captures_data_dependent_values")
@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("dynamic", [None, True, False])
def test_graphs_and_recompiles_are_those_of_a_backend_that_does_nothing(
    name: str, dynamic: bool | None
) -> None:
    function, calls = CASES[name]

    def run(backend: Any) -> None:
        compiled = torch.compile(function, backend=backend, dynamic=dynamic)
        for inputs in calls:
            compiled(*inputs)

    wanted = compile_stats(Counting("eager"), run)
    assert compile_stats(Counting("fxopt", options={"host": "eager"}), run) == wanted


@pytest.mark.parametrize("function", [of_items, of_nonzero, of_masks])
def test_without_capture_the_graph_breaks_and_the_answer_is_the_same(function: Callable[..., Any]) -> None:
    _, calls = CASES[function.__name__]
    compiled = compile_fxopt(function)
    for inputs in calls:
        torch.testing.assert_close(compiled(*inputs), function(*inputs))


@pytest.mark.usefixtures("captures_data_dependent_values")
def test_assertions_about_data_are_still_made() -> None:
    def f(x: torch.Tensor) -> torch.Tensor:
        count = x.sum().item()
        torch._check(count < 10)
        return torch.ones(3) * count

    compiled = compile_fxopt(f)
    with all_handled():
        assert compiled(torch.tensor([4, 2])).tolist() == [6.0] * 3
    with pytest.raises(RuntimeError, match="assertion failed"):
        compiled(torch.tensor([40, 2]))


@pytest.mark.usefixtures("captures_data_dependent_values")
def test_reads_of_data_are_made_in_order_with_writes() -> None:
    def f(x: torch.Tensor) -> torch.Tensor:
        before = x.sum().item()
        x.add_(1.0)
        return x * before + x.sum().item()

    compiled = compile_fxopt(f)
    mine, theirs = torch.ones(3), torch.ones(3)
    with all_handled() as records:
        assert torch.equal(compiled(mine), f(theirs))
    assert len(records) == 1


def test_dynamic_sizes_inside_of_subgraphs() -> None:
    def f(x: torch.Tensor) -> torch.Tensor:
        return torch.cond(x.sum() > 0, lambda x: x * x.shape[0], lambda x: x - x.shape[1], (x,)) * 1.0

    compiled = torch.compile(f, backend="fxopt", options={"host": "eager", "strict": True}, dynamic=True)
    with all_handled() as records:
        for shape in ((2, 3), (5, 4), (3, 7)):
            for sign in (1.0, -1.0):
                assert torch.equal(compiled(sign * torch.ones(shape)), f(sign * torch.ones(shape)))
    assert len(records) == 1


@pytest.mark.usefixtures("captures_data_dependent_values")
@pytest.mark.parametrize("host", HOSTS)
def test_sizes_from_data_are_the_same_inside_and_outside_of_subgraphs(host: str) -> None:
    """What a call returns has the symbols that Dynamo noted, what is traced anew has new ones."""

    def f(x: torch.Tensor) -> torch.Tensor:
        count = x.sum().item()
        torch._check(count >= 2)
        made = torch.ones(count)
        called = torch.cond(x[0] > 1, torch.sin, torch.cos, (made,))
        return called * made + called.view(count)

    graph = capture(f, torch.tensor([1, 2])).graph.graph
    (made,) = graph.find_nodes(op="call_function", target=torch.ops.aten.ones.default)
    (called,) = graph.find_nodes(op="call_function", target=operator.getitem)
    assert same_shape(made.meta["val"].shape, called.meta["val"].shape)

    torch._dynamo.reset()
    compiled = compile_fxopt(f, host)
    with all_handled() as records:
        for data in ([1, 2], [3, 1]):
            torch.testing.assert_close(compiled(torch.tensor(data)), f(torch.tensor(data)))
    assert len(records) == 1
