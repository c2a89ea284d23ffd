"""``TORCH_LOGS="fxopt"``: what fxopt did to each graph, in torch's own log and in its structured trace.

torch resolves the name by itself: the plugin registers ``fxopt`` before torch reads ``TORCH_LOGS``, and
without the plugin torch accepts any importable module. Prefix, levels, ``TORCH_LOGS_OUT`` and
``torch._logging.set_logs(modules={"fxopt": logging.INFO})`` are torch's.

- ``"fxopt"`` (INFO): a line for each graph, a line for each refusal; ``"+fxopt"`` (DEBUG): each site as well;
  ``"-fxopt"``: errors only.
- ``TORCH_TRACE=dir``: an artifact ``fxopt_report`` for each graph, in JSON, which tlparse lists.
"""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING

from fxopt.ir.contract import Evidence, Status

if TYPE_CHECKING:
    from fxopt.report.record import GraphRecord

log = logging.getLogger("fxopt")


def announce(record: GraphRecord) -> None:
    """Write what is known of a graph that has just been compiled."""
    if log.isEnabledFor(logging.INFO):
        log.info("%s", summary_line(record))
        for stage, reason in record.refusals:
            log.info("graph %d: %s refused: %s", record.index, stage, reason)
    if log.isEnabledFor(logging.DEBUG):
        for entry in record.evidence:
            log.debug("graph %d: %s", record.index, evidence_line(entry))
        for op, provider, refused in record.providers:
            log.debug("graph %d: %s by %s%s", record.index, op, provider, f" ({refused})" if refused else "")
    _trace(record)


def summary_line(record: GraphRecord) -> str:
    """One graph in one line: ``graph 3 (0/1) at model.py:12: 250 nodes, 14 rewrites (...), 0.31 s, ...``."""
    by_pass: dict[str, int] = {}
    for entry in record.applied():
        by_pass[entry.rewrite] = by_pass.get(entry.rewrite, 0) + 1
    rewrites = ", ".join(f"{name} {count}" for name, count in by_pass.items())
    others = {status: record.count(status) for status in Status if status is not Status.APPLIED}
    counts = ", ".join(f"{count} {status.value}" for status, count in others.items() if count)
    seconds = ", ".join(f"{stage} {spent:.2f} s" for stage, spent in record.seconds.items())
    number = sum(by_pass.values())
    parts = [
        f"{record.nodes} nodes",
        "normalized" if record.normalized else "not normalized",
        f"{number} rewrite{'' if number == 1 else 's'}" + (f" ({rewrites})" if rewrites else ""),
        counts,
        f"host {record.host}" if record.host else "",
        seconds,
        f"ended by {record.error.splitlines()[0]}" if record.error else "",
    ]
    known_as = f" ({record.compile_id})" if record.compile_id else ""
    return f"graph {record.index}{known_as} at {record.location}: " + ", ".join(
        part for part in parts if part
    )


def evidence_line(entry: Evidence) -> str:
    """One site in one line."""
    cost = f" [{entry.before} -> {entry.after}]" if entry.before and entry.after else ""
    detail = f": {entry.detail}" if entry.detail else ""
    return (
        f"{entry.rewrite} {entry.status.value} at {entry.location} ({entry.anchor}): "
        f"{entry.reason}{cost}{detail}"
    )


def _trace(record: GraphRecord) -> None:
    """The payload is made only if a trace is being written."""
    from torch._logging._internal import trace_structured

    def payload() -> str:
        from fxopt.report.summary import graph_json

        return graph_json(record)

    trace_structured(
        "artifact",
        metadata_fn=lambda: {"name": "fxopt_report", "encoding": "json"},
        payload_fn=payload,
        expect_trace_id=False,
    )
