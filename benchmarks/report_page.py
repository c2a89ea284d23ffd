"""The page docs/benchmarks.md from the runs: a function of committed files alone."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from benchmarks.report_runs import Run
from benchmarks.tables import table
from fxopt.measure.noise import FASTER, LEAST, NOISY, SLOWER, TOO_NOISY, name_of, verdict
from fxopt.measure.results import Row

MARKS = {SLOWER: "🔴", FASTER: "🟢", NOISY: "🟡", "equal": ""}
Reasons = dict[str, dict[str, str]]

_HEAD = f"""# Benchmarks

Written by `python -m benchmarks.report` from the files of
[benchmarks/results](../benchmarks/results). Every line of a table is a line of a file, which has the
hardware, the versions, the commit and the command at its top.

A ratio is Inductor's time by fxopt's, of blocks that took turns in one process: more than 1 means that fxopt
is faster. The interval holds the median 19 times of 20. The noise is Inductor's time by its own. A row is
{MARKS[FASTER]} faster or {MARKS[SLOWER]} slower when the difference is larger than the noise of that row, and
than {LEAST:.0%}; it is {MARKS[NOISY]} too noisy to tell when the noise is above {TOO_NOISY:.0%}. What is
slower has its reason.
"""


def render(found: Sequence[Run], reasons: Reasons, past: Sequence[Row], images: Sequence[str]) -> str:
    """The whole page.

    Args:
        images: names of the pictures that there are, `<run>` or `<kind>`.
    """
    parts = [_HEAD, _overview(found), _pictures(images)]
    parts += [_section(run, reasons.get(run.name, {}), images) for run in found]
    return "\n".join([*parts, _history(past)])


def _overview(found: Sequence[Run]) -> str:
    head = ("run", "rows", "geometric mean", "slowest row", "faster", "slower", "too noisy", "on", "commit")
    rows = []
    for run in found:
        summary = run.summary()
        rows.append(
            [
                f"[{run.name}](#{run.name})",
                str(summary["rows"]),
                f"{summary['geomean']:.3f}" + ("" if summary["conclusive"] else " (too noisy)"),
                f"{summary['min']:.3f} ({summary['min_row']})",
                str(summary["faster"]),
                str(len(summary[SLOWER])),
                str(len(summary["too_noisy"])),
                run.hardware,
                str(run.machine["commit"]),
            ]
        )
    return "\n".join(["## All runs", "", table(head, rows)])


_KINDS = {
    "length": "Speed by length",
    "roofline": "Regions under the roofline",
    "memory": "Memory",
    "quantized": "Quantized weights",
    "depth": "The time of compilation by depth",
}


def _pictures(images: Sequence[str]) -> str:
    lines = [f"## {title}\n\n{_image(kind)}\n" for kind, title in _KINDS.items() if kind in images]
    return "\n".join(lines)


def _image(name: str) -> str:
    return f"![{name}](images/benchmarks/{name}.png)"


Column = tuple[str, Callable[[Row], str]]
_FIGURES: tuple[Column, ...] = (
    ("over eager", lambda row: _median(row.get("over", {}).get("eager"))),
    ("over max-autotune", lambda row: _median(row.get("over", {}).get("inductor max-autotune"))),
    ("over SDPA", lambda row: _median(row.get("over", {}).get("sdpa"))),
    ("over FlexAttention", lambda row: _median(row.get("over", {}).get("flex attention"))),
    ("over Liger", lambda row: _median(row.get("over", {}).get("liger"))),
    ("over freezing", lambda row: _median(row.get("over", {}).get("inductor freezing"))),
    ("over torchao", lambda row: _median(row.get("over", {}).get("torchao"))),
    ("over bitsandbytes", lambda row: _median(row.get("over", {}).get("bitsandbytes"))),
    ("tokens/s", lambda row: _pair(row.get("tokens_per_second"), ".4g")),
    ("of the floor", lambda row: _share(row.get("floor"))),
    ("of a copy", lambda row: f"{row['share']:.0%}" if row.get("share") and "bytes" in row else ""),
    ("first call, s", lambda row: _pair(row.get("first_call"), ".1f")),
    ("warm, s", lambda row: _pair(row.get("warm"), ".1f")),
    ("weights, MB", lambda row: _pair(row.get("weight_bytes"), ".3g", 2**20)),
    ("dB", lambda row: f"{row['decibels']['fxopt']:.0f}" if "decibels" in row else ""),
    ("peak, MB", lambda row: _pair(row.get("peak_bytes"), ".3g", 2**20)),
    ("graphs/breaks/again", lambda row: _counts(row.get("dynamo", {}).get("fxopt", {}))),
    ("right", lambda row: _right(row.get("dashboard", row.get("accepted")))),
)


def _section(run: Run, reasons: dict[str, str], images: Sequence[str]) -> str:
    figures = [(name, cell) for name, cell in _FIGURES if any(cell(row) for row in run.good)]
    head = ["row", "ratio", "interval", "noise", *(name for name, _ in figures), "line"]
    rows = []
    for place, row in enumerate(run.rows):
        if "ratio" in row:
            cells = [run.title(row), *_ratio(row), *(cell(row) for _, cell in figures)]
        else:
            cells = [run.title(row), f"🔴 {row.get('error', '')[:120]}"] + [""] * (len(head) - 3)
        rows.append([*cells, _link(run, place)])
    return "\n".join(
        [f"## {run.name}", "", *_told(run), *_picture(run, images), table(head, rows), *_why(run, reasons)]
    )


def _told(run: Run) -> list[str]:
    machine = run.machine
    versions = ", ".join(f"{name} {machine[name]}" for name in ("torch", "transformers") if machine.get(name))
    command = f"`{machine['command']}`" if machine.get("command") else "no command"
    return [f"{command}: {run.hardware}, {versions}, commit {machine['commit']}, {machine['time'][:10]}.", ""]


def _picture(run: Run, images: Sequence[str]) -> list[str]:
    return [_image(run.name), ""] if run.name in images else []


def _why(run: Run, reasons: dict[str, str]) -> list[str]:
    """What is slower, with its reason."""
    names = [name_of(row, run.keys) for row in run.good if verdict(row) == SLOWER]
    if not names:
        return []
    return [
        "Slower than Inductor:",
        "",
        *(f"- {name}: {reasons.get(name, 'no reason')}" for name in names),
        "",
    ]


def _ratio(row: Row) -> list[str]:
    ratio, mark = row["ratio"], MARKS[verdict(row)]
    interval = f"{ratio['low']:.2f} to {ratio['high']:.2f}"
    return [f"{mark} {ratio['median']:.3f}".strip(), interval, f"{row['noise']['median']:.3f}"]


def _link(run: Run, place: int) -> str:
    anchor, name = (f"#L{run.lines[place]}", str(run.lines[place])) if run.lines else ("", "file")
    return f"[{name}](../benchmarks/results/{run.file}{anchor})"


def _history(past: Sequence[Row]) -> str:
    head = ("run", "date", "commit", "rows", "geometric mean", "slowest", "slower", "noise", "on")
    rows = [
        [
            line["run"], line["time"][:10], str(line["commit"]), str(line["rows"]), f"{line['geomean']:.3f}",
            f"{line['min']:.3f}", str(line["slower"]),
            f"{line['noise_min']:.2f} to {line['noise_max']:.2f}", line["hardware"],
        ]
        for line in past
    ]  # fmt: skip
    told = "Every run that was reported ([history.jsonl](../benchmarks/results/history.jsonl))."
    return "\n".join(["## History", "", told, "", table(head, rows)])


def _counts(counts: Row) -> str:
    return "/".join(map(str, counts.values()))


def _right(passed: bool | None) -> str:
    return {None: "", True: "yes", False: "**no**"}[passed]


def _median(ratio: Any) -> str:
    return f"{ratio['median']:.2f}" if ratio else ""


def _pair(figures: Any, form: str, unit: float = 1.0) -> str:
    """Inductor's and fxopt's."""
    if not isinstance(figures, dict) or not {"inductor", "fxopt"} <= figures.keys():
        return ""
    return " → ".join(f"{figures[name] / unit:{form}}" for name in ("inductor", "fxopt"))


def _share(floor: Any) -> str:
    return f"{floor['fxopt']:.0%}" if floor else ""
