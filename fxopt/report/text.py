"""The report for a terminal, with rich; without colours it is the plain text of ``print(report)``."""

from __future__ import annotations

import io
import shutil
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from rich import box
from rich.console import Console, RenderableType
from rich.table import Table
from rich.text import Text

from fxopt.ir.contract import Cost, Status
from fxopt.report.linears import grouped, linears_of
from fxopt.report.record import GraphRecord
from fxopt.report.summary import SiteGroup, group_sites, human_bytes, miss_counts, plural

if TYPE_CHECKING:
    from fxopt.report.report import Report

STYLES = {
    Status.APPLIED: "green",
    Status.ILLEGAL: "yellow",
    Status.UNPROFITABLE: "yellow",
    Status.ERROR: "bold red",
    Status.MISS: "dim",
    Status.DISABLED: "dim",
    Status.OUT_OF_FUEL: "dim",
}
_MOST_GRAPHS = 12
_WIDE = 110  # characters in a line, from which on the costs have room


def plain(report: Report, verbose: bool) -> str:
    """The report as text, as wide as the terminal."""
    width = max(shutil.get_terminal_size(fallback=(120, 24)).columns, 80)
    out = io.StringIO()
    console = Console(file=out, width=width, color_system=None, force_terminal=False, highlight=False)
    console.print(*parts(report, verbose, width), sep="\n")
    return "\n".join(line.rstrip() for line in out.getvalue().splitlines())


def parts(report: Report, verbose: bool, width: int) -> Iterator[RenderableType]:
    """What is printed, from top to bottom."""
    calls = f", {plural(report.calls, 'call')}" if report.calls else ""
    yield Text(f"fxopt report: {report.subject}{calls}", style="bold")
    yield Text(report.summary)
    if report.graphs:
        yield from _graphs(report.graphs, verbose, width)
    yield from _linears(report.graphs, verbose)
    yield from _sites(report.graphs, verbose, width)
    yield from _breaks(report, verbose)
    yield from _recompiles(report)


def short(location: str, *, folder: bool = False) -> str:
    """``file.py:12`` (with `folder` the package's path too); a path from here for what lies below."""
    path, _, line = location.rpartition(":")
    if not path:
        return location
    installed = _in_packages(path)
    if installed is None:
        try:
            return f"{Path(path).relative_to(Path.cwd())}:{line}"
        except ValueError:
            return f"{path if folder else Path(path).name}:{line}"
    return f"{installed if folder else Path(path).name}:{line}"


def _in_packages(path: str) -> str | None:
    """The path below site-packages, or None."""
    for folder in sys.path:
        if folder.endswith("-packages") and path.startswith(f"{folder}/"):
            return path.removeprefix(f"{folder}/")
    return None


def bytes_text(before: Cost | None, after: Cost | None) -> str:
    """``35.8 -> 10.2 kB``; empty when nothing moves."""
    if before is None or after is None or not (before.bytes or after.bytes):
        return ""
    return human_bytes(before.bytes, after.bytes)


def launches_text(before: Cost | None, after: Cost | None) -> str:
    """``6 -> 1``; empty when nothing is launched."""
    if before is None or after is None or not (before.launches or after.launches):
        return ""
    return f"{before.launches} -> {after.launches}"


def places(group: SiteGroup) -> str:
    """Where a group is, in one line."""
    where, others = short(group.locations[0]), len(group.locations) - 1
    return where if others == 0 else f"{where} (+{plural(others, 'line')})"


def troubles(record: GraphRecord) -> list[str]:
    """Why a graph, or a part of the way, was not fxopt's."""
    words = [f"left to the host, {stage} refused: {reason}" for stage, reason in record.refusals]
    words += [f"{stage} failed: {message}" for stage, message in record.failures]
    return words + ([f"ended by {record.error}"] if record.error else [])


def _table(title: str, *columns: str, right: Iterable[str] = (), wrap: Iterable[str] = ()) -> Table:
    table = Table(title=title, title_justify="left", title_style="bold", box=box.SIMPLE_HEAD, pad_edge=False)
    for name in columns:
        justify: Literal["left", "right"] = "right" if name in right else "left"
        table.add_column(name, justify=justify, overflow="fold", no_wrap=name not in wrap)
    return table


