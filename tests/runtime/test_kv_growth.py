"""Steps of several growing tensors at once: the check of all of them together, and what it does not take."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch

from fxopt.runtime import step_loops
from fxopt.runtime.kv_growth import Append, Growth, Length, Resized
from fxopt.runtime.kv_state import STATE
from fxopt.runtime.step_loops import PythonLoops

# (B, H, S, D) of keys and of values, and a cache of rows without heads; the last keeps its newest 6 rows.
FORMS: dict[str, list[tuple[tuple[int, ...], int, int | None]]] = {
    "one width": [((2, 2, 6, 4), 2, None)] * 3,
    "two widths": [((2, 1, 6, 12), 2, None), ((2, 1, 6, 4), 2, None)] * 2,
    "two ranks": [((2, 2, 6, 4), 2, None), ((2, 6, 3), 1, None)],
    "a window": [((2, 2, 6, 4), 2, None), ((2, 2, 6, 5), 2, 6)],
}


@pytest.fixture(autouse=True, params=["python", "c++"])
def _loops(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    loops = PythonLoops() if request.param == "python" else step_loops._compiled()
    monkeypatch.setattr(step_loops.CURRENT, "loops", loops)


def newest(rows: int | None) -> tuple[Length, Length] | None:
    """The slice of so many rows at the end."""
    return None if rows is None else (Length(-rows), Length(2**63 - 1))


class Rows:
    """Caches that grow as compiled graphs have them grow, and what eager gives."""

    def __init__(self, form: str) -> None:
        self.appends = [
            Append(place, dim, window is not None, newest(window), place, Length(1), False)
            for place, (_, dim, window) in enumerate(FORMS[form])
        ]
        self.growth = Growth(self.appends)
        self.wanted = [torch.randn(shape) for shape, *_ in FORMS[form]]
        self.caches = [tensor.clone() for tensor in self.wanted]

    def step(self, *, resized: bool = False) -> bool:
        """Whether one check of all was enough; where it was, the caches' own tensors grow if `resized`."""
        copied = STATE.copied
        with torch.no_grad():
            way = self.growth.resized if resized else self.growth.at_tip
            found: Any = way(self.caches, self.caches)
            if isinstance(found, Resized):
                with found:
                    self._write(found.grown)
                    self.caches = list(found.handed_out())
            else:
                grown, self.caches = found or self.growth.of(self.caches, [0] * len(self.caches))  # type: ignore[assignment]
                self._write(grown)
        for mine, want in zip(self.caches, self.wanted, strict=True):
            assert torch.equal(mine, want)
        assert found is None or STATE.copied == copied
        return found is not None

    def _write(self, grown: Sequence[torch.Tensor]) -> None:
        for each, tensor in zip(self.appends, grown, strict=True):
            new = torch.randn_like(tensor.narrow(each.dim, 0, 1))
            tensor.narrow(each.dim, -1, 1).copy_(new)
            whole = torch.cat([self.wanted[each.output], new], each.dim)
            first = 0 if each.part is None else whole.shape[each.dim] + each.part[0].number
            self.wanted[each.output] = whole.narrow(each.dim, first, whole.shape[each.dim] - first)


@pytest.mark.parametrize("form", FORMS)
def test_one_check_is_enough(form: str) -> None:
    rows = Rows(form)
    assert not rows.step(), "the rows are not in a buffer yet"
    assert all(rows.step() for _ in range(40))


@pytest.mark.parametrize("form", ["one width", "two widths", "a window"])
def test_the_tensors_themselves_grow(form: str) -> None:
    rows = Rows(form)
    rows.step()
    assert all(rows.step(resized=number % 3 > 0) for number in range(40))


@pytest.mark.parametrize("form", ["one width", "a window"])
@pytest.mark.parametrize("when", ["before", "behind"])
def test_a_step_that_fails_leaves_the_tensors_as_they_were(form: str, when: str) -> None:
    rows = Rows(form)
    rows.step()
    rows.step(resized=True)
    found = rows.growth.resized(rows.caches, rows.caches)
    assert found is not None
    with pytest.raises(KeyboardInterrupt), found:
        if when == "behind":
            found.handed_out()
        raise KeyboardInterrupt
    del found
    assert all(map(torch.equal, rows.caches, rows.wanted))
    rows.step(resized=True)
    assert rows.step(resized=True)


def test_tensors_that_grow_along_different_dimensions_are_not_changed() -> None:
    rows = Rows("two ranks")
    rows.step()
    assert rows.growth.resized(rows.caches, rows.caches) is None


CHANGES: dict[str, Callable[[torch.Tensor], Any]] = {
    "a slice": lambda cache: cache[:, :1],
    "its memory": lambda cache: cache.untyped_storage(),
    "numpy": lambda cache: cache.numpy(),
    "fewer rows": lambda cache: setattr(cache, "data", cache.data.narrow(-2, 0, 5)),
    "later rows": lambda cache: setattr(cache, "data", cache.data.narrow(-2, 1, 6)),
    "other memory": lambda cache: setattr(cache, "data", cache.data.clone()),
}


@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize("which", [0, 1])
def test_what_is_not_as_it_was_is_looked_at_one_by_one(change: str, which: int) -> None:
    rows = Rows("two widths")
    assert [rows.step() for _ in range(3)] == [False, True, True]
    held = CHANGES[change](rows.caches[which])
    rows.wanted = [cache.clone() for cache in rows.caches]
    copied = STATE.copied
    assert rows.growth.at_tip(rows.caches, rows.caches) is None
    if held is not None:
        rows.growth.of(rows.caches, [0] * 4)
        assert STATE.copied == copied + 1, "what is held"


def test_full_buffers_are_looked_at_one_by_one() -> None:
    rows = Rows("two widths")
    taken = [rows.step() for _ in range(600)]
    assert 0.95 * 600 < sum(taken) < 600


def test_another_number_of_rows_that_fits(monkeypatch: pytest.MonkeyPatch) -> None:
    rows = Rows("one width")
    rows.step()
    tip = next(iter(rows.growth._tips.values()))
    left = tip.left
    assert tip.extended(rows.caches, left + 1, rows.caches) is None
    grown, _ = tip.extended(rows.caches, left, rows.caches) or ((), ())
    assert [tensor.shape[2] for tensor in grown] == [7 + left] * 3
    assert tip.left == 0
