"""Tiles hold every live score once, and say which rows are dead, whatever mask it is."""

from __future__ import annotations

import pytest
import sympy
import torch

from fxopt.ir.formula import numbered
from fxopt.ir.ops import tiles as module
from fxopt.ir.ops.tile_plan import is_of_distance, of_data, of_places
from fxopt.ir.ops.tiles import Problem, Tile, tiles
from fxopt.ir.program import MaskProgram, ScoreProgram

pytestmark = pytest.mark.usefixtures("blocks_at_any_size")

BATCH, HEADS, ROWS, COLUMNS = 3, 2, 150, 170
MASKS = (
    "True",
    "k <= q",
    "k <= q + n0",
    "k > q",
    "k <= q and k > q - 7",
    "k//16 == q//16",
    "k < n0",
    "c0[b, k]",
    "c0[b, k] and k <= q",
    "c0[0, k] and k <= q and k > q - 40",
    "c0[b, k] and k//16 == q//16",
    "c0[b, k] and k > q + n0",
    "c1[b, k] == c1[b, q]",
    "c1[b, k] == c1[b, q] and k <= q",
    "c0[b, k] or k == q",
    "h == 0 and k <= q",
    "c2[b, h, q, k]",
    "c2[b, h, q, k] and k <= q and k > q - 30",
    "k < c3[b] and k <= q",
)
PADDINGS = ("none", "left", "right", "holes", "all of one")


def keep_of(padding: str) -> torch.Tensor:
    keep = torch.ones(BATCH, COLUMNS, dtype=torch.bool)
    for place in range(BATCH):
        if padding == "left":
            keep[place, : 40 * place] = False
        elif padding == "right":
            keep[place, COLUMNS - 40 * place :] = False
        elif padding == "holes":
            keep[place, place :: 2 + place] = False
    if padding == "all of one":
        keep[1] = False
    return keep


def problem(mask: str, padding: str) -> Problem:
    torch.manual_seed(0)
    captures = [
        keep_of(padding),
        (torch.arange(COLUMNS) // 33).expand(BATCH, -1),
        torch.rand(BATCH, HEADS, ROWS, COLUMNS) < 0.02,
        torch.tensor([0, 60, COLUMNS]),
    ]
    program = MaskProgram.parse(mask)
    named, sizes = numbered("c", captures), numbered("n", [5])
    query, key = torch.randn(BATCH, HEADS, ROWS, 8), torch.randn(BATCH, HEADS, COLUMNS, 8)
    return Problem(query, key, key, named, sizes, program, ScoreProgram.parse(""), 1.0)


def whole(given: Problem) -> torch.Tensor:
    """The mask of all scores at once."""
    tile = Tile((0, BATCH), (0, ROWS), (0, COLUMNS))
    return given.values(tile).condition(given.mask.live).expand(BATCH, HEADS, ROWS, COLUMNS)


@pytest.mark.parametrize("padding", PADDINGS)
@pytest.mark.parametrize("mask", MASKS)
def test_every_live_score_is_in_one_tile(mask: str, padding: str) -> None:
    given = problem(mask, padding)
    live, times = whole(given), torch.zeros(BATCH, HEADS, ROWS, COLUMNS, dtype=torch.int64)
    dead = torch.zeros(BATCH, HEADS, ROWS, 1, dtype=torch.bool)
    for tile in tiles(given, 2**20):
        at = (slice(*tile.batch), slice(None), slice(*tile.rows))
        if not tile.is_empty:
            times[(*at, slice(*tile.columns))] += 1 if tile.live is None else tile.live.long()
        if tile.dead is not None:
            dead[at] |= tile.dead
    assert torch.equal(times, live.long())
    assert torch.equal(dead, ~live.any(-1, keepdim=True))


@pytest.mark.parametrize("mask", ["k <= q", "k <= q and k > q - 7", "c0[b, k] and k <= q and k > q - 40"])
def test_numbers_to_add_are_those_of_the_mask(mask: str) -> None:
    for tile in tiles(problem(mask, "none"), 2**20):
        assert isinstance(tile.mask, module.Band)
        assert torch.equal(tile.mask.added == 0.0, tile.mask.live)
        assert torch.equal(tile.mask.added.isneginf(), ~tile.mask.live)
        assert tile.mask.added.stride()[2:] == (tile.columns[1] - tile.columns[0], 1)


@pytest.mark.parametrize(
    ("mask", "places", "data", "by_distance"),
    [
        ("True", "True", "True", True),
        ("k <= q and k > q - 7", "k <= q and k > q - 7", "True", True),
        ("c0[b, k] and k <= q", "k <= q", "c0[b, k]", True),
        ("k//16 == q//16 and k < c0[b]", "k//16 == q//16", "k < c0[b]", False),
        ("k < 9 and h == 0", "k < 9", "h == 0", False),
        ("k <= q or c0[b, k]", "True", "k <= q or c0[b, k]", True),
        ("k - q < 3 or q - k > 2", "k - q < 3 or q - k > 2", "True", True),
    ],
)
def test_what_places_say_and_what_data_say(mask: str, places: str, data: str, by_distance: bool) -> None:
    live = MaskProgram.parse(mask).live
    assert of_places(live) == MaskProgram.parse(places).live
    assert of_data(live) == MaskProgram.parse(data).live
    assert sympy.And(of_places(live), of_data(live)) == live
    assert is_of_distance(of_places(live)) is by_distance


def test_what_data_say_of_keys_is_computed_once(monkeypatch: pytest.MonkeyPatch) -> None:
    computed: list[Tile] = []
    values = Problem.values

    def watched(self: Problem, tile: Tile, *more: torch.Tensor) -> object:
        computed.append(tile)
        return values(self, tile, *more)

    monkeypatch.setattr(Problem, "values", watched)
    found = list(tiles(problem("c0[b, k] and k <= q and k > q - 7", "left"), 2**20))
    assert len(found) > 3
    assert len(computed) == 2, "once for the keys, once for the distances"
