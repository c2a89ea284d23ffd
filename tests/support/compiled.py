"""Compiling with fxopt in a test, where nothing that fxopt failed at may pass unseen."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch

from fxopt.ir.contract import Status
from fxopt.report.record import GraphRecord, collect


def compile_fxopt(model: Callable[..., Any], host: str = "eager", **options: Any) -> Callable[..., Any]:
    """`torch.compile` with fxopt, a fault of which raises. The eager host is the cheap one."""
    options = {"host": host, "strict": True, **options}
    compiled: Callable[..., Any] = torch.compile(model, backend="fxopt", options=options)
    return compiled


@contextmanager
def all_handled() -> Iterator[list[GraphRecord]]:
    """Yields the records of the graphs compiled inside; at the end there must be some, all of them without
    fault.

    fxopt survives its own faults by handing the graph to the host unchanged. For a user this is right; a test
    that compares only numbers would then prove nothing.
    """
    with collect() as records:
        yield records
    assert records, "fxopt compiled no graph"
    assert not faults(records), "\n".join(faults(records))


def faults(records: Sequence[GraphRecord]) -> list[str]:
    """What went wrong, or was not even tried, in the graphs of these records."""
    return [fault for record in records for fault in _faults(record)]


def _faults(record: GraphRecord) -> list[str]:
    name = f"graph {record.index} ({record.compile_id})"
    found = [f"{name}: {stage} failed: {message}" for stage, message in record.failures]
    found += [f"{name}: {stage} refused: {reason}" for stage, reason in record.refusals]
    found += [
        f"{name}: {entry.rewrite} failed at {entry.location}: {entry.reason}"
        for entry in record.evidence
        if entry.status is Status.ERROR
    ]
    if not record.normalized and not found:
        found.append(f"{name}: not normalized, and no reason given")
    return found
