"""One model under several backends, side by side: the same inputs, the same weights, one process."""

from __future__ import annotations

import functools
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from fxopt.measure.accuracy import (
    allowed_error,
    comparable,
    dashboard_passes,
    float64_everywhere,
    floating,
    max_error,
)
from fxopt.measure.compiled import (
    BASELINE,
    CANDIDATE,
    EAGER,
    TUNED,
    TWIN,
    Compiled,
    caches_in,
    called_twice,
    compile_with,
    empty_folder,
)
from fxopt.measure.memory import peak_bytes
from fxopt.measure.models import Subject
from fxopt.measure.timing import Ratio, Timings, interleave
from fxopt.report.record import GraphRecord

Step = Callable[[], Any]


@dataclass(frozen=True)
class Checked:
    """How far the answers are from float64.

    Attributes:
        errors: largest absolute error, by backend and "eager".
        allowed: the largest error that is accepted.
        comparable: whether eager is close enough to float64 for that to mean anything.
        dashboard: whether fxopt passes by the rule of PyTorch's dashboard.
    """

    errors: dict[str, float]
    allowed: float
    comparable: bool
    dashboard: bool

    @property
    def accepted(self) -> bool:
        return self.comparable and self.errors[CANDIDATE] <= self.allowed


@dataclass
class Comparison:
    """What was measured on one subject.

    Attributes:
        compiled: what the first calls of each backend cost, as cold as the caches were.
        warm: seconds until the first result with warm caches, by backend; empty when not measured.
        peaks: bytes held at most during a call, by backend; empty when not measured.
        checked: None when not compared with float64.
    """

    timings: Timings
    compiled: dict[str, Compiled] = field(default_factory=dict)
    warm: dict[str, float] = field(default_factory=dict)
    peaks: dict[str, int] = field(default_factory=dict)
    checked: Checked | None = None

    @property
    def speed(self) -> Ratio:
        """Inductor's time by fxopt's: more than 1 when fxopt is faster."""
        return self.timings.ratio(BASELINE, CANDIDATE)

    @property
    def noise(self) -> Ratio:
        """Inductor's time by Inductor's own."""
        return self.timings.ratio(BASELINE, TWIN)

    @property
    def records(self) -> list[GraphRecord]:
        """fxopt's graphs."""
        return self.compiled[CANDIDATE].records

    @property
    def sites(self) -> dict[str, int]:
        """Number of rewrites by pass, of graphs that the host took."""
        kept = (record for record in self.records if not record.failures)
        return dict(Counter(entry.rewrite for record in kept for entry in record.applied()))

    @property
    def faults(self) -> list[str]:
        """What fxopt survived: each is a bug of fxopt."""
        return faults_of(self.records)

    def row(self) -> dict[str, Any]:
        """As plain values, in the names that all results use."""
        found = figures(self.timings) | {"sites": self.sites, "faults": self.faults}
        if self.peaks:
            found["peak_bytes"] = self.peaks
        if self.checked is not None:
            found["errors"], found["accepted"] = self.checked.errors, self.checked.accepted
            found["dashboard"] = self.checked.dashboard
        return found


def figures(times: Timings) -> dict[str, Any]:
    """The ratios and times of a row: of fxopt, Inductor, Inductor again, and others, by whatever name."""
    names = [name for name in times.seconds if name != TWIN]
    others = [name for name in names if name not in (BASELINE, CANDIDATE)]
    return {
        "ratio": times.ratio(BASELINE, CANDIDATE).as_dict(),
        "noise": times.ratio(BASELINE, TWIN).as_dict(),
        "over": {name: times.ratio(name, CANDIDATE).as_dict() for name in others},
        "seconds": {name: times.median(name) for name in names},
        "spread": {name: times.spread(name) for name in names},
        "rounds": len(times.seconds[CANDIDATE]),
    }


def faults_of(records: Sequence[GraphRecord]) -> list[str]:
    """What fxopt survived in these graphs."""
    return [f"{stage}: {message}" for record in records for stage, message in record.failures]


