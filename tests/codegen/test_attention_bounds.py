"""Bounds of the loops of attention's kernels: their text, run in Python, against the mask entry by entry."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from fxopt.codegen.attention_bounds import bounds_function, spans
from fxopt.codegen.attention_program import Capture, TritonText
from fxopt.codegen.attention_spec import Spec
from fxopt.codegen.attention_tiles import Tiles
from fxopt.ir.formula import K, Q, numbered
from fxopt.ir.program import MaskProgram, ScoreProgram
from support.attention_walk import forward_walk

ROWS, COLUMNS = 45, 53


class Number(int):
    """A number of Triton."""

    def to(self, _: object) -> Number:
        return self


class Language:
    """What the text of bounds uses of Triton."""

    int32 = int64 = constexpr = None

    @staticmethod
    def minimum(a: int, b: int) -> Number:
        return Number(min(a, b))

    @staticmethod
    def maximum(a: int, b: int) -> Number:
        return Number(max(a, b))

    @staticmethod
    def where(condition: bool, a: int, b: int) -> Number:
        return Number(a if condition else b)

    @staticmethod
    def load(entry: int) -> Number:
        return Number(entry)


class Pointer:
    """To the captured lengths of sequences."""

    def __init__(self, values: list[int]) -> None:
        self.values = values

    def __add__(self, place: int) -> int:
        return self.values[place]


def bounds(mask: str, along: Any, b: int, first: int, last: int, extent: int, **captured: Any) -> list[Any]:
    """``low, full_low, full_high, high`` of each piece."""
    formula = MaskProgram.parse(mask).live
    found = spans(formula, along)
    capture = Capture("c0", torch.int64, (1,))
    text = bounds_function("bounds", found, TritonText([capture])).replace("@triton.jit", "")
    names = ", ".join("c0_ptr" if name == "c0" else name for name in captured)
    namespace: dict[str, Any] = {"tl": Language, "floor_div": lambda a, c: Number(a // c)}
    exec(text.replace("captured", names or "*_"), namespace)
    given = (Number(b), Number(first), Number(last), Number(extent))
    return [namespace["bounds"](*given, piece, *captured.values()) for piece in range(len(found))]


MASKS = {
    "all": ("True", {}),
    "none": ("False", {}),
    "causal": ("k <= q", {}),
    "strictly causal": ("k < q", {}),
    "shifted": ("k <= q + n0", {"n0": 6}),
    "window": ("k <= q and k > q - 7", {}),
    "two-sided": ("k <= q + 3 and k >= q - 4", {}),
    "anti-causal": ("k >= q", {}),
    "chunks": ("k <= q and (k)//8 == (q)//8", {}),
    "shifted chunks": ("(k + 3)//8 == (q)//8", {}),
    "prefix": ("k <= q or k < n0", {"n0": 9}),
    "first keys and a window": ("k < 4 or k > q - 7", {}),
    "window behind a prefix": ("k <= q and (k < 5 or k > q - 7)", {}),
    "late queries see nothing": ("q < 20 and k <= q", {}),
    "lengths": ("k < c0[b] and k <= q", {"c0": [53, 17]}),
    "three alternatives": ("k == q or k == 0 or k == 7", {}),
    "scaled": ("2*k <= q", {}),
}


def live_of(mask: str, b: int, captured: dict[str, Any]) -> torch.Tensor:
    tensors = {"c0": torch.tensor(captured["c0"])} if "c0" in captured else {}
    sizes = {name: one for name, one in captured.items() if name.startswith("n")}
    program = MaskProgram.parse(mask)
    found = program.compute((2, 1), (0, ROWS), (0, COLUMNS), tensors, sizes, torch.device("cpu"))
    return found.expand(2, 1, ROWS, COLUMNS)[b, 0]


@pytest.mark.parametrize("along", ["k", "q"])
@pytest.mark.parametrize("name", sorted(MASKS))
def test_bounds_hold_what_is_live_and_full_parts_are(name: str, along: str) -> None:
    mask, captured = MASKS[name]
    given = {key: Pointer(one) if key == "c0" else Number(one) for key, one in captured.items()}
    for b in (0, 1):
        live = live_of(mask, b, captured)
        live = live if along == "k" else live.T
        for first in range(0, live.shape[0], 8):
            block = live[first : first + 8]
            last, extent = first + len(block) - 1, live.shape[1]
            pieces = bounds(mask, K if along == "k" else Q, b, first, last, extent, **given)
            seen = torch.zeros(extent, dtype=torch.bool)
            reached = 0
            for low, full_low, full_high, high in pieces:
                assert reached <= low <= full_low <= full_high <= high <= extent
                assert block[:, full_low:full_high].all()
                seen[low:high] = True
                reached = high
            assert not block[:, ~seen].any()


def spec(mask: str, sizes: dict[str, Any], group: int) -> Spec:
    names = tuple(numbered("n", [None] * len(sizes)))
    return Spec(
        torch.bfloat16, group, 64, 64, MaskProgram.parse(mask), ScoreProgram.parse(""), 1.0, (), names
    )


EXACT = ("all", "causal", "shifted", "window", "two-sided", "anti-causal", "chunks", "prefix")


@pytest.mark.parametrize("group", [1, 3, 4])
@pytest.mark.parametrize("name", EXACT)
def test_no_tile_is_computed_in_vain(name: str, group: int) -> None:
    """Tiles that a kernel computes have a live score; those without a mask have no other."""
    mask, sizes = MASKS[name]
    tiles = Tiles(16, 8, 4, 1)
    walk = forward_walk(spec(mask, sizes, group), tiles, ROWS, COLUMNS, sizes)
    pairs = live_of(mask, 0, sizes).repeat_interleave(group, 0)
    computed = partly = 0
    for row in range(0, len(pairs), tiles.rows):
        for column in range(0, COLUMNS, tiles.columns):
            tile = pairs[row : row + tiles.rows, column : column + tiles.columns]
            computed += bool(tile.any())
            partly += bool(tile.any()) and not (bool(tile.all()) and tile.shape[1] == tiles.columns)
    assert walk.tiles == computed
    # Where two rules meet, a tile that both fill together is not known to be full.
    assert walk.masked == partly or (name == "prefix" and walk.masked <= partly + walk.programs)


LONG = 16384
QUERIES = torch.arange(LONG)
# The keys that each query sees, and how many times as many scores are computed: half a tile of queries and
# one of keys more at each end of what a query sees.
LEAST = {
    "k <= q": (QUERIES + 1, 1.02),
    "k <= q and k > q - 1024": ((QUERIES + 1).clamp(max=1024), 1.13),
    "k <= q and (k)//512 == (q)//512": (QUERIES % 512 + 1, 1.25),
}


@pytest.mark.parametrize("mask", LEAST)
def test_flops_and_bytes_beside_the_least(mask: str) -> None:
    """At the sizes of a long prompt, with the tiles of a Hopper."""
    tiles, (seen, share) = Tiles(128, 64, 4, 3), LEAST[mask]
    one = spec(mask, {}, 1)
    walk = forward_walk(one, tiles, LONG, LONG)
    least = int(seen.sum())
    assert 1.0 <= walk.scores(tiles) / least < share
    assert 1.0 <= walk.flops(one, tiles) / (2 * least * 128) < share
    # Each program reads the keys of its tiles once, for all of its rows.
    assert walk.bytes_read(one, tiles) * tiles.rows == walk.scores(tiles) * 128 * 2
