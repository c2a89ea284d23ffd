"""One model under several backends, side by side: the same inputs, the same weights, one process."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from fxopt.measure.accuracy import allowed_error, comparable, float64_everywhere, max_error
from fxopt.measure.compiled import compile_with
from fxopt.measure.memory import peak_bytes
from fxopt.measure.models import Subject
from fxopt.measure.timing import Ratio, Timings, interleave
from fxopt.report.record import GraphRecord, collect

BASELINE, CANDIDATE, TWIN = "inductor", "fxopt", "inductor again"


@dataclass
class Comparison:
    """What was measured on one subject.

    Attributes:
        first_call: seconds until the first result, by backend: compilation, as cold as the caches were.
        peaks: bytes held at most during a call, by backend; empty when not measured.
        records: fxopt's graphs.
        errors: largest absolute error against float64, by backend and "eager"; empty when not checked.
        allowed: the largest error that is accepted.
        comparable: whether eager is close enough to float64 for that to mean anything.
    """

    timings: Timings
    first_call: dict[str, float] = field(default_factory=dict)
    peaks: dict[str, int] = field(default_factory=dict)
    records: list[GraphRecord] = field(default_factory=list)
    errors: dict[str, float] = field(default_factory=dict)
    allowed: float | None = None
    comparable: bool = True

    @property
    def speed(self) -> Ratio:
        """Inductor's time by fxopt's: more than 1 when fxopt is faster."""
        return self.timings.ratio(BASELINE, CANDIDATE)

    @property
    def noise(self) -> Ratio:
        """Inductor's time by Inductor's own."""
        return self.timings.ratio(BASELINE, TWIN)

    @property
    def accepted(self) -> bool:
        return self.allowed is None or (self.comparable and self.errors[CANDIDATE] <= self.allowed)

    @property
    def sites(self) -> dict[str, int]:
        """Number of rewrites by pass, of graphs that the host took."""
        kept = (record for record in self.records if not record.failures)
        return dict(Counter(entry.rewrite for record in kept for entry in record.applied()))

    @property
    def faults(self) -> list[str]:
        """What fxopt survived: each is a bug of fxopt."""
        return [f"{stage}: {message}" for record in self.records for stage, message in record.failures]


def compare(
    subject: Subject,
    *,
    options: Mapping[str, Any] | None = None,
    check: bool = True,
    eager: bool = False,
    memory: bool = False,
    **timing: Any,
) -> Comparison:
    """Compile `subject` with Inductor and with fxopt, compare their results, and time them.

    Args:
        options: for fxopt, as in `torch.compile(options=...)`.
        check: compare with float64; needs a deterministic model.
        eager: time eager too.
        memory: measure the peak of memory too. CPU only.
        timing: arguments of `fxopt.measure.timing.interleave`.
    """
    torch._dynamo.reset()
    first_call: dict[str, float] = {}
    results: dict[str, Any] = {}
    steps: dict[str, Callable[[], Any]] = {}
    plain = subject.step(subject.model)
    with collect() as records:
        for name, extra in ((BASELINE, None), (CANDIDATE, options)):
            steps[name] = subject.step(compile_with(subject.model, name, extra))
            start = time.perf_counter()
            results[name] = steps[name]()
            first_call[name] = time.perf_counter() - start
    errors, *verdict = _errors(subject, plain, results) if check else ({}, None, True)
    candidates = {BASELINE: steps[BASELINE], CANDIDATE: steps[CANDIDATE], TWIN: steps[BASELINE]}
    if eager:
        candidates["eager"] = plain
    for step in candidates.values():
        step()  # the second call may compile again, for shapes that turned out to change
    peaks = {name: peak_bytes(candidates[name]) for name in (BASELINE, CANDIDATE)} if memory else {}
    return Comparison(interleave(candidates, **timing), first_call, peaks, list(records), errors, *verdict)


def _errors(
    subject: Subject, plain: Callable[[], Any], results: dict[str, Any]
) -> tuple[dict[str, float], float, bool]:
    results = {"eager": plain(), **results}
    exact = exact_result(subject)
    errors = {name: max_error(result, exact) for name, result in results.items()}
    eager = results["eager"]
    return errors, allowed_error(eager, exact), comparable(eager, exact)


def exact_result(subject: Subject) -> Any:
    """The subject's result in float64."""
    wide = subject.double()
    with float64_everywhere():
        return wide.step(wide.model)()


def stage_seconds(records: Sequence[GraphRecord]) -> dict[str, float]:
    """Seconds of each stage, summed over graphs."""
    return _summed(record.seconds for record in records)


def pass_seconds(records: Sequence[GraphRecord]) -> dict[str, float]:
    """Seconds of each pass, summed over graphs."""
    return _summed(record.pass_seconds for record in records)


def _summed(parts: Iterable[Mapping[str, float]]) -> dict[str, float]:
    total: Counter[str] = Counter()
    for part in parts:
        total.update(part)
    return dict(total)
