"""What happened to each graph: kept for explain, logs and tests. In memory, bounded, thread-safe.

Recording never fails a compilation: what goes wrong here is logged and forgotten.
"""

from __future__ import annotations

import itertools
import logging
import threading
import time
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import fx

from fxopt.integrations.logging import announce
from fxopt.ir.contract import Evidence, Status
from fxopt.ir.facts import location
from fxopt.ir.linear_notes import LinearNotes

if TYPE_CHECKING:
    from fxopt.codegen.kernel_file import KernelFile

log = logging.getLogger("fxopt")

_KEPT = 512
_counter = itertools.count()
_lock = threading.Lock()


@contextmanager
def _added_to(seconds: dict[str, float], name: str) -> Iterator[None]:
    start = time.perf_counter()
    try:
        yield
    finally:
        seconds[name] = seconds.get(name, 0.0) + time.perf_counter() - start


@dataclass
class GraphRecord:
    """One compiled graph.

    Attributes:
        index: number of the graph in this process.
        compile_id: Dynamo's frame and recompile number, ``"0/1"``; empty outside of Dynamo.
        location: file and line of the user's first operation in the graph.
        nodes: number of nodes that Dynamo captured.
        inputs: number of graph inputs.
        dynamic: an input has a symbolic size.
        trains: an input requires grad, so AOTAutograd makes a backward graph to this one.
        normalized: False when the untouched graph went to the host; `refusals` says why.
        host: name of the host.
        evidence: what each pass did at each of its anchors.
        providers: (semantic op, chosen provider, why the ones before it were refused), one per call.
        chosen: name of the semantic op's node -> chosen provider.
        kernels: what was emitted for regions of the graphs after autograd.
        linears: linear layers with quantized weights, and those that might have had them.
        refusals: (stage, reason) of what was handed to the host untouched, by design.
        failures: (stage, message) of faults of fxopt that were survived.
        seconds: wall-clock seconds by stage: normalize, passes, lower, host.
        pass_seconds: wall-clock seconds by pass; the parts of the stage "passes".
        error: the exception that ended the compilation, if one did.
    """

    index: int
    compile_id: str = ""
    location: str = "-"
    nodes: int = 0
    inputs: int = 0
    dynamic: bool = False
    trains: bool = False
    normalized: bool = False
    host: str = ""
    evidence: list[Evidence] = field(default_factory=list)
    providers: list[tuple[str, str, str]] = field(default_factory=list)
    chosen: dict[str, str] = field(default_factory=dict)
    kernels: list[KernelFile] = field(default_factory=list)
    linears: LinearNotes = field(default_factory=LinearNotes)
    refusals: list[tuple[str, str]] = field(default_factory=list)
    failures: list[tuple[str, str]] = field(default_factory=list)
    seconds: dict[str, float] = field(default_factory=dict)
    pass_seconds: dict[str, float] = field(default_factory=dict)
    error: str = ""

    @contextmanager
    def timed(self, stage: str) -> Iterator[None]:
        with _added_to(self.seconds, stage):
            yield

    @contextmanager
    def timed_pass(self, name: str) -> Iterator[None]:
        with _added_to(self.pass_seconds, name):
            yield

    def refuse(self, stage: str, reason: str) -> None:
        self.refusals.append((stage, reason))

    def note_refusal(self, rewrite: str, reason: str) -> None:
        """What turned out to be impossible when the graph ran."""
        self.evidence.append(Evidence(rewrite, "-", self.location, Status.ILLEGAL, reason))

    def fail(self, stage: str, error: BaseException) -> None:
        """A fault of fxopt, survived: the graph goes to the host as Dynamo gave it."""
        text = describe_error(error)
        self.failures.append((stage, text))
        log.warning("fxopt: %s failed, the graph goes to the host unchanged: %s", stage, text)

    def note_provider(self, node: fx.Node, op: str, provider: str, refused: str) -> None:
        """The provider that computes the semantic op at `node`."""
        self.providers.append((op, provider, refused))
        self.chosen[node.name] = provider

    def count(self, status: Status) -> int:
        return sum(entry.status is status for entry in self.evidence)

    def applied(self, rewrite: str | None = None) -> list[Evidence]:
        """The rewrites that were applied, all or those of one pass."""
        return [e for e in self.evidence if e.status is Status.APPLIED and rewrite in (None, e.rewrite)]


def describe_error(error: BaseException) -> str:
    """Type and message in one text; some exceptions raise when they are printed."""
    try:
        return f"{type(error).__name__}: {error}"
    except Exception:
        return type(error).__name__


@dataclass(eq=False)
class _Collector:
    found: list[GraphRecord]
    thread: int | None  # None takes the records of all threads

    def takes(self, thread: int) -> bool:
        return self.thread in (None, thread)


_records: deque[GraphRecord] = deque(maxlen=_KEPT)
_collectors: list[_Collector] = []


@contextmanager
def recorded(gm: fx.GraphModule) -> Iterator[GraphRecord]:
    """A record for one graph, kept also when the compilation fails."""
    record = GraphRecord(index=next(_counter))
    _attempt("reading the graph", _read, gm, record)
    try:
        yield record
    except BaseException as error:
        record.error = describe_error(error)
        raise
    finally:
        _keep(record)
        _attempt("logging", announce, record)


def _attempt(what: str, action: Any, *arguments: Any) -> None:
    """A fault in reporting is a line in the log, never the user's exception."""
    try:
        action(*arguments)
    except Exception as error:
        log.warning("fxopt: %s for the report failed: %s", what, describe_error(error))


def _read(gm: fx.GraphModule, record: GraphRecord) -> None:
    placeholders = gm.graph.find_nodes(op="placeholder")
    record.compile_id = str(gm.meta.get("dynamo_compile_id", ""))
    record.nodes = len(gm.graph.nodes)
    record.inputs = len(placeholders)
    values = [node.meta.get("example_value") for node in placeholders]
    record.dynamic = any(_is_symbolic(value) for value in values)
    record.trains = torch.is_grad_enabled() and any(
        isinstance(value, torch.Tensor) and value.requires_grad for value in values
    )
    calls = (location(node) for node in gm.graph.nodes if node.op != "placeholder")
    record.location = next((where for where in calls if where != "-"), "-")


def _is_symbolic(value: Any) -> bool:
    sizes = value.shape if isinstance(value, torch.Tensor) else (value,)
    return any(isinstance(size, torch.SymInt) and not size.node.is_constant() for size in sizes)


def _keep(record: GraphRecord) -> None:
    thread = threading.get_ident()
    with _lock:
        takers = [collector for collector in _collectors if collector.takes(thread)]
        for collector in takers:
            collector.found.append(record)
        if all(collector.thread is None for collector in takers):
            _records.append(record)


@contextmanager
def collect(*, private: bool = False) -> Iterator[list[GraphRecord]]:
    """The records of the graphs compiled inside of the block.

    By any thread; with `private` by this one only, and then they are kept out of `records()`.
    """
    collector = _Collector([], threading.get_ident() if private else None)
    with _lock:
        _collectors.append(collector)
    try:
        yield collector.found
    finally:
        with _lock:
            _collectors.remove(collector)


def records() -> list[GraphRecord]:
    """The records of this process, oldest first, at most 512."""
    with _lock:
        return list(_records)


def forget() -> None:
    """Drop all records."""
    with _lock:
        _records.clear()
