"""From records to what a reader wants to know: sites grouped, counted and summed; plain dicts for JSON."""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from fxopt.ir.contract import Cost, Evidence, Status
from fxopt.report.record import GraphRecord


@dataclass(frozen=True)
class Break:
    """A place where Dynamo breaks the graph: Dynamo's reason in one line and in full, how often it met it."""

    location: str
    reason: str
    detail: str = ""
    count: int = 1


@dataclass(frozen=True)
class Recompile:
    """A function that was compiled again: which compilation, and the guards of earlier ones that failed."""

    compile_id: str
    location: str
    function: str
    reasons: tuple[str, ...]


@dataclass(frozen=True)
class Site:
    """One entry of evidence, in its graph, with the provider that computes the replacement."""

    graph: int
    evidence: Evidence
    provider: str


@dataclass(frozen=True)
class SiteGroup:
    """Sites of one pass with the same outcome, as in the layers of a model. The costs are sums."""

    rewrite: str
    status: Status
    locations: tuple[str, ...]
    reason: str
    provider: str
    before: Cost | None
    after: Cost | None
    sites: tuple[Site, ...]

    @property
    def count(self) -> int:
        return len(self.sites)


# More places than this with the same outcome share a row.
_MOST_PLACES = 3
_NUMBERED = re.compile(r"\b([A-Za-z_]\w*?)_\d+\b")
_MADE = re.compile(r"%(\w+)")


def sites_of(record: GraphRecord) -> list[Site]:
    """The evidence of a graph, each with its provider."""
    anchored: dict[str, Evidence] = {}
    for entry in record.applied():
        anchored.setdefault(entry.anchor, entry)
    return [Site(record.index, entry, _provider(record, entry, anchored)) for entry in record.evidence]


def _provider(record: GraphRecord, entry: Evidence, anchored: dict[str, Evidence]) -> str:
    """Who computes what a rewrite made: the driver's detail names its nodes, ``%attention_3 : ...``.

    What a later rewrite has replaced again is looked up under that one's name.
    """
    if entry.after is None or not entry.after.launches:
        return ""  # nothing was made: an existing value took the place
    seen: set[str] = set()
    while True:
        names = _MADE.findall(entry.detail)
        chosen = next((record.chosen[name] for name in names if name in record.chosen), None)
        if chosen is not None:
            return chosen
        later = next((name for name in names if name in anchored and name not in seen), None)
        if later is None or anchored[later] is entry:
            return ""
        seen.add(later)
        entry = anchored[later]


def group_sites(records: Iterable[GraphRecord]) -> list[SiteGroup]:
    """All sites, in the order of their first. The same outcome at the same line is one group, and so is the
    same outcome at more than a few lines."""
    places: dict[tuple[Any, ...], list[Site]] = {}
    for record in records:
        for site in sites_of(record):
            entry = site.evidence
            reason = _NUMBERED.sub(r"\1", entry.reason)
            key = (entry.rewrite, entry.status, reason, site.provider, entry.location)
            places.setdefault(key, []).append(site)
    spread = Counter(key[:-1] for key in places)
    groups: dict[tuple[Any, ...], list[Site]] = {}
    for key, sites in places.items():
        groups.setdefault(key[:-1] if spread[key[:-1]] > _MOST_PLACES else key, []).extend(sites)
    return [_group(sites) for sites in groups.values()]


def _group(sites: Sequence[Site]) -> SiteGroup:
    first = sites[0].evidence
    return SiteGroup(
        rewrite=first.rewrite,
        status=first.status,
        locations=tuple(dict.fromkeys(site.evidence.location for site in sites)),
        reason=first.reason,
        provider=sites[0].provider,
        before=_sum(site.evidence.before for site in sites),
        after=_sum(site.evidence.after for site in sites),
        sites=tuple(sites),
    )


def _sum(costs: Iterable[Cost | None]) -> Cost | None:
    known = [cost for cost in costs if cost is not None]
    if not known:
        return None
    return Cost(*(sum(getattr(cost, name) for cost in known) for name in ("bytes", "flops", "launches")))


def miss_counts(records: Iterable[GraphRecord]) -> dict[str, Counter[str]]:
    """Pass -> reason -> number of anchors that are no instance of what it rewrites."""
    found: dict[str, Counter[str]] = {}
    for group in group_sites(records):
        if group.status is Status.MISS:
            found.setdefault(group.rewrite, Counter())[group.reason] += group.count
    return found


def sites_by_pass(records: Iterable[GraphRecord]) -> dict[str, tuple[int, int]]:
    """Pass -> (applied, sites looked at)."""
    counts: dict[str, tuple[int, int]] = {}
    for record in records:
        for entry in record.evidence:
            applied, sites = counts.get(entry.rewrite, (0, 0))
            counts[entry.rewrite] = (applied + (entry.status is Status.APPLIED), sites + 1)
    return counts


