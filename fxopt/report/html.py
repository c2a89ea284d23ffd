"""The report as one self-contained page: no network, no other file, readable without scripts."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from html import escape
from typing import TYPE_CHECKING

from fxopt.ir.contract import Status
from fxopt.report.html_style import SCRIPT, STYLE
from fxopt.report.linears import grouped, linears_of
from fxopt.report.record import GraphRecord
from fxopt.report.summary import SiteGroup, group_sites, human_bytes, saved, sites_by_pass
from fxopt.report.text import bytes_text, kind, launches_text, name_of, own_seconds, places, short, troubles

if TYPE_CHECKING:
    from fxopt.report.report import Report


def page(report: Report) -> str:
    """The whole page."""
    title = escape(f"fxopt report: {report.subject}")
    body = [
        f"<header><h1>{title}</h1><p>{escape(report.summary)}</p>{_cards(report)}</header>",
        _passes(report.graphs),
        _linears(report.graphs),
        _sites(report.graphs),
        _graphs(report.graphs),
        _breaks(report),
        _recompiles(report),
        _footer(report),
    ]
    return (
        f'<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        f'<meta name="viewport" content="width=device-width, initial-scale=1">\n<title>{title}</title>\n'
        f"<style>{STYLE}</style>\n</head>\n<body>\n<main>\n"
        + "\n".join(part for part in body if part)
        + f"\n</main>\n<script>{SCRIPT}</script>\n</body>\n</html>\n"
    )


def _cards(report: Report) -> str:
    cost = saved(report.graphs)
    applied, sites = (
        sum(column) for column in zip((0, 0), *sites_by_pass(report.graphs).values(), strict=True)
    )
    own = sum(map(own_seconds, report.graphs))
    cards = [
        ("graphs", str(len(report.graphs)), ""),
        ("graph breaks", _count(report.breaks), "bad" if report.breaks else ""),
        ("recompiles", _count(report.recompiles), "bad" if report.recompiles else ""),
        ("sites rewritten", f"{applied} of {sites}", ""),
        ("memory traffic saved", human_bytes(cost.bytes), ""),
        ("launches saved", str(cost.launches), ""),
        ("spent in fxopt", f"{own:.2f} s", ""),
        ("spent in the host", f"{sum(r.seconds.get('host', 0.0) for r in report.graphs):.2f} s", ""),
    ]
    return '<div class="cards">' + "".join(map(_card, cards)) + "</div>"


def _card(card: tuple[str, str, str]) -> str:
    label, value, style = card
    return f'<div class="card {style}"><b>{escape(value)}</b><span>{escape(label)}</span></div>'


def _count(found: Sequence[object] | None) -> str:
    return "not watched" if found is None else str(len(found))


def _passes(graphs: Sequence[GraphRecord]) -> str:
    counts = sites_by_pass(graphs)
    if not counts:
        return ""
    rows = [
        f"<tr><td>{escape(name)}</td><td class=num>{applied} of {sites}</td>"
        f'<td class=wide><div class="bar"><i style="width:{100 * applied / sites:.1f}%"></i></div></td></tr>'
        for name, (applied, sites) in counts.items()
    ]
    return f"<section><h2>Passes</h2><table><tbody>{''.join(rows)}</tbody></table></section>"


def _linears(graphs: Sequence[GraphRecord]) -> str:
    notes = linears_of(graphs)
    if not notes:
        return ""
    rows = [
        f"<tr><td class=why>{escape(outcome)}</td><td class=num>{count}</td>"
        f"<td class=num>{_arrow(human_bytes(before, after))}</td><td class=num>{escape(decibels)}</td></tr>"
        for outcome, count, before, after, decibels in grouped(notes)
    ]
    head = _head("weights", "layers", "bytes", "dB")
    each = f"<details><summary>{escape(notes.summary)}</summary><pre>{escape(str(notes))}</pre></details>"
    return (
        f"<section><h2>Linear layers</h2><table>{head}<tbody>{''.join(rows)}</tbody></table>{each}</section>"
    )


def _sites(graphs: Sequence[GraphRecord]) -> str:
    groups = group_sites(graphs)
    if not groups:
        return ""
    order = sorted(groups, key=lambda group: group.status is Status.MISS)
    head = _head("pass", "outcome", "where", "why", "provider", "bytes", "launches")
    return (
        "<section><h2>Sites</h2>"
        '<input id="filter" type="search" placeholder="filter: attention, illegal, modeling_llama.py" '
        'aria-label="filter the sites">'
        f'<table id="sites">{head}<tbody>{"".join(map(_site, order))}</tbody></table>'
        "<p class=note>Bytes and launches are predicted, each op taken alone, and summed over a row; "
        "what the host fuses on top is not counted.</p></section>"
    )


def _site(group: SiteGroup) -> str:
    anchors = "".join(
        f"<li><code>{escape(site.evidence.anchor)}</code> {_where(site.evidence.location)}"
        f"{_detail(site.evidence.detail)}</li>"
        for site in group.sites
    )
    return (
        f"<tr><td>{escape(group.rewrite)}</td>"
        f'<td><span class="tag {group.status.value}">{group.count} {group.status.value}</span></td>'
        f"<td><details><summary>{escape(places(group))}</summary><ul>{anchors}</ul></details></td>"
        f"<td class=why>{escape(group.reason)}</td><td>{escape(group.provider)}</td>"
        f"<td class=num>{_arrow(bytes_text(group.before, group.after))}</td>"
        f"<td class=num>{_arrow(launches_text(group.before, group.after))}</td></tr>"
    )


def _arrow(text: str) -> str:
    return escape(text.replace("->", "\N{RIGHTWARDS ARROW}"))


def _where(location: str) -> str:
    return escape(short(location, folder=True))


def _detail(text: str) -> str:
    return f"<br><code>{escape(text)}</code>" if text else ""


def _graphs(graphs: Sequence[GraphRecord]) -> str:
    if not graphs:
        return ""
    stages = list(dict.fromkeys(stage for record in graphs for stage in record.seconds))
    head = _head(
        "graph", "first line", "nodes", "inputs", "rewrites", "kind", "host", *(f"{s} s" for s in stages)
    )
    rows = "".join(_graph(record, stages) for record in graphs)
    return f"<section><h2>Graphs</h2><table>{head}<tbody>{rows}</tbody></table></section>"


def _graph(record: GraphRecord, stages: Iterable[str]) -> str:
    spent = [f"{record.seconds[stage]:.3f}" if stage in record.seconds else "" for stage in stages]
    numbers = [str(record.nodes), str(record.inputs), str(record.count(Status.APPLIED))]
    problems = "".join(f"<div class=trouble>{escape(text)}</div>" for text in troubles(record))
    return (
        f"<tr><td>{escape(name_of(record))}</td><td>{_where(record.location)}{problems}</td>"
        + "".join(f"<td class=num>{number}</td>" for number in numbers)
        + f"<td>{escape(kind(record))}</td><td>{escape(record.host)}</td>"
        + "".join(f"<td class=num>{number}</td>" for number in spent)
        + "</tr>"
    )


def _breaks(report: Report) -> str:
    rows = "".join(
        f"<tr><td>{_where(one.location)}</td><td class=num>{one.count}</td>"
        f"<td class=why><details><summary>{escape(one.reason)}</summary>"
        f"<pre>{escape(one.detail)}</pre></details></td></tr>"
        for one in report.breaks or ()
    )
    return _section("Graph breaks", ("where", "times", "reason"), rows)


def _recompiles(report: Report) -> str:
    rows = "".join(
        f"<tr><td>{escape(one.compile_id)}</td><td>{escape(one.function)}</td>"
        f"<td>{_where(one.location)}</td>"
        f"<td class=why>{'<br>'.join(map(escape, one.reasons)) or 'not reported by Dynamo'}</td></tr>"
        for one in report.recompiles or ()
    )
    return _section("Recompiles", ("compilation", "function", "where", "guards that failed"), rows)


def _section(title: str, columns: Iterable[str], rows: str) -> str:
    if not rows:
        return ""
    return f"<section><h2>{title}</h2><table>{_head(*columns)}<tbody>{rows}</tbody></table></section>"


def _head(*columns: str) -> str:
    return "<thead><tr>" + "".join(f"<th>{escape(name)}</th>" for name in columns) + "</tr></thead>"


def _footer(report: Report) -> str:
    versions = report.to_dict()["versions"]
    made_with = ", ".join(f"{name} {version}" for name, version in versions.items())
    data = escape(report.to_json())
    return (
        f"<footer><p>{escape(made_with)}</p><details><summary>All of it as JSON</summary>"
        f"<pre>{data}</pre></details></footer>"
    )
