"""What happened to each graph: kept for explain, logs and tests. In memory, bounded, thread-safe."""

from __future__ import annotations

import itertools
import logging
import threading
import time
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

from torch import fx

from fxopt.ir.contract import Evidence, Status

log = logging.getLogger("fxopt")

_KEPT = 512
_counter = itertools.count()
_records: deque[GraphRecord] = deque(maxlen=_KEPT)
_collectors: list[list[GraphRecord]] = []
_lock = threading.Lock()


@dataclass
class GraphRecord:
    """One compiled graph.

    Attributes:
        index: number of the graph in this process.
        compile_id: Dynamo's frame and recompile number, ``"0/1"``; empty outside of Dynamo.
        nodes: number of nodes that Dynamo captured.
        inputs: number of graph inputs.
        normalized: False when the untouched graph went to the host; `refusals` says why.
        host: name of the host.
        evidence: what each pass did at each of its anchors.
        providers: (semantic op, chosen provider, why the ones before it were refused), one per call.
        refusals: (stage, reason) of what was handed to the host untouched, by design.
        failures: (stage, message) of faults of fxopt that were survived.
        seconds: wall-clock seconds by stage: normalize, passes, lower, host.
    """

    index: int
    compile_id: str = ""
    nodes: int = 0
    inputs: int = 0
    normalized: bool = False
    host: str = ""
    evidence: list[Evidence] = field(default_factory=list)
    providers: list[tuple[str, str, str]] = field(default_factory=list)
    refusals: list[tuple[str, str]] = field(default_factory=list)
    failures: list[tuple[str, str]] = field(default_factory=list)
    seconds: dict[str, float] = field(default_factory=dict)

    @contextmanager
    def timed(self, stage: str) -> Iterator[None]:
        start = time.perf_counter()
        try:
            yield
        finally:
            self.seconds[stage] = self.seconds.get(stage, 0.0) + time.perf_counter() - start

    def refuse(self, stage: str, reason: str) -> None:
        self.refusals.append((stage, reason))

    def fail(self, stage: str, error: BaseException) -> None:
        """A fault of fxopt, survived: the graph goes to the host as Dynamo gave it."""
        self.failures.append((stage, f"{type(error).__name__}: {error}"))
        log.warning("fxopt: %s failed, the graph goes to the host unchanged: %s", stage, error)

    def count(self, status: Status) -> int:
        return sum(entry.status is status for entry in self.evidence)

    def applied(self, rewrite: str | None = None) -> list[Evidence]:
        """The rewrites that were applied, all or those of one pass."""
        return [e for e in self.evidence if e.status is Status.APPLIED and rewrite in (None, e.rewrite)]


@contextmanager
def recorded(gm: fx.GraphModule) -> Iterator[GraphRecord]:
    """A record for one graph, kept also when the compilation fails."""
    record = GraphRecord(
        index=next(_counter),
        compile_id=str(gm.meta.get("dynamo_compile_id", "")),
        nodes=len(gm.graph.nodes),
        inputs=len(gm.graph.find_nodes(op="placeholder")),
    )
    try:
        yield record
    finally:
        _keep(record)


def _keep(record: GraphRecord) -> None:
    with _lock:
        _records.append(record)
        for collector in _collectors:
            collector.append(record)


@contextmanager
def collect() -> Iterator[list[GraphRecord]]:
    """The records of all graphs compiled inside of the block, by any thread."""
    found: list[GraphRecord] = []
    with _lock:
        _collectors.append(found)
    try:
        yield found
    finally:
        with _lock:
            _collectors[:] = [one for one in _collectors if one is not found]


def records() -> list[GraphRecord]:
    """The records of this process, oldest first, at most 512."""
    with _lock:
        return list(_records)


def forget() -> None:
    """Drop all records."""
    with _lock:
        _records.clear()
