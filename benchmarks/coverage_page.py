"""The results of `benchmarks.attention_coverage` as the page docs/attention_coverage.md."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Iterable
from typing import Any

from benchmarks.coverage_models import ENTRIES
from benchmarks.tables import table

Row = dict[str, Any]
FORMS = ("eager", "sdpa")
_MOST_MASKS = 4

_HEAD = """# Attention coverage

How many of the attention layers of a model become `fxopt::attention`, what is known of their masks, and
how many of them Inductor's own attention patterns find in the same graphs. Written by
`python -m benchmarks.attention_coverage` (torch {torch}, transformers {transformers}); with `--page-only`
the committed results are rendered again.

{commits}
"""

_METHOD = """## How it is counted

- Tiny random models ({models} architectures, {calls} calls): spelled-out attention ("eager") and, where
  the model has it, scaled_dot_product_attention ("SDPA"); float32 and bfloat16; inference and training;
  without a mask and, where the model takes one, with padding. The cells add up all calls of the model.
- A site is a call of scaled_dot_product_attention, or a softmax whose result, dropped out, converted,
  sliced or reshaped as it may be, is an operand of a matrix product. Sites are counted in Dynamo's graphs
  before any pass. A site in a graph that fxopt leaves alone counts as not recovered.
- Recovered: the site became `fxopt::attention`. Refused: it was left as it is, for the reason given.
- Formula known: of all sites, those whose whole mask, and all that is added to their scores, is none at all,
  causal, or a formula over batch `b`, head `h`, query `q` and key `k` with captured tensors `c0, c1, ...`.
  A tensor captured with an entry for each query and key (`c0[..., q, k]`) is no formula, nor is `tensor`,
  the mask as the model made it, with the reason. `score` is what becomes of a scaled score `s`, `bias` what
  is added to it, `sinks` are scores of a key without a value.
- Inductor's figure is its counter `fuse_attention` after its joint-graph passes, where its attention
  patterns are, over the same Dynamo graphs; no code is generated. In training the counter goes up twice
  for each match, which is divided out. A call of scaled_dot_product_attention is one op already, so
  Inductor loses nothing by the zeros in that column.
"""


def render(machine: Row, rows: list[Row]) -> str:
    """The whole page."""
    models = list(dict.fromkeys(row["model"] for row in rows))
    lines = [_line(name, [row for row in rows if row["model"] == name]) for name in models]
    parts = [
        _HEAD.format(**{name: machine[name] for name in ("torch", "transformers")}, commits=_commits(rows)),
        _totals(rows),
        "## By architecture\n\n" + table(_COLUMNS, lines),
        _refusals(rows),
        _METHOD.format(models=len(models), calls=len(rows)),
    ]
    return "\n".join(part for part in parts if part)


def _commits(rows: list[Row]) -> str:
    """At which commit what was counted, and which architectures were not."""
    where = ", ".join(_distinct(row["commit"] for row in rows))
    other = Counter(row["inductor_commit"] for row in rows if row["inductor_commit"] != row["commit"])
    text = f"All figures of fxopt were counted at commit {where}."
    if other:
        earlier = ", ".join(f"{number} at {name}" for name, number in other.most_common())
        text += (
            f" Inductor's, which do not depend on fxopt, were counted there for {len(rows) - other.total()}"
            f" of {len(rows)} calls, and in earlier runs for the others: {earlier}."
        )
    missing = [name for name in ENTRIES if name not in {row["model"] for row in rows}]
    if missing:
        named = ", ".join(f"{name} ({ENTRIES[name].kind})" for name in missing)
        text += (
            f"\n\n**Not counted at this commit, and in no figure of this page: {named}.** Architectures are"
            " counted in a fixed order, the common ones first: the shares below are of easier ones than those"
            " of all would be."
        )
    return text


def _distinct(names: Iterable[str]) -> list[str]:
    return list(dict.fromkeys(names))


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
        "formula known",
        "matched by Inductor",
    )
    fxopt, formula, inductor = lines[0][2:]
    counted = len(_distinct(row["model"] for row in rows))
    part = "" if counted == len(ENTRIES) else f"Of {counted} of {len(ENTRIES)} architectures only: "
    whole = (
        f"{part}**fxopt recovers {fxopt} of the attention sites**, and knows the formula of {formula}; "
        f"Inductor's patterns match {inductor}.\n\n"
    )
    return whole + table(names, lines)


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
    why = Counter(entry["reason"] for row in rows for entry in _lost(row))
    shown = [f"`{_NONE.sub('none', mask)}`" for mask, _ in masks.most_common(_MOST_MASKS)]
    if len(masks) > _MOST_MASKS:
        shown.append(f"and {len(masks) - _MOST_MASKS} more")
    return (name, rows[0]["class"], str(layers), *cells, "<br>".join(shown), "<br>".join(why))


def _cell(rows: list[Row], form: str, key: str) -> str:
    chosen = [row for row in rows if row["attention"] == form]
    return f"{_sum(chosen, key)} of {_sum(chosen, 'sites')}" if _sum(chosen, "sites") else "-"


def _refusals(rows: list[Row]) -> str:
    lost: Counter[tuple[str, str, str]] = Counter()
    for row in rows:
        for entry in _lost(row):
            lost[entry["reason"], row["model"], entry["line"]] += entry["sites"]
    lines = [(str(number), name, line, reason) for (reason, name, line), number in lost.most_common()]
    if not lines:
        return ""
    return "## Refused\n\n" + table(("sites", "architecture", "the model's line", "reason"), lines)


def _lost(row: Row) -> list[dict[str, Any]]:
    """The sites that were not recovered: refused ones, and those of a graph in which fxopt failed."""
    refused: list[dict[str, Any]] = row["refused"]
    failed = row["sites"] - row["recovered"] - sum(entry["sites"] for entry in refused)
    faults = [fault for fault in row["faults"] if not fault.startswith("Inductor: ")]
    lost = {"reason": f"failed: {'; '.join(faults)}", "line": "-", "sites": failed}
    return [*refused, lost] if failed else refused


_NONE = re.compile(r"^True\b")
_WHOLE = re.compile(r"\bc\d+\[(?:[^\[\]]*, )?q, k\]")


def _is_known(mask: str) -> bool:
    return not mask.startswith("tensor") and not _WHOLE.search(mask)


def _merge(counts: Iterable[dict[str, int]]) -> Counter[str]:
    merged: Counter[str] = Counter()
    for each in counts:
        merged.update(each)
    return merged


def _sum(rows: Iterable[Row], key: str) -> int:
    return sum(row[key] for row in rows)


def _share(part: int, whole: int) -> str:
    return f"{100 * part / whole:.1f} % ({part})" if whole else "-"