def saved(records: Iterable[GraphRecord]) -> Cost:
    """Predicted cost before minus after, over all applied rewrites. May be negative."""
    applied = [entry for record in records for entry in record.applied()]
    before, after = _sum(e.before for e in applied) or Cost(), _sum(e.after for e in applied) or Cost()
    return Cost(before.bytes - after.bytes, before.flops - after.flops, before.launches - after.launches)


def plural(count: int, noun: str) -> str:
    return f"{count} {noun}" + ("" if count == 1 else "s")


_UNITS = ("B", "kB", "MB", "GB", "TB")


def human_bytes(*counts: float) -> str:
    """``12.3 MB``, or ``35.8 -> 10.2 kB``: one unit, powers of 1000, three digits."""
    largest = max(abs(count) for count in counts)
    power = next((p for p in range(len(_UNITS)) if largest < 1000 ** (p + 1)), len(_UNITS) - 1)
    return " -> ".join(f"{count / 1000**power:.3g}" for count in counts) + f" {_UNITS[power]}"


def summary_text(
    records: Sequence[GraphRecord], breaks: Sequence[Break] | None, recompiles: Sequence[Recompile] | None
) -> str:
    """The whole report in one line. `breaks` and `recompiles` are None when nobody watched Dynamo."""
    trains = sum(record.trains for record in records)
    graphs = plural(len(records), "graph") + (f" ({trains} with a backward graph)" if trains else "")
    if breaks is None or recompiles is None:
        head = graphs
    else:
        head = f"{graphs}, {plural(len(breaks), 'break')}, {plural(len(recompiles), 'recompile')}"
    return "; ".join(part for part in (head, _sites_text(records), *_troubles(records)) if part)


def _sites_text(records: Sequence[GraphRecord]) -> str:
    by_pass = sites_by_pass(records)
    if not by_pass:
        return "no site rewritten"
    applied, sites = (sum(column) for column in zip(*by_pass.values(), strict=True))
    text = f"{applied} of {plural(sites, 'site')} rewritten ("
    text += ", ".join(f"{name} {done} of {total}" for name, (done, total) in by_pass.items()) + ")"
    cost = saved(records)
    if applied:
        text += f", {human_bytes(cost.bytes)} of memory traffic and {cost.launches} launches saved"
    return text


def _troubles(records: Sequence[GraphRecord]) -> list[str]:
    refused = sum(bool(record.refusals) for record in records)
    failed = sum(bool(record.failures) for record in records)
    errors = sum(record.count(Status.ERROR) for record in records)
    found = [(refused, "graph", "left to the host"), (failed, "graph", "where fxopt failed")]
    texts = [f"{plural(count, noun)} {rest}" for count, noun, rest in found if count]
    return texts + ([plural(errors, "fault") + " in passes"] if errors else [])


def graph_dict(record: GraphRecord) -> dict[str, Any]:
    """One graph as plain JSON types."""
    return {
        "index": record.index,
        "compile_id": record.compile_id,
        "location": record.location,
        "nodes": record.nodes,
        "inputs": record.inputs,
        "dynamic": record.dynamic,
        "backward": record.trains,
        "normalized": record.normalized,
        "host": record.host,
        "seconds": {stage: round(spent, 6) for stage, spent in record.seconds.items()},
        "pass_seconds": {name: round(spent, 6) for name, spent in record.pass_seconds.items()},
        "linears": [vars(note).copy() for note in record.linears],
        "refusals": [{"stage": stage, "reason": reason} for stage, reason in record.refusals],
        "failures": [{"stage": stage, "message": message} for stage, message in record.failures],
        "error": record.error,
        "sites": [_site_dict(site) for site in sites_of(record)],
        "providers": [
            {"op": op, "provider": provider, "refused": refused} for op, provider, refused in record.providers
        ],
    }


def _site_dict(site: Site) -> dict[str, Any]:
    entry = site.evidence
    return {
        "pass": entry.rewrite,
        "status": entry.status.value,
        "location": entry.location,
        "anchor": entry.anchor,
        "reason": entry.reason,
        "detail": entry.detail,
        "provider": site.provider,
        "before": cost_dict(entry.before),
        "after": cost_dict(entry.after),
    }


def cost_dict(cost: Cost | None) -> dict[str, int] | None:
    if cost is None:
        return None
    return {"bytes": int(cost.bytes), "flops": int(cost.flops), "launches": int(cost.launches)}


def graph_json(record: GraphRecord) -> str:
    return json.dumps(graph_dict(record))