def _graphs(graphs: Iterable[GraphRecord], verbose: bool, width: int) -> Iterator[RenderableType]:
    records = list(graphs)
    shown = records if verbose else records[:_MOST_GRAPHS]
    counts = ("nodes", "inputs", "rewrites") if width >= _WIDE else ("rewrites",)
    columns = ("graph", "first line", *counts, "kind", "host", "fxopt s", "host s")
    table = _table(
        "Graphs", *columns, right=(*counts, "fxopt s", "host s"), wrap=("graph", "first line", "kind")
    )
    for record in shown:
        numbers = {"nodes": record.nodes, "inputs": record.inputs, "rewrites": record.count(Status.APPLIED)}
        table.add_row(
            Text(name_of(record)),
            Text(short(record.location, folder=verbose)),
            *(str(numbers[name]) for name in counts),
            kind(record),
            record.host,
            f"{own_seconds(record):.2f}",
            f"{record.seconds.get('host', 0.0):.2f}",
        )
    yield table
    if len(shown) < len(records):
        yield Text(f"and {len(records) - len(shown)} more", style="dim")
    for record in records:
        for trouble in troubles(record):
            yield Text(f"graph {name_of(record)}: {trouble}", style="yellow")


def name_of(record: GraphRecord) -> str:
    """Dynamo's name of a graph, or its number."""
    return record.compile_id or str(record.index)


def own_seconds(record: GraphRecord) -> float:
    """What fxopt itself took, without the host."""
    return sum(spent for stage, spent in record.seconds.items() if stage != "host")


def kind(record: GraphRecord) -> str:
    """What is special about a graph, in few words."""
    words = [
        "" if record.normalized else "not normalized",
        "dynamic" if record.dynamic else "",
        "with backward" if record.trains else "",
    ]
    return ", ".join(word for word in words if word)


def _sites(graphs: Iterable[GraphRecord], verbose: bool, width: int) -> Iterator[RenderableType]:
    records = list(graphs)
    groups = group_sites(records)
    shown = [group for group in groups if verbose or group.status is not Status.MISS]
    if shown:
        costs = ("bytes", "launches") if width >= _WIDE else ()
        columns = ("pass", "outcome", "provider", *costs, "where and why")
        table = _table("Sites", *columns, wrap=("where and why",))
        for group in shown:
            for row in _verbose_rows(group) if verbose else [_row(group)]:
                _add_site(table, group, row, bool(costs))
        yield table
    if not verbose:
        yield from _misses(records)


def _linears(graphs: Iterable[GraphRecord], verbose: bool) -> Iterator[RenderableType]:
    notes = linears_of(graphs)
    if not notes:
        return
    table = _table(notes.summary, "weights", "layers", "bytes", "dB", right=("layers",), wrap=("weights",))
    for outcome, count, before, after, decibels in grouped(notes):
        table.add_row(Text(outcome), str(count), human_bytes(before, after), decibels)
    yield table
    if verbose:
        yield Text(str(notes), style="dim")


_Row = tuple[str, str, Cost | None, Cost | None]


def _row(group: SiteGroup) -> _Row:
    return f"{group.count} {group.status.value}", places(group), group.before, group.after


def _verbose_rows(group: SiteGroup) -> list[_Row]:
    return [
        (e.status.value, f"{short(e.location, folder=True)} {e.anchor}", e.before, e.after)
        for e in (site.evidence for site in group.sites)
    ]


def _add_site(table: Table, group: SiteGroup, row: _Row, costs: bool) -> None:
    outcome, where, before, after = row
    cells = [Text(group.rewrite), Text(outcome, style=STYLES[group.status]), Text(group.provider)]
    if costs:
        cells += [Text(bytes_text(before, after)), Text(launches_text(before, after))]
    table.add_row(*cells, Text.assemble(where, "\n", (group.reason, "dim")))


def _misses(records: Iterable[GraphRecord]) -> Iterator[RenderableType]:
    misses = miss_counts(records)
    if misses:
        yield Text("Looked at, and no instance (print(report.verbose()) lists them):", style="dim")
    for name, reasons in misses.items():
        reason, count = reasons.most_common(1)[0]
        others = f", and {plural(len(reasons) - 1, 'other reason')}" if len(reasons) > 1 else ""
        yield Text(f"  {name} {sum(reasons.values())}: {count} x {reason}{others}", style="dim")


def _breaks(report: Report, verbose: bool) -> Iterator[RenderableType]:
    if not report.breaks:
        return
    table = _table("Graph breaks", "where", "x", "reason", right=("x",), wrap=("reason",))
    for one in report.breaks:
        where = short(one.location, folder=verbose)
        table.add_row(Text(where), str(one.count), Text(one.detail if verbose else one.reason))
    yield table


def _recompiles(report: Report) -> Iterator[RenderableType]:
    if not report.recompiles:
        return
    table = _table(
        "Recompiles", "compilation", "function", "guards that failed", wrap=("guards that failed",)
    )
    for one in report.recompiles:
        reasons = "\n".join(one.reasons) or "not reported by Dynamo"
        table.add_row(Text(one.compile_id), Text(f"{one.function} ({short(one.location)})"), Text(reasons))
    yield table
