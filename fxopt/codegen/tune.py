"""Measured decisions about kernels: in which configuration, and whether the kernel or the host is faster.

What was measured is kept by the cache of kernels, for the kernel's text, the class of its sizes and the
device, and is never measured again. A region is computed by a kernel only where the kernel was faster than
the host by more than the measurements vary; without a measurement it is left to the host.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Protocol

from rich.console import Console
from rich.progress import track

from fxopt.codegen.configurations import configuration, proposals
from fxopt.codegen.emit import Decision
from fxopt.codegen.kernel_file import KernelFile
from fxopt.codegen.settings import identity, settings, versions, with_settings
from fxopt.ir.target import Target
from fxopt.runtime.kernel_cache import KernelCache

FORMAT = "2"  # of what is remembered
Key = tuple[str, ...]


class CannotMeasure(Exception):
    """Nothing can be measured now: no memory is left on the device, or the measuring process ended."""


@dataclass(frozen=True)
class Samples:
    """Seconds of one entrant in rounds in which all took turns, or why it has none."""

    seconds: tuple[float, ...] = ()
    error: str = ""

    @property
    def median(self) -> float:
        return statistics.median(self.seconds)

    @property
    def range(self) -> tuple[float, float]:
        """The middle half of the samples."""
        if len(self.seconds) < 2:
            return self.median, self.median
        low, _, high = statistics.quantiles(self.seconds, n=4, method="inclusive")
        return low, high


class Timer(Protocol):
    """What measures. `device` names it for the keys of what is remembered."""

    device: str

    def samples(self, kernels: Sequence[KernelFile]) -> list[Samples]:
        """Of each kernel, and last of what the host makes of the reference of the first.

        Raises:
            CannotMeasure: of anything.
        """

    def problems(self, kernel: KernelFile) -> list[str]:
        """In what the kernel differs from its reference; empty when it is right."""


@dataclass
class Budget:
    """Seconds that may be spent on measuring, from the first look on."""

    seconds: float
    clock: Callable[[], float] = time.monotonic
    _end: float | None = None

    @property
    def is_left(self) -> bool:
        if self._end is None:
            self._end = self.clock() + self.seconds
        return self.clock() < self._end

    @property
    def spent(self) -> str:
        """Why nothing is measured any more."""
        return f"the {self.seconds:g} s for measuring were spent"

    @property
    def left(self) -> float:
        """Seconds; none are left once it is negative."""
        return self._end - self.clock() if self._end is not None else self.seconds


@dataclass
class Tuner:
    """Decides about the kernels of graphs.

    Attributes:
        always: a kernel that is slower than the host, or was not measured, is used nevertheless.
        shown: whether a progress bar is drawn; by default where the standard error is a terminal.
    """

    cache: KernelCache
    timer: Timer
    target: Target
    budget: Budget
    always: bool = False
    shown: bool = field(default_factory=lambda: Console(stderr=True).is_terminal)

    def decide(self, kernels: Sequence[KernelFile]) -> list[Decision]:
        """One decision for each kernel; equal kernels are measured once, by the first that are met."""
        keys = [self._key(kernel) for kernel in kernels]
        recalled = {key: self.cache.recall(*key) for key in dict.fromkeys(keys)}
        known: dict[Key, dict[str, Any]] = {key: one for key, one in recalled.items() if one is not None}
        unknown = {key: kernel for key, kernel in zip(keys, kernels, strict=True) if key not in known}
        bar = track(
            unknown.items(),
            "measuring kernels",
            console=Console(stderr=True),
            transient=True,
            disable=not self.shown,
        )
        for key, kernel in bar:
            known[key] = self._measured(key, kernel)
        return [self._decision(kernel, known[key]) for key, kernel in zip(keys, kernels, strict=True)]

    def _key(self, kernel: KernelFile) -> Key:
        sizes: Sequence[int] = [size for launch in kernel.launches for _, size in launch.adjustable]
        sizes = sizes if kernel.modelled else kernel.about.seen
        shape = ",".join(str((size - 1).bit_length()) for size in sizes)
        return ("tuning", FORMAT, identity(kernel), shape, self.timer.device, *versions())

    def _measured(self, key: Key, kernel: KernelFile) -> dict[str, Any]:
        """What was found, which is remembered if it was measured."""
        if not self.budget.is_left:
            return {"unmeasured": self.budget.spent}
        candidates = proposals(kernel, self.target)
        try:
            samples = self.timer.samples(candidates)
            found = self._contest(candidates, samples)
        except CannotMeasure as error:
            return {"unmeasured": str(error)}
        self.cache.remember(found, *key)
        return found

    def _contest(self, candidates: Sequence[KernelFile], samples: Sequence[Samples]) -> dict[str, Any]:
        *ours, host = samples
        tried = {
            configuration(kernel): one.error or one.median
            for kernel, one in zip(candidates, ours, strict=True)
        }
        runs = [pair for pair in zip(candidates, ours, strict=True) if not pair[1].error]
        for kernel, one in sorted(runs, key=lambda pair: pair[1].median):
            if wrong := self.timer.problems(kernel):
                tried[configuration(kernel)] = f"wrong: {wrong[0]}"
                continue
            return {
                "alternative": _place(kernel, candidates[0]),
                "settings": settings(kernel),
                "kernel": one.median,
                "host": host.error or host.median,
                "verdict": verdict(one, host),
                "tried": tried,
            }
        return {"verdict": "no configuration could be run", "tried": tried}

    def _decision(self, kernel: KernelFile, found: dict[str, Any]) -> Decision:
        if "unmeasured" in found:
            reason = f"not measured: {found['unmeasured']}"
            return Decision(kernel if self.always else None, reason)
        if "settings" not in found:
            return Decision(
                None, f"{found['verdict']} on {self.timer.device}: {_first_error(found['tried'])}"
            )
        figures = f"{micro(found['kernel'])} in the kernel, {micro(found['host'])} in TorchInductor"
        reason = f"measured on {self.timer.device}: {figures}"
        if found["verdict"] != "faster":
            reason += f", {found['verdict']}"
        forms = (kernel, *kernel.alternatives)
        chosen = with_settings(forms[found["alternative"]], found["settings"])
        why = (f"{configuration(chosen)}: {reason}", *kernel.about.configuration[-1:])
        chosen = replace(chosen, about=replace(kernel.about, configuration=why), alternatives=())
        faster = found["verdict"] == "faster"
        return Decision(chosen if faster or self.always else None, reason, faster, best=chosen)


def verdict(ours: Samples, host: Samples) -> str:
    """``"faster"``, or why the host computes the region. What varies more than it differs is no gain."""
    if host.error:
        return "so that they cannot be compared"
    if ours.median >= host.median:
        return "slower"
    return "faster" if ours.range[1] < host.range[0] else "which differs by less than the measurements vary"


def _place(kernel: KernelFile, first: KernelFile) -> int:
    """Which of the forms of `first` the kernel is one of: 0 for its own, then its alternatives."""
    return [one.jit for one in (first, *first.alternatives)].index(kernel.jit)


def _first_error(tried: dict[str, Any]) -> str:
    return next((one for one in tried.values() if isinstance(one, str)), "none was proposed")


def micro(seconds: float | str) -> str:
    """Seconds, or why there are none, as a reader wants them."""
    return f"{seconds * 1e6:.1f} us" if isinstance(seconds, float) else f"an error ({seconds})"
