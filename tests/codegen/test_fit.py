"""Which launches of a kernel are taken where the first ones do not fit the target."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from fxopt.codegen import fit
from fxopt.codegen.attention_tiles import Tiles, beside
from fxopt.codegen.fit import fitted, fitting
from fxopt.codegen.kernel_file import KernelFile, Launch
from fxopt.errors import CannotCompile
from fxopt.ir.target import Target
from fxopt.runtime.kernel_cache import KernelCache

TARGET = Target.named("sm_90")


def kernel(first: int, second: int, jit: str = "the same") -> KernelFile:
    launches = tuple(
        Launch(entry, (), ("1",), (("BLOCK", size),)) for entry, size in (("one", first), ("two", second))
    )
    return KernelFile("example", (), jit, launches, (), "", "", modelled=False)


@pytest.fixture
def compiled(monkeypatch: pytest.MonkeyPatch) -> Callable[[int], list[tuple[str, int]]]:
    """What was compiled, once it is said from which size of a block on kernels spill."""

    def spilling_above(limit: int) -> list[tuple[str, int]]:
        seen: list[tuple[str, int]] = []

        def compile_launches(pairs: Sequence[tuple[KernelFile, int]], *_: Any, **__: Any) -> list[Any]:
            return [one(given.launches[place]) for given, place in pairs]

        def one(launch: Launch) -> Any:
            size = int(dict(launch.constants)["BLOCK"])
            seen.append((launch.entry, size))
            return SimpleNamespace(size=size, problems=lambda: ("it spills",) if size > limit else ())

        monkeypatch.setattr(fit, "compile_launches", compile_launches)
        return seen

    return spilling_above


def sizes(found: KernelFile) -> list[int]:
    return [int(dict(launch.constants)["BLOCK"]) for launch in found.launches]


def test_what_fits_is_left_and_nothing_else_is_compiled(compiled: Any) -> None:
    seen = compiled(64)
    first = replace(kernel(64, 32), alternatives=(kernel(32, 16),))
    ((found, results),) = fitted([first], TARGET)
    assert found is first
    assert seen == [("one", 64), ("two", 32)]
    assert [one.size for one in results] == [64, 32]


def test_each_launch_is_chosen_for_itself(compiled: Any) -> None:
    """The first that fits, in the order of the alternatives; what has been tried is not tried again."""
    seen = compiled(48)
    others = (kernel(64, 16), kernel(48, 16), kernel(16, 16))
    ((found, results),) = fitted([replace(kernel(64, 32), alternatives=others)], TARGET)
    assert sizes(found) == [48, 32]
    assert [one.size for one in results] == [48, 32]
    assert seen == [("one", 64), ("two", 32), ("one", 48)]
    assert found.about.configuration[-1].startswith("instead, without spills on sm_90: BLOCK=48")
    assert found.alternatives == ()


def test_what_nothing_fits_stays_as_it_was(compiled: Any) -> None:
    compiled(8)
    first = replace(kernel(64, 4), alternatives=(kernel(32, 2), kernel(16, 2)))
    ((found, results),) = fitted([first], TARGET)
    assert found is first
    assert [one.problems() for one in results] == [("it spills",), ()]


def test_alternatives_of_another_text_are_not_mixed_in(compiled: Any) -> None:
    compiled(48)
    ((found, _),) = fitted([replace(kernel(64, 32), alternatives=(kernel(16, 16, "another"),))], TARGET)
    assert sizes(found) == [64, 32]


def test_no_kernels(compiled: Any) -> None:
    assert compiled(8) == []
    assert fitted([], TARGET) == []


def test_what_fits_is_remembered(compiled: Any, tmp_path: Path) -> None:
    seen, cache = compiled(48), KernelCache(tmp_path)
    first = replace(kernel(64, 32), alternatives=(kernel(64, 16), kernel(48, 16)))
    found = fitting(first, TARGET, cache)
    assert sizes(found) == [48, 32]
    assert found.alternatives == ()
    count = len(seen)
    again = fitting(first, TARGET, KernelCache(tmp_path))
    assert (sizes(again), again.about) == (sizes(found), found.about)
    assert len(seen) == count
    assert sizes(fitting(first, Target.named("sm_80"), cache)) == [48, 32]
    assert len(seen) > count


def test_what_cannot_be_compiled_stays_as_it_was(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def fails(*_: Any, **__: Any) -> Any:
        raise CannotCompile(kernel="example", target="sm_90", detail="no", file="-")

    monkeypatch.setattr(fit, "compile_launches", fails)
    first = replace(kernel(64, 32), alternatives=(kernel(16, 16),))
    assert fitting(first, TARGET, KernelCache(tmp_path)) is first


def test_tiles_beside_others_never_repeat_them() -> None:
    for tiles in (Tiles(128, 64, 8, 3), Tiles(16, 16, 4, 1), Tiles(32, 32, 4, 1)):
        others = beside(tiles)
        assert tiles not in others
        assert len(set(others)) == len(others)
        assert min(min(one.rows, one.columns) for one in others) >= 16
