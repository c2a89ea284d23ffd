"""The pictures of the report, from the runs."""

from __future__ import annotations

import importlib.util
from collections import defaultdict
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from benchmarks.report_runs import Run
from fxopt.measure.noise import EQUAL, FASTER, NOISY, SLOWER, name_of, verdict
from fxopt.measure.results import Row

COLOURS = {SLOWER: "#c0392b", FASTER: "#2e8b57", EQUAL: "#8fa3b0", NOISY: "#d4b106"}
# More bars than these are drawn in columns side by side.
_BARS = 34
# The names of more lines than these stand below a panel.
_LEGEND = 10
# Where a scale of ratios has its numbers.
_FEW = (0.1, 0.25, 0.5, 1, 2, 3, 5, 10, 20, 50, 100)
_MANY = (0.5, 0.6, 0.7, 0.8, 0.9, 1, 1.1, 1.25, 1.5, 2, 2.5)


def draw_all(found: Sequence[Run], past: Sequence[Row], folder: Path) -> list[str]:
    """Draw what there are figures for; the names of the pictures. Without matplotlib there are none."""
    if importlib.util.find_spec("matplotlib") is None:
        return []
    drawn = {run.name: bars(run) for run in found}
    drawn |= {"length": by_length(found), "roofline": roofline(found), "memory": memory(found)}
    drawn |= {"quantized": quantized(found)}
    drawn |= {"depth": by_depth(found), "history": over_time(past)}
    kept = {name: figure for name, figure in drawn.items() if figure is not None}
    folder.mkdir(parents=True, exist_ok=True)
    for name, figure in kept.items():
        figure.savefig(folder / f"{name}.png", dpi=90, metadata={"Software": None})
    for old in folder.glob("*.png"):
        if old.stem not in kept:
            old.unlink()
    return sorted(kept)


