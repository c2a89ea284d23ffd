"""The results of `benchmarks.generate_equality` as the page docs/generate_equality.md."""

from __future__ import annotations

from typing import Any

from benchmarks.equality_models import MODELS, WINDOW
from benchmarks.tables import table

Row = dict[str, Any]

_HEAD = """# Tokens of compiled models

`torch.compile(model, backend="fxopt").generate(...)` beside the model itself: how many tokens are equal, by
architecture and way of generating. Written by `python -m benchmarks.generate_equality` (torch {torch},
transformers {transformers}); with `--page-only` the committed results are rendered again.

**{equal} of {tokens} tokens are equal.**{missing}
"""

_METHOD = """## How it is counted

- Tiny models of random weights, float32, one thread, the eager host: the same kernels as without fxopt,
  around what fxopt makes of the model and its caches. Prompts of 9 tokens, and at least 200 that are written.
  A token is compared exactly; a text of another length counts as wrong as a whole.
- Sliding windows have {window} tokens, so that they fill, and are full for most of a text.
- All ways of one model are run by one compiled model, in turn, as by a server; the prompts of other lengths
  come first.
- `crop` takes back the newest tokens and writes others, `deepcopy` goes on with copies of a prompt's cache,
  `shared` with two caches of the same tensors by turns, `continue` with the cache of an earlier call.
  Assisted decoding has the same model without its last layer as its draft, which is not compiled. Whisper's
  `generate` makes the beginning of a text itself: there these ways call the compiled model token by token.
- Appends in place are counted among all keys and values that grew while {long} tokens were written. The
  others were copied: when a buffer was full, and in steps that Dynamo compiled, as it holds all inputs then.
- Beam search makes new tensors at each step when it reorders the beams, in eager as here: none of its appends
  is in place.
"""


def render(machine: Row, rows: list[Row]) -> str:
    """The whole page."""
    ways = [row for row in rows if row["kind"] == "scenario"]
    growth = [row for row in rows if row["kind"] == "growth"]
    total = {key: sum(row[key] for row in ways) for key in ("equal", "tokens")}
    long = max((row["tokens"] for row in growth), default=0)
    missing = [name for name in MODELS if name not in {row["model"] for row in rows}]
    parts = [
        _HEAD.format(
            **{name: machine[name] for name in ("torch", "transformers")},
            **total,
            missing=f" Not compared, and in no figure of this page: {', '.join(missing)}." if missing else "",
        ),
        _tokens(ways),
        "## Graphs, and appends in place\n\n" + _growth(growth, ways),
        _METHOD.format(window=WINDOW, long=long),
    ]
    return "\n".join(parts)


def _tokens(rows: list[Row]) -> str:
    """Tokens that are equal: a number where all are."""
    names = list(dict.fromkeys(row["scenario"] for row in rows))
    models = list(dict.fromkeys(row["model"] for row in rows))
    found = {(row["model"], row["scenario"]): row for row in rows}
    lines = [[model, *(_cell(found.get((model, name))) for name in names)] for model in models]
    return table(["model", *names], lines)


def _cell(row: Row | None) -> str:
    if row is None:
        return "-"
    return str(row["equal"]) if row["equal"] == row["tokens"] else f"**{row['equal']} of {row['tokens']}**"


def _growth(rows: list[Row], ways: list[Row]) -> str:
    names = [
        "model", "graphs of the first prompt", "of a second length", "of a third", "of a fourth",
        "appends in place", "graphs of all ways",
    ]  # fmt: skip
    lines = [
        [
            row["model"],
            *map(str, row["graphs"]),
            f"{100 * row['in_place'] / row['appends']:.2f} %",
            str(sum(row["graphs"]) + sum(way["graphs"] for way in ways if way["model"] == row["model"])),
        ]
        for row in rows
    ]
    return table(names, lines)
