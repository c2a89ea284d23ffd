"""Which concatenations become appends, and that user code cannot tell."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch

from fxopt.ir.contract import Evidence, Status
from fxopt.report.record import GraphRecord
from fxopt.runtime.kv_state import STATE
from support.compiled import all_handled, compile_fxopt

NAME = "append-kv-cache"


class Layer:
    """A cache as models have them: one tensor in an attribute."""

    keys: torch.Tensor

    def __init__(self, rows: int = 5, **how: Any) -> None:
        self.keys = torch.randn(2, 3, rows, 4, **how)

    def update(self, new: torch.Tensor) -> torch.Tensor:
        self.keys = torch.cat([self.keys, new], -2)
        return self.keys


def new_rows(rows: int = 1, **how: Any) -> torch.Tensor:
    return torch.randn(2, 3, rows, 4, **how)


def attend(layer: Layer, new: torch.Tensor) -> torch.Tensor:
    return layer.update(new).amax(-2)


def steps(function: Callable[..., Any], layer: Layer, count: int = 6, **how: Any) -> list[GraphRecord]:
    """Run `function` compiled and uncompiled, and compare after each step."""
    torch.compiler.reset()
    twin, compiled = copy.deepcopy(layer), compile_fxopt(function)
    with all_handled() as records, torch.no_grad():
        for _ in range(count):
            new = new_rows(**how)
            assert torch.equal(compiled(layer, new), function(twin, new))
            assert torch.equal(layer.keys, twin.keys)
    return records


def found(records: list[GraphRecord]) -> list[Evidence]:
    return [entry for record in records for entry in record.evidence if entry.rewrite == NAME]


def appended(function: Callable[..., Any], layer: Layer, **how: Any) -> None:
    """Every concatenation was found, and rows are written in place once nothing is compiled any more."""
    before = STATE.in_place
    entries = found(steps(function, layer, **how))
    assert entries
    assert all(entry.status is Status.APPLIED for entry in entries), entries
    assert STATE.in_place >= before + 3


def refused(function: Callable[..., Any], layer: Layer, reason: str) -> None:
    entries = found(steps(function, layer))
    assert entries
    assert all(entry.status is Status.ILLEGAL and reason in entry.reason for entry in entries), entries


def reads_old_rows(layer: Layer, new: torch.Tensor) -> torch.Tensor:
    old = layer.keys
    return old.amin(-2) + layer.update(new).amax(-2)


def keeps_a_window(layer: Layer, new: torch.Tensor) -> torch.Tensor:
    whole = torch.cat([layer.keys, new], -2)
    layer.keys = whole[:, :, -6:, :]
    return whole.amax(-2)


def keeps_at_most(layer: Layer, new: torch.Tensor) -> torch.Tensor:
    """One expression for a window that fills and for one that is full."""
    whole = torch.cat([layer.keys, new], -2)
    layer.keys = whole[:, :, max(whole.shape[-2] - 8, 0) :]
    return whole.amax(-2)


def along_the_first(layer: Layer, new: torch.Tensor) -> torch.Tensor:
    layer.keys = torch.cat([layer.keys, new.expand(-1, -1, 5, -1)])
    return layer.keys.amax(0)


@pytest.mark.parametrize("function", [attend, reads_old_rows, keeps_a_window, keeps_at_most, along_the_first])
def test_appends(function: Callable[..., Any]) -> None:
    appended(function, Layer())


@pytest.mark.parametrize("rows", [1, 2, 5])
def test_several_rows(rows: int) -> None:
    appended(attend, Layer(), rows=rows)


def for_all_sizes(function: Callable[..., Any]) -> Callable[..., Any]:
    options = {"host": "eager", "strict": True}
    return torch.compile(function, backend="fxopt", dynamic=True, options=options)


class Window(Layer):
    """It knows how many rows it keeps."""

    most = 6

    def __init__(self) -> None:
        super().__init__()
        self.most = 6


def keeps_its_newest(layer: Window, new: torch.Tensor) -> torch.Tensor:
    whole = torch.cat([layer.keys, new], -2)
    layer.keys = whole[:, :, -layer.most :]
    return whole.amax(-2)


def keeps_its_newest_at_most(layer: Window, new: torch.Tensor) -> torch.Tensor:
    whole = torch.cat([layer.keys, new], -2)
    if layer.most > 0:
        layer.keys = whole[:, :, max(whole.shape[-2] - layer.most, 0) :]
    return whole.amax(-2)


@pytest.mark.parametrize(
    "function", [keeps_a_window, keeps_at_most, keeps_its_newest, keeps_its_newest_at_most]
)
def test_windows_whose_size_is_an_input(function: Callable[..., Any]) -> None:
    """With `dynamic=True`; also where it changes from one step to the next."""
    torch.compiler.reset()
    layer, compiled = Window(), for_all_sizes(function)
    twin, before = copy.deepcopy(layer), STATE.in_place
    with all_handled() as records, torch.no_grad():
        for most in (6, 6, 6, 6, 4, 9, 9, 9, 9, 9, 3, 3):
            layer.most = twin.most = most
            new = new_rows()
            assert torch.equal(compiled(layer, new), function(twin, new))
            assert torch.equal(layer.keys, twin.keys)
    assert all(entry.status is Status.APPLIED for entry in found(records)), found(records)
    assert STATE.in_place >= before + 6


def test_one_graph_for_a_window_that_fills_and_is_full() -> None:
    records = steps(keeps_at_most, Layer(2), count=12)
    assert len(records) == 2, "of known length, and for all lengths"


def every_second(layer: Window, new: torch.Tensor) -> torch.Tensor:
    whole = torch.cat([layer.keys, new], -2)
    layer.keys = whole[:, :, max(whole.shape[-2] - 2 * layer.most, 0) :]
    return whole.amax(-2)


def at_least_one(layer: Window, new: torch.Tensor) -> torch.Tensor:
    whole = torch.cat([layer.keys, new], -2)
    layer.keys = whole[:, :, max(whole.shape[-2] - 6, 1) :]
    return whole.amax(-2)


def none_perhaps(layer: Window, new: torch.Tensor) -> torch.Tensor:
    """Where n is 2, all rows are cut off; as a slice from ``-0`` on it would be none."""
    whole = torch.cat([layer.keys, new], -2)
    layer.keys = whole[:, :, max(whole.shape[-2] - layer.most + 2, 0) :]
    return whole.amax(-2)


@pytest.mark.parametrize("function", [every_second, at_least_one, none_perhaps])
def test_other_slices_stay(function: Callable[..., Any]) -> None:
    torch.compiler.reset()
    layer, compiled = Window(), for_all_sizes(function)
    twin = copy.deepcopy(layer)
    with all_handled() as records, torch.no_grad():
        for _ in range(5):
            new = new_rows()
            assert torch.equal(compiled(layer, new), function(twin, new))
            assert torch.equal(layer.keys, twin.keys)
    assert found(records)
    assert all(entry.status is Status.ILLEGAL and "bounds" in entry.reason for entry in found(records))


def test_numbers_of_rows_that_change() -> None:
    torch.compiler.reset()
    layer, compiled = Layer(), compile_fxopt(attend)
    twin = copy.deepcopy(layer)
    with all_handled() as records, torch.no_grad():
        for rows in (1, 3, 2, 7, 1, 4, 2, 5):
            new = new_rows(rows)
            assert torch.equal(compiled(layer, new), attend(twin, new))
            assert torch.equal(layer.keys, twin.keys)
    assert all(entry.status is Status.APPLIED for entry in found(records))


def test_a_module_that_holds_its_cache() -> None:
    class Attention(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear = torch.nn.Linear(4, 4)
            self.keys = torch.randn(2, 3, 5, 4)

        def forward(self, new: torch.Tensor) -> torch.Tensor:
            self.keys = torch.cat([self.keys, self.linear(new)], 2)
            return self.keys.amax(2)

    torch.compiler.reset()
    module = Attention().eval().requires_grad_(False)
    twin = copy.deepcopy(module)
    compiled, before = compile_fxopt(module), STATE.in_place
    with all_handled(), torch.no_grad():
        for _ in range(6):
            new = new_rows()
            assert torch.equal(compiled(new), twin(new))
    assert STATE.in_place >= before + 3


def returned_only(layer: Layer, new: torch.Tensor) -> torch.Tensor:
    return torch.cat([layer.keys, new], -2)


def stored_elsewhere(layer: Layer, new: torch.Tensor) -> torch.Tensor:
    layer.longer = torch.cat([layer.keys, new], -2)  # type: ignore[attr-defined]
    return layer.longer.sum(-2)  # type: ignore[attr-defined]


def returned_too(layer: Layer, new: torch.Tensor) -> torch.Tensor:
    return layer.update(new)


def view_returned(layer: Layer, new: torch.Tensor) -> torch.Tensor:
    return layer.update(new)[:, :, :2]


def old_one_returned(layer: Layer, new: torch.Tensor) -> torch.Tensor:
    old = layer.keys
    layer.update(new)
    return old[:, :, 1:]


def written_later(layer: Layer, new: torch.Tensor) -> torch.Tensor:
    return layer.update(new).mul_(2).sum(-2)


def needs_contiguous(layer: Layer, new: torch.Tensor) -> torch.Tensor:
    return layer.update(new).view(6, -1).sum(-1)


def in_front(layer: Layer, new: torch.Tensor) -> torch.Tensor:
    layer.keys = torch.cat([new, layer.keys], -2)
    return layer.keys.sum(-2)


@pytest.mark.parametrize(
    ("function", "reason"),
    [
        (returned_only, "saw it returned"),
        (stored_elsewhere, "takes the place of"),
        (view_returned, "share memory"),
        (old_one_returned, "share memory"),
        (needs_contiguous, "other strides"),
        (in_front, "takes the place of"),
    ],
)
def test_refusals(function: Callable[..., Any], reason: str) -> None:
    refused(function, Layer(), reason)


def test_what_is_no_cache() -> None:
    """A result that is none of a concatenation."""
    assert not found(steps(written_later, Layer()))


def test_a_result_that_is_returned_as_well_is_one_object() -> None:
    layer = Layer()
    appended(returned_too, layer)
    compiled = compile_fxopt(returned_too)
    with torch.no_grad():
        assert compiled(layer, new_rows()) is layer.keys


def test_caches_that_need_gradients_stay() -> None:
    torch.compiler.reset()
    layer, compiled = Layer(requires_grad=True), compile_fxopt(attend)
    twin = copy.deepcopy(layer)
    first, second = layer.keys, twin.keys
    with all_handled() as records:
        for _ in range(4):
            new = new_rows()
            got, want = compiled(layer, new), attend(twin, new)
            assert torch.equal(got, want)
        got.sum().backward()
        want.sum().backward()
    assert torch.equal(first.grad, second.grad)  # type: ignore[arg-type]
    assert all(entry.status is Status.ILLEGAL for entry in found(records))


def test_new_rows_that_need_gradients_stay() -> None:
    torch.compiler.reset()
    layer, compiled, new = Layer(), compile_fxopt(attend), new_rows(requires_grad=True)
    with all_handled() as records:
        compiled(layer, new).sum().backward()
    assert new.grad is not None
    assert all("gradient" in entry.reason for entry in found(records))


def test_a_subclass_stays() -> None:
    class Tagged(torch.Tensor):
        pass

    layer = Layer()
    layer.keys = layer.keys.as_subclass(Tagged)
    torch.compiler.reset()
    compiled = compile_fxopt(attend)
    before = STATE.in_place
    with torch.no_grad():
        for _ in range(5):
            compiled(layer, new_rows())
    assert type(layer.keys) is Tagged
    assert STATE.in_place == before


def test_it_can_be_disabled() -> None:
    torch.compiler.reset()
    compiled, layer = compile_fxopt(attend, disable=NAME), Layer()
    with all_handled() as records, torch.no_grad():
        compiled(layer, new_rows())
    assert not found(records)
    assert layer.keys.is_contiguous()


@pytest.fixture
def layer_in_use() -> tuple[Callable[..., Any], Layer]:
    """A compiled step, and a cache to which it appends in place."""
    torch.compiler.reset()
    compiled, layer = compile_fxopt(attend), Layer()
    with torch.no_grad():
        for _ in range(5):
            compiled(layer, new_rows())
        before = STATE.in_place
        compiled(layer, new_rows())
    assert STATE.in_place == before + 1
    return compiled, layer


HOLDERS: dict[str, Callable[[Layer], Any]] = {
    "variable": lambda layer: layer.keys,
    "list": lambda layer: [layer.keys],
    "attribute": lambda layer: copy.copy(layer),
    "slice": lambda layer: layer.keys[:, :, :3],
    "closure": lambda layer: (lambda keys: lambda: keys)(layer.keys),
}


@pytest.mark.parametrize("holder", HOLDERS)
def test_older_rows_that_user_code_holds_are_independent(
    layer_in_use: tuple[Callable[..., Any], Layer], holder: str
) -> None:
    """As in eager: writing to the cache behind a step does not change what was taken from it before."""
    compiled, layer = layer_in_use
    held: list[Any] = [HOLDERS[holder](layer)]
    want, before = layer.keys.clone(), STATE.in_place
    with torch.no_grad():
        compiled(layer, new_rows())
    assert STATE.in_place == before
    layer.keys.zero_()
    read = {"list": lambda it: it[0], "attribute": lambda it: it.keys, "closure": lambda it: it()}
    kept = read.get(holder, lambda it: it)(held[0])
    assert torch.equal(kept, want[:, :, : kept.shape[2]])
    del held[:], kept
    with torch.no_grad():
        compiled(layer, new_rows())
    assert STATE.in_place == before + 1, "and in place again, as nobody holds the rows any more"
