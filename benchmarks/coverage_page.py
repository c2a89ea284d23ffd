"""The results of `benchmarks.attention_coverage` as the page docs/attention_coverage.md."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable
from typing import Any

Row = dict[str, Any]
FORMS = ("eager", "sdpa")
_MOST_MASKS = 4

_HEAD = """# Attention coverage

How many of the attention layers of a model become `fxopt::attention`, what is known of their masks, and
how many of them Inductor's own attention patterns find in the same graphs. Written by
`python -m benchmarks.attention_coverage` (torch {torch}, transformers {transformers}); with `--page-only`
the committed results are rendered again.
"""

_METHOD = """## How it is counted

- Tiny random models ({models} architectures, {calls} calls): spelled-out attention ("eager") and, where
  the model has it, scaled_dot_product_attention ("SDPA"); float32 and bfloat16; inference and training;
  without a mask and, where the model takes one, with padding. The cells add up all calls of the model.
- A site is a call of scaled_dot_product_attention, or a softmax whose result, dropped out, converted,
  sliced or reshaped as it may be, is an operand of a matrix product. Sites are counted in Dynamo's graphs
  before any pass. A site in a graph that fxopt leaves alone counts as not recovered.
- A known mask is none at all, causal without a tensor, or a formula over batch `b`, head `h`, query `q`
  and key `k` with captured tensors `c0, c1, ...`. `tensor` means that the op reads the mask that the model
  made, and why there is no formula.
- Inductor's figure is its counter `fuse_attention` after its joint-graph passes, where its attention
  patterns are, over the same Dynamo graphs; no code is generated. In training the counter goes up twice
  for each match, which is divided out. A call of scaled_dot_product_attention is one op already, so
  Inductor loses nothing by the zeros in that column.
"""


def render(machine: Row, rows: list[Row]) -> str:
    """The whole page."""
    models = list(dict.fromkeys(row["model"] for row in rows))
    table = [_line(name, [row for row in rows if row["model"] == name]) for name in models]
    parts = [
        _HEAD.format(torch=machine["torch"], transformers=machine["transformers"]),
        _totals(rows),
        "## By architecture\n\n" + _table(_COLUMNS, table),
        _refusals(rows),
        _METHOD.format(models=len(models), calls=len(rows)),
    ]
    return "\n".join(part for part in parts if part)


def _totals(rows: list[Row]) -> str:
    lines = []
    groups: list[tuple[str, Callable[[Row], bool]]] = [
        ("all", lambda row: True),
        ("eager", lambda row: row["attention"] == "eager"),
        ("SDPA", lambda row: row["attention"] == "sdpa"),
        ("float32", lambda row: row["dtype"] == "float32"),
        ("bfloat16", lambda row: row["dtype"] == "bfloat16"),
        ("inference", lambda row: not row["training"]),
        ("training", lambda row: row["training"]),
        ("without padding", lambda row: not row["padded"]),
        ("with padding", lambda row: row["padded"]),
    ]
    for name, belongs in groups:
        chosen = [row for row in rows if belongs(row)]
        known = sum(number for row in chosen for mask, number in row["masks"].items() if _is_known(mask))
        sites = _sum(chosen, "sites")
        shares = [_share(count, sites) for count in (_sum(chosen, "recovered"), known)]
        lines.append((name, str(sites), *shares, _share(_sum(chosen, "inductor"), sites)))
    names = (
        "calls",
        "sites",
        "recovered by fxopt",
        "of these sites, with a known mask",
        "matched by Inductor",
    )
    fxopt, inductor = lines[0][2], lines[0][4]
    whole = f"**fxopt recovers {fxopt} of the attention sites**, Inductor's patterns match {inductor}.\n\n"
    return whole + _table(names, lines)


_COLUMNS = (
    "architecture",
    "attention",
    "layers",
    "fxopt, eager",
    "fxopt, SDPA",
    "Inductor, eager",
    "Inductor, SDPA",
    "mask as recovered",
    "why not",
)


def _line(name: str, rows: list[Row]) -> tuple[str, ...]:
    layers = max(row["sites"] for row in rows)
    cells = [_cell(rows, form, key) for key in ("recovered", "inductor") for form in FORMS]
    masks = _merge(row["masks"] for row in rows)
    why = _merge({entry["reason"]: entry["sites"] for entry in row["refused"]} for row in rows)
    shown = [f"`{mask}`" for mask, _ in masks.most_common(_MOST_MASKS)]
    if len(masks) > _MOST_MASKS:
        shown.append(f"and {len(masks) - _MOST_MASKS} more")
    return (name, rows[0]["class"], str(layers), *cells, "<br>".join(shown), "<br>".join(why))


def _cell(rows: list[Row], form: str, key: str) -> str:
    chosen = [row for row in rows if row["attention"] == form]
    return f"{_sum(chosen, key)} of {_sum(chosen, 'sites')}" if _sum(chosen, "sites") else "-"


def _refusals(rows: list[Row]) -> str:
    lost: Counter[tuple[str, str, str]] = Counter()
    for row in rows:
        for entry in row["refused"]:
            lost[entry["reason"], row["model"], entry["line"]] += entry["sites"]
    lines = [(str(number), name, line, reason) for (reason, name, line), number in lost.most_common()]
    if not lines:
        return ""
    return "## Refused\n\n" + _table(("sites", "architecture", "the model's line", "reason"), lines)


def _is_known(mask: str) -> bool:
    return not mask.startswith("tensor")


def _merge(counts: Iterable[dict[str, int]]) -> Counter[str]:
    merged: Counter[str] = Counter()
    for each in counts:
        merged.update(each)
    return merged


def _sum(rows: Iterable[Row], key: str) -> int:
    return sum(row[key] for row in rows)


def _share(part: int, whole: int) -> str:
    return f"{100 * part / whole:.1f} % ({part})" if whole else "-"


def _table(names: Iterable[str], lines: Iterable[tuple[str, ...]]) -> str:
    head = list(names)
    text = [head, ["---"] * len(head), *([cell.replace("|", "\\|") for cell in line] for line in lines)]
    return "".join(f"| {' | '.join(line)} |\n" for line in text)
