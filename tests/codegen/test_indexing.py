"""Index arithmetic against what torch's views do."""

from __future__ import annotations

import sympy
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils._sympy.functions import FloorDiv

from fxopt.codegen.indexing import axis, floor_divide, modulo, ranges_of, reshaped, sizes_of
from fxopt.codegen.print_index import print_index

B, S, H = (sympy.Symbol(name, integer=True, positive=True) for name in "BSH")


@settings(max_examples=150, deadline=None, derandomize=True)
@given(st.data())
def test_reshaped_is_where_a_view_reads(data: st.DataObject) -> None:
    factors = data.draw(st.lists(st.sampled_from((1, 2, 3, 4)), min_size=1, max_size=5))
    source, shape = _grouped(data, factors), _grouped(data, factors)
    axes = [axis(f"x{dim}", sympy.Integer(size)) for dim, size in enumerate(shape)]
    index = reshaped(tuple(a.symbol for a in axes), sizes_of(shape), sizes_of(source), ranges_of(axes))
    values = torch.arange(torch.Size(source).numel()).view(source)
    for place in _places(shape):
        at = [int(e.subs({a.symbol: p for a, p in zip(axes, place, strict=True)})) for e in index]
        assert values[tuple(at)] == values.view(shape)[place], (source, shape, index)


def _grouped(data: st.DataObject, factors: list[int]) -> list[int]:
    """`factors` with some neighbours multiplied together."""
    sizes = [1]
    for factor in factors:
        if data.draw(st.booleans()):
            sizes.append(factor)
        else:
            sizes[-1] *= factor
    return sizes


def _places(shape: list[int]) -> list[tuple[int, ...]]:
    return [tuple(place.tolist()) for place in torch.ones(shape).nonzero()]


def test_what_a_view_leaves_alone_is_not_divided() -> None:
    axes = [axis("b", B), axis("s", S), axis("h", H)]
    b, s, h = (one.symbol for one in axes)
    assert reshaped((b, s, h), (B, S, H), (B * S, H), ranges_of(axes)) == (S * b + s, h)
    rows = axis("x", B * S)
    index = reshaped((rows.symbol, h), (B * S, H), (B, S, H), ranges_of([rows, axes[2]]))
    assert [print_index(one) for one in index] == ["x // S", "x % S", "h"]


def test_parts_of_a_size_that_is_not_known() -> None:
    """That four parts of a quarter are the whole is known of a view, not of the expressions."""
    parts = (B, sympy.Integer(4), FloorDiv(S, 4), H)
    cut = [axis(name, size) for name, size in zip("bpsh", parts, strict=True)]
    b, p, s, h = (one.symbol for one in cut)
    found = reshaped((b, p, s, h), parts, (B, S, H), ranges_of(cut))
    whole = [axis(name, size) for name, size in zip("bsh", (B, S, H), strict=True)]
    back = reshaped((b, s, h), (B, S, H), parts, ranges_of(whole))
    numbers = {B: 3, S: 12, H: 5, b: 2, h: 4}
    for place in range(12):
        at = numbers | {p: place // 3, s: place % 3}
        assert [one.subs(at) for one in found] == [2, place, 4]
        assert [one.subs(numbers | {s: place}) for one in back] == [2, place // 3, place % 3, 4]


def test_divisions_that_the_range_decides_disappear() -> None:
    row, column = axis("x", S), axis("r", H)
    ranges = ranges_of([row, column])
    flat = row.symbol * H + column.symbol
    assert floor_divide(flat, H, ranges) == row.symbol
    assert modulo(flat, H, ranges) == column.symbol
    assert print_index(floor_divide(flat, S, ranges)) == "(x * H + r) // S"


def test_an_index_that_may_be_negative_keeps_its_division() -> None:
    column = axis("r", sympy.Integer(8))
    assert print_index(modulo(column.symbol - 4, sympy.Integer(8), ranges_of([column]))) == "(r - 4) % 8"


def test_text_has_large_steps_first() -> None:
    x, y = (axis(name, sympy.Integer(9)).symbol for name in "xy")
    assert print_index(y + 64 * x - 8) == "x * 64 - 8 + y"
    assert print_index(-y) == "-y"


def test_bounds_are_functions_of_two_arguments() -> None:
    x, y, z = (axis(name, sympy.Integer(9)).symbol for name in "xyz")
    text = print_index(sympy.Max(x - 7, y, z) * 2 + sympy.Min(x, y))
    for numbers in ((1, 2, 3), (8, 0, 0), (3, 5, 2)):
        expected = max(numbers[0] - 7, *numbers[1:]) * 2 + min(numbers[:2])
        assert eval(text, dict(zip("xyz", numbers, strict=True))) == expected
