"""Mask programs: their text says what they are and can be read back, and blocks add up to the whole."""

from __future__ import annotations

import pytest
import sympy
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fxopt.ir.formula import AXES, capture, integral, size
from fxopt.ir.program import MaskProgram

TEXTS = [
    "True",
    "False",
    "k <= q",
    "k <= n0 + q",
    "k <= q and k > q - 4",
    "c0[b, k] and k <= q",
    "c0[b, k] == c0[b, q] and k <= q",
    "(c0[b, k] == c0[b, q] or not c1[b, 0, q, k]) and k <= q",
    "(q)//16 == (k)//16",
    "(k - q)//7 >= -1",
    "k >= -3 or c0[0, 0, q, k]",
    "c0[b, n0 + q] != 2*c1[k]",
    "k <= c0[()] + q",
]


@pytest.mark.parametrize("text", TEXTS)
def test_text_is_read_back(text: str) -> None:
    program = MaskProgram.parse(text)
    again = MaskProgram.parse(str(program))
    assert again == program
    assert hash(again) == hash(program)
    assert str(again) == str(program)


@pytest.mark.parametrize(
    "text",
    [
        "",
        "k <",
        "k <= x",
        "k",
        "q + 1",
        "import os",
        "print(k)",
        "k <= 1.5",
        "d0[b, k]",
        "c0[b, k] + 1",
        "k <= q <= b",
    ],
)
def test_what_is_no_program_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match=r"mask program|neither"):
        MaskProgram.parse(text)


def test_names() -> None:
    program = MaskProgram.parse("c1[b, k] and c0[b, q] == 3 and k <= q + n2")
    assert program.captures == ("c0", "c1")
    assert program.sizes == ("n2",)


_, _, Q, K = AXES
ROWS, COLUMNS, BATCH = 5, 7, 2


def numbers() -> st.SearchStrategy[sympy.Expr]:
    leaves = st.sampled_from(
        [
            Q,
            K,
            Q - K,
            AXES[0],
            size("n0"),
            capture("c0")(AXES[0], K),
            capture("c0")(AXES[0], Q),
            capture("c1")(AXES[0], 0, Q, K),
        ]
    )
    return st.builds(lambda leaf, shift: leaf + shift, leaves, st.integers(-3, 3))


def conditions() -> st.SearchStrategy[sympy.logic.boolalg.Boolean]:
    relations = st.builds(
        lambda kind, left, right: kind(left, right),
        st.sampled_from([sympy.Le, sympy.Lt, sympy.Ge, sympy.Gt, sympy.Eq, sympy.Ne]),
        numbers(),
        numbers(),
    )
    combine = st.sampled_from([sympy.And, sympy.Or])
    return st.recursive(
        relations,
        lambda inner: st.one_of(
            st.builds(lambda kind, a, b: kind(a, b), combine, inner, inner), st.builds(sympy.Not, inner)
        ),
        max_leaves=5,
    )


def entry(formula: sympy.Basic, at: dict[str, int], captured: dict[str, torch.Tensor]) -> bool:
    """The formula at one (b, h, q, k), by substitution alone."""
    values = {axis: at[axis.name] for axis in AXES} | {size("n0"): at["n0"]}

    def look_up(access: sympy.Basic) -> sympy.Integer:
        place = tuple(int(arg.xreplace(values)) for arg in access.args)
        return sympy.Integer(int(captured[str(access.func)][place]))

    found = formula.replace(lambda each: isinstance(each, sympy.core.function.AppliedUndef), look_up)
    return bool(found.xreplace(values))


@settings(max_examples=60, deadline=None)
@given(conditions(), st.integers(0, 3))
def test_computed_entry_by_entry(formula: sympy.logic.boolalg.Boolean, n0: int) -> None:
    program = MaskProgram.parse(str(MaskProgram(formula)))
    captured = {"c0": torch.arange(BATCH * COLUMNS).view(BATCH, COLUMNS) % 4,
                "c1": torch.arange(BATCH * ROWS * COLUMNS).view(BATCH, 1, ROWS, COLUMNS) % 3}  # fmt: skip
    shape = (BATCH, 1, ROWS, COLUMNS)
    whole = program.compute(
        (BATCH, 1), (0, ROWS), (0, COLUMNS), captured, {"n0": n0}, torch.device("cpu")
    ).expand(shape)
    for b, q, k in ((b, q, k) for b in range(BATCH) for q in range(ROWS) for k in range(COLUMNS)):
        wanted = entry(formula, {"b": b, "h": 0, "q": q, "k": k, "n0": n0}, captured)
        assert bool(whole[b, 0, q, k]) == wanted, (b, q, k)
    block = program.compute((BATCH, 1), (2, 4), (1, 6), captured, {"n0": n0}, torch.device("cpu"))
    assert torch.equal(block.expand(BATCH, 1, 2, 5), whole[:, :, 2:4, 1:6])


def test_fractions_become_integers() -> None:
    """sympy takes ``floor(x) >= -1`` for ``x >= -1``."""
    q, k = AXES[2:]
    formula = sympy.Ge((k - q) / 7, -1)
    assert str(MaskProgram(integral(formula))) == "k >= q - 7"
