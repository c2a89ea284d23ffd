"""Bounds against the mask itself: no live key outside of them, none dead inside of what is full."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fxopt.ir.bounds import is_full, live_columns
from fxopt.ir.program import MaskProgram

ROWS, COLUMNS = 23, 29

ATOMS = (
    "k <= q", "k < q", "k <= q + 6", "k > q - 4", "k >= q - 3", "k == q", "k != q", "k < 5", "k >= 7",
    "q <= 3", "q > 11", "q != 4", "q == 9", "k//8 == q//8", "(k + 3)//5 == (q + 3)//5", "(k)//4 <= (q)//4",
    "(k)//4 > (q)//4 - 2",
    "c0[b, k]", "c1[b, q] == c1[b, k]", "True", "False",
)  # fmt: skip


def _mask(text: str) -> torch.Tensor:
    captures = {
        "c0": torch.ones(1, COLUMNS, dtype=torch.bool),
        "c1": torch.zeros(1, COLUMNS, dtype=torch.int64),
    }
    computed = MaskProgram.parse(text).compute(
        (1, 1), (0, ROWS), (0, COLUMNS), captures, {}, torch.device("cpu")
    )
    return computed.expand(1, 1, ROWS, COLUMNS)[0, 0]


@settings(max_examples=150, deadline=None)
@given(
    atoms=st.lists(st.sampled_from(ATOMS), min_size=1, max_size=4),
    words=st.lists(st.sampled_from(["and", "or"]), min_size=3, max_size=3),
    first=st.integers(0, ROWS - 1),
    count=st.integers(1, 9),
)
def test_bounds_hold(atoms: list[str], words: list[str], first: int, count: int) -> None:
    text = atoms[0]
    for word, atom in zip(words, atoms[1:], strict=False):
        text = f"({text}) {word} ({atom})"
    formula, mask = MaskProgram.parse(text).live, _mask(text)
    last = min(first + count, ROWS)
    found = live_columns(formula, (first, last), COLUMNS)
    outside = torch.ones(COLUMNS, dtype=torch.bool)
    for low, high in found:
        outside[low:high] = False
        if is_full(formula, (first, last), (low, high)):
            assert mask[first:last, low:high].all()
    assert not mask[first:last, outside].any()
    assert all(a[1] < b[0] for a, b in zip(found, found[1:], strict=False)), "in order, and apart"


@pytest.mark.parametrize(
    ("text", "rows", "expected"),
    [
        ("k <= q", (8, 16), ((0, 16),)),
        ("k < 5 and q < 5 or k >= 7 and q >= 7", (8, 16), ((7, 29),)),
        ("k < 5 and q < 5 or k >= 7 and q >= 7", (3, 9), ((0, 5), (7, 29))),
        ("q > 20 or q == 3 or q != q", (8, 16), ()),
        ("k <= q and k > q - 4", (8, 16), ((5, 16),)),
        ("k <= q + 100", (8, 16), ((0, COLUMNS),)),
        ("k//8 == q//8", (8, 16), ((8, 16),)),
        ("k//8 == q//8", (9, 18), ((8, 24),)),
        ("(k + 3)//8 == (q + 3)//8 and k <= q", (5, 13), ((5, 13),)),
        ("k < 3 or k > q - 2 and k <= q", (8, 10), ((0, 3), (7, 10))),
        ("k <= q and c0[b, k]", (0, 4), ((0, 4),)),
        ("k < q - 50", (0, 10), ()),
    ],
)
def test_exact_where_the_rule_is_an_interval(
    text: str, rows: tuple[int, int], expected: tuple[tuple[int, int], ...]
) -> None:
    assert live_columns(MaskProgram.parse(text).live, rows, COLUMNS) == expected


def test_full_blocks() -> None:
    causal = MaskProgram.parse("k <= q").live
    assert is_full(causal, (8, 16), (0, 9))
    assert not is_full(causal, (8, 16), (0, 10))
    assert not is_full(MaskProgram.parse("k <= q and c0[b, k]").live, (8, 16), (0, 4))
    assert is_full(MaskProgram.parse("k//8 == q//8").live, (8, 16), (8, 16))
