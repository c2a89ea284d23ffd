"""The demo's picture: how long each backend takes, beside the others."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from fxopt.commands.demo_jobs import BACKENDS, Outcome

_COLOURS = {"eager": "#b8bec8", "inductor": "#5b8db8", "fxopt": "#e07b39"}


def draw(outcomes: Sequence[Outcome], out: Path, subtitle: str) -> Path:
    """Write a bar chart: time relative to TorchInductor, the milliseconds written beside each bar."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 1.6 + 1.15 * len(outcomes)), dpi=150, layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    height = 0.26
    longest = 0.0
    for position, outcome in enumerate(outcomes):
        for offset, backend in enumerate(BACKENDS):
            seconds = outcome.seconds[backend]
            length = seconds / outcome.seconds["inductor"]
            longest = max(longest, length)
            place = position + (offset - 1) * height
            label = backend if position == 0 else None
            axes.barh(place, length, height * 0.9, color=_COLOURS[backend], label=label)
            axes.text(length + 0.012 * longest, place, _milliseconds(seconds), va="center", fontsize=8.5)
    axes.axvline(1.0, color="#5b8db8", linewidth=0.8, linestyle=":", zorder=0)
    names = [f"{outcome.name}\n{outcome.sites} sites rewritten" for outcome in outcomes]
    axes.set_yticks(range(len(outcomes)), names, fontsize=9.5)
    axes.invert_yaxis()
    axes.set_xlim(0, longest * 1.14)
    axes.set_xlabel("time relative to TorchInductor, shorter is faster", fontsize=9)
    axes.spines[["top", "right", "left"]].set_visible(False)
    axes.tick_params(left=False)
    figure.suptitle("fxopt demo: the same job by three backends", fontsize=13, x=0.01, ha="left")
    axes.set_title(subtitle, fontsize=8.5, color="#555555", loc="left")
    figure.legend(loc="outside lower center", ncols=3, frameon=False, fontsize=9)
    out.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(out, facecolor="white")
    return out


def _milliseconds(seconds: float) -> str:
    value = 1e3 * seconds
    return f"{value:.1f} ms" if value < 100 else f"{value:.0f} ms"