def compare(
    subject: Subject,
    *,
    options: Mapping[str, Any] | None = None,
    mode: str | None = None,
    check: bool = True,
    eager: bool = False,
    tuned: bool = False,
    others: Mapping[str, Step] | None = None,
    memory: bool = False,
    cold: bool = False,
    **timing: Any,
) -> Comparison:
    """Compile `subject` with Inductor and with fxopt, compare their results, and time them.

    Args:
        options: for fxopt, as in `torch.compile(options=...)`.
        mode: of both, as in `torch.compile(mode=...)`.
        check: compare with float64; needs a deterministic model.
        eager: time eager too. tuned: time Inductor with `max-autotune` too.
        others: further steps, which compute the same in another way; timed beside.
        memory: measure the peak of memory too.
        cold: start from empty caches, and measure the compilation with warm ones too.
        timing: arguments of `fxopt.measure.timing.interleave`.
    """
    torch._dynamo.reset()
    names = (BASELINE, CANDIDATE, *([TUNED] if tuned else []))
    plain = subject.step(subject.model)
    make = functools.partial(_compile_all, subject, names, options, mode)
    steps, compiled, warm = _cold_and_warm(make) if cold else (*make(None), {})
    checked = _check(subject, plain, compiled) if check else None
    candidates = {BASELINE: steps[BASELINE], CANDIDATE: steps[CANDIDATE], TWIN: steps[BASELINE]}
    candidates |= {EAGER: plain} if eager else {}
    candidates |= {name: steps[name] for name in names if name == TUNED} | dict(others or {})
    for step in candidates.values():
        step()
    peaks = {name: peak_bytes(step) for name, step in candidates.items() if name != TWIN} if memory else {}
    return Comparison(interleave(candidates, **timing), compiled, warm, peaks, checked)


Made = tuple[dict[str, Step], dict[str, Compiled]]


def _compile_all(
    subject: Subject,
    names: Sequence[str],
    options: Mapping[str, Any] | None,
    mode: str | None,
    folder: Path | None,
) -> Made:
    """The steps, each called twice; with `folder`, each has caches of its own in it."""
    steps: dict[str, Step] = {}
    compiled: dict[str, Compiled] = {}
    for name in names:
        own = folder / name if folder is not None else None
        cache = str(own / "kernels") if own is not None else None
        steps[name] = subject.step(compile_with(subject.model, name, options, mode=mode, cache=cache))
        with caches_in(own) if own is not None else nullcontext():
            compiled[name] = called_twice(subject.answering(steps[name]))
    return steps, compiled


def _cold_and_warm(
    make: Callable[[Path], Made],
) -> tuple[dict[str, Step], dict[str, Compiled], dict[str, float]]:
    """The steps; what compiling them took with empty caches, and again with what that left on disk."""
    with empty_folder() as folder:
        _, compiled = make(folder)
        torch._dynamo.reset()
        steps, again = make(folder)
    return steps, compiled, {name: one.seconds for name, one in again.items()}


def _check(subject: Subject, plain: Step, compiled: Mapping[str, Compiled]) -> Checked:
    results = {EAGER: subject.answering(plain)(), **{name: one.result for name, one in compiled.items()}}
    exact = exact_result(subject)
    eager = results[EAGER]
    # Of a training step the loss: gradients that are zero but for rounding have no digits to agree.
    told = slice(1) if subject.training else slice(None)
    return Checked(
        {name: max_error(result, exact) for name, result in results.items()},
        allowed_error(eager, exact),
        comparable(floating(eager)[told], floating(exact)[told]),
        dashboard_passes(results[CANDIDATE], eager, exact, training=subject.training),
    )


def exact_result(subject: Subject) -> Any:
    """The subject's result in float64; for a training step, with the gradients."""
    wide = subject.double()
    with float64_everywhere():
        return wide.answering(wide.step(wide.model))()


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