def bars(run: Run) -> Any:
    """The ratio of every row, with its interval; a scale on which twice as fast is as far as half."""
    rows = sorted(run.good, key=lambda row: -row["ratio"]["median"])
    columns = -(-len(rows) // _BARS)
    size = -(-len(rows) // columns)
    figure, panels = _panels(columns, 4.2 + 1.6 * (columns == 1), 0.24 * size + 1.3)
    for place, axes in enumerate(panels):
        part = rows[place * size : (place + 1) * size]
        values = [row["ratio"]["median"] for row in part]
        ends = [[row["ratio"]["median"] - row["ratio"]["low"] for row in part],
                [row["ratio"]["high"] - row["ratio"]["median"] for row in part]]  # fmt: skip
        colours = [COLOURS[verdict(row)] for row in part]
        widths = [value - 1 for value in values]
        axes.barh(range(len(part)), widths, left=1.0, color=colours, xerr=ends, error_kw={"lw": 0.7})
        axes.set_yticks(range(len(part)), [run.title(row) for row in part], fontsize=7)
        axes.set_ylim(size - 0.3, -0.7)
        _ratio_axis(axes.xaxis, axes, "x", [row["ratio"] for row in rows])
        axes.axvline(1.0, color="black", linewidth=0.8)
    figure.suptitle(f"{run.name}: times faster than Inductor ({run.hardware})", fontsize=10)
    return figure


def by_length(found: Sequence[Run]) -> Any:
    """The ratio over the length of the sequence, a line for all else that names a row."""
    # The tiny size has two lengths that are both of no interest.
    long = [run for run in found if "length" in run.keys and run.plan.get("size") != "tiny"]
    kept = [(run, _lines(run, "length")) for run in long]
    kept = [(run, lines) for run, lines in kept if any(len(line) > 1 for line in lines.values())]
    if not kept:
        return None
    figure, panels = _panels(len(kept), 4.6, 4.6)
    for axes, (run, lines) in zip(panels, kept, strict=True):
        for name, line in sorted(lines.items()):
            places, rows = zip(*sorted(line, key=lambda pair: pair[0]), strict=True)
            axes.plot(places, [row["ratio"]["median"] for row in rows], marker="o", markersize=3, label=name)
        axes.set_xscale("log", base=2)
        axes.set_xticks(sorted({row["length"] for row in run.good}))
        axes.xaxis.set_major_formatter("{x:.0f}")
        axes.xaxis.set_minor_formatter("")
        _ratio_axis(axes.yaxis, axes, "y", [row["ratio"] for row in run.good])
        axes.axhline(1.0, color="black", linewidth=0.8, linestyle=":")
        axes.set_xlabel("tokens")
        axes.set_title(run.name, fontsize=9)
        below = {"loc": "upper center", "bbox_to_anchor": (0.5, -0.14), "ncols": 2}
        if any(lines):
            axes.legend(fontsize=6, frameon=False, **(below if len(lines) > _LEGEND else {}))
    panels[0].set_ylabel("times faster than Inductor")
    return figure


def roofline(found: Sequence[Run]) -> Any:
    """Operations a second over operations for a byte, under the speed of a copy of the same machine."""
    kept = [run for run in found if any(_under_roof(row) for row in run.good)]
    if not kept:
        return None
    figure, panels = _panels(len(kept), 5.2, 4.4)
    for axes, run in zip(panels, kept, strict=True):
        rows = [row for row in run.good if _under_roof(row)]
        speeds = [row["copy_bytes_per_second"] for row in rows]
        dense = [row["flops"] / row["bytes"] for row in rows]
        ends = [0.7 * min(dense), 1.4 * max(dense)]
        axes.plot(ends, [max(speeds) * x for x in ends], color="black", linewidth=1, label="a copy")
        for name, marker, colour in (("inductor", "x", "#8fa3b0"), ("fxopt", "o", "#1f5fa8")):
            rates = [row["flops"] / row["seconds"][name] for row in rows]
            axes.scatter(dense, rates, s=18, marker=marker, color=colour, label=name, zorder=3)
        for row, x in zip(rows, dense, strict=True):
            told = (x, row["flops"] / row["seconds"]["fxopt"])
            axes.annotate(run.title(row), told, fontsize=5, xytext=(4, -3), textcoords="offset points")
        axes.set_xscale("log")
        axes.set_yscale("log")
        axes.set_xlabel("operations for a byte")
        axes.set_ylabel("operations a second")
        axes.set_title(f"{run.name} ({run.hardware})", fontsize=9)
        axes.legend(fontsize=7, frameon=False)
    return figure


def memory(found: Sequence[Run]) -> Any:
    """fxopt's peak as a part of Inductor's, over Inductor's."""
    points = {run.name: _peaks(run) for run in found}
    points = {name: each for name, each in points.items() if each}
    if not points:
        return None
    figure, (axes,) = _panels(1, 7.0, 4.2)
    for name, each in points.items():
        axes.scatter([x / 2**20 for x, _ in each], [y for _, y in each], s=16, alpha=0.8, label=name)
    axes.axhline(1.0, color="black", linewidth=0.8, linestyle=":")
    axes.set_xscale("log")
    axes.set_ylim(bottom=0.0)
    axes.set_xlabel("Inductor's peak of a step, MB")
    axes.set_ylabel("fxopt's peak / Inductor's")
    axes.legend(fontsize=7, frameon=False)
    axes.spines[["top", "right"]].set_visible(False)
    return figure


# Who is drawn of the quantized weights, and how.
_WHO = {
    "inductor": ("x", "#8fa3b0"),
    "torchao": ("^", "#c77d1e"),
    "bitsandbytes": ("s", "#7a4fa3"),
    "fxopt": ("o", "#1f5fa8"),
}


def quantized(found: Sequence[Run]) -> Any:
    """How near each comes to the time in which the memory hands over its weights, and their size."""
    kept = [(run, [row for row in run.good if _is_of_quantized_weights(row)]) for run in found]
    kept = [(run, rows) for run, rows in kept if rows]
    if not kept:
        return None
    height = 0.2 * max(len(rows) for _, rows in kept) + 1.2
    figure, panels = _panels(2 * len(kept), 5.0, height, columns=2)
    for place, (run, rows) in enumerate(kept):
        floor, size = panels[2 * place : 2 * place + 2]
        for name, (marker, colour) in _WHO.items():
            told = {"marker": marker, "color": colour, "label": name, "s": 18, "zorder": 3}
            has = [number for number, row in enumerate(rows) if name in row["floor"]]
            if not has:
                continue
            floor.scatter([100 * rows[number]["floor"][name] for number in has], has, **told)
            parts = [rows[number]["weight_bytes"] for number in has]
            size.scatter([each[name] / each["inductor"] for each in parts], has, **told)
        for axes in (floor, size):
            axes.set_yticks(range(len(rows)), [run.title(row) for row in rows], fontsize=6)
            axes.set_ylim(len(rows) - 0.4, -0.6)
            axes.set_xlim(left=0.0)
            axes.grid(axis="y", linewidth=0.3)
        size.set_yticklabels([])
        floor.set_xlabel("% of the speed of a copy of what is read", fontsize=8)
        size.set_xlabel("size of the weights / of the dense ones", fontsize=8)
        floor.set_title(f"{run.name} ({run.hardware})", fontsize=9)
        floor.legend(fontsize=6, frameon=False, ncols=4, loc="lower left", bbox_to_anchor=(-0.3, 1.06))
    return figure


def _is_of_quantized_weights(row: Row) -> bool:
    """There are dense rows in some runs, and rows that nobody can say a least time of."""
    size = row.get("weight_bytes")
    return "floor" in row and size is not None and size["fxopt"] < size["inductor"]


def by_depth(found: Sequence[Run]) -> Any:
    """Seconds until the first result over the number of layers, cold and warm."""
    kept = [run for run in found if "layers" in run.keys and all("warm" in row for row in run.good)]
    if not kept:
        return None
    figure, panels = _panels(len(kept), 5.4, 4.2)
    for axes, run in zip(panels, kept, strict=True):
        for number, (name, line) in enumerate(sorted(_lines(run, "layers").items())):
            places, rows = zip(*sorted(line, key=lambda pair: pair[0]), strict=True)
            for who, style in (("inductor", "--"), ("fxopt", "-")):
                told = {"color": f"C{number}", "linestyle": style, "marker": "o", "markersize": 3}
                axes.plot(places, [row[who] for row in rows], label=f"{name}, {who}", **told)
                warm = [row["warm"][who] for row in rows]
                axes.plot(places, warm, **told, alpha=0.4)
        axes.set_xlabel("layers")
        axes.set_ylabel("seconds (faint: warm caches)")
        axes.set_ylim(bottom=0.0)
        axes.set_title(f"{run.name} ({run.hardware})", fontsize=9)
        axes.legend(fontsize=6, frameon=False)
    return figure


def over_time(past: Sequence[Row]) -> Any:
    """The geometric mean of each run over its dates; those that were reported once are no line."""
    series: dict[str, list[Row]] = defaultdict(list)
    for line in past:
        series[line["run"]].append(line)
    lines = {name: each for name, each in series.items() if len(each) > 1}
    if not lines:
        return None
    figure, (axes,) = _panels(1, 7.0, 4.0)
    times = sorted({line["time"] for each in lines.values() for line in each})
    commits = {line["time"]: str(line["commit"])[:7] for each in lines.values() for line in each}
    for name, each in lines.items():
        axes.plot([times.index(line["time"]) for line in each], [line["geomean"] for line in each],
                  marker="o", markersize=3, label=name)  # fmt: skip
    axes.set_xticks(range(len(times)), [commits[time] for time in times], rotation=60, fontsize=6)
    axes.axhline(1.0, color="black", linewidth=0.8, linestyle=":")
    axes.set_ylabel("geometric mean, times faster than Inductor")
    axes.legend(fontsize=6, frameon=False)
    return figure


def _lines(run: Run, over: str) -> dict[str, list[tuple[int, Row]]]:
    """The rows that differ in one number only, by all else that names them."""
    keys = [key for key in run.keys if key != over and len({str(row.get(key)) for row in run.good}) > 1]
    found: dict[str, list[tuple[int, Row]]] = defaultdict(list)
    for row in run.good:
        found[name_of(row, keys)].append((row[over], row))
    return found


def _peaks(run: Run) -> list[tuple[float, float]]:
    both = [
        row["peak_bytes"] for row in run.good if {"inductor", "fxopt"} <= row.get("peak_bytes", {}).keys()
    ]
    return [(peaks["inductor"], peaks["fxopt"] / peaks["inductor"]) for peaks in both if peaks["inductor"]]


def _under_roof(row: Row) -> bool:
    return bool(row.get("flops") and row.get("bytes") and row.get("copy_bytes_per_second"))


def _panels(count: int, width: float, height: float, *, columns: int = 3) -> tuple[Any, list[Any]]:
    """A figure with so many panels of that size in inches, `columns` in a row at most."""
    from matplotlib.figure import Figure

    columns = min(count, columns)
    lines = -(-count // columns)
    figure = Figure(figsize=(width * columns, height * lines), layout="constrained")
    panels = list(figure.subplots(lines, columns, squeeze=False).flat)
    for each in panels:
        each.spines[["top", "right"]].set_visible(False)
    for each in panels[count:]:
        each.remove()
    return figure, panels[:count]


def _ratio_axis(axis: Any, axes: Any, which: str, ratios: Sequence[Row]) -> None:
    """A logarithmic scale with plain numbers, as wide as the medians need."""
    low = min(0.9, *(ratio["median"] for ratio in ratios)) * 0.95
    high = max(1.1, *(ratio["median"] for ratio in ratios)) * 1.08
    ticks = [tick for tick in (_FEW if high / low > 3 else _MANY) if low < tick < high]
    set_scale: Callable[[str], None] = getattr(axes, f"set_{which}scale")
    set_scale("log")
    getattr(axes, f"set_{which}lim")(low, high)
    axis.set_ticks(ticks, [f"{tick:g}" for tick in ticks])
    axis.set_minor_formatter("")
    axis.set_tick_params(labelsize=7)
