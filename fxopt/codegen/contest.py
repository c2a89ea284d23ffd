"""Whether a kernel in the place of a semantic op is faster than what the host makes of the op: measured.

A region has a reference that the host compiles as well as any other code. A semantic op has not: without a
kernel its other providers compute it, by torch's fused kernels for instance. So the call is compiled alone,
twice, with kernels and without, in the configuration of the compilation that asks; both take turns. What was
found is kept by the cache of kernels and not measured again.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Protocol

from rich.console import Console
from torch import fx

from fxopt.codegen.lone_call import LoneCall, lone_call
from fxopt.codegen.settings import versions
from fxopt.codegen.tune import Budget, CannotMeasure, Samples, micro, verdict
from fxopt.ir.contract import Verdict
from fxopt.ir.graph_facts import Facts
from fxopt.ir.ops.attention_providers import reaches_grad
from fxopt.runtime.kernel_cache import KernelCache

FORMAT = "1"  # of what is remembered


@dataclass(frozen=True)
class Contest:
    """Both entrants in rounds in which they took turns, and what is wrong with the kernels; also that there
    are none."""

    kernel: Samples
    host: Samples
    problems: tuple[str, ...] = ()


class Arena(Protocol):
    """What measures. `device` names it for the keys of what is remembered."""

    device: str

    def contest(self, call: LoneCall, options: Mapping[str, Any], seconds: float) -> Contest:
        """
        Args:
            options: of fxopt. seconds: for which the kernels' configurations may be measured.

        Raises:
            CannotMeasure: of anything.
        """


@dataclass
class Referee:
    """Says of calls whether their kernels win.

    Attributes:
        options: of the compilation that asks, less those that say when kernels are used.
    """

    cache: KernelCache
    arena: Arena
    options: Mapping[str, Any]
    budget: Budget
    shown: bool = field(default_factory=lambda: Console(stderr=True).is_terminal)

    def __call__(self, node: fx.Node, facts: Facts) -> Verdict:
        learned: Callable[[fx.Node], bool] = reaches_grad if facts.differentiates(node) else lambda _: False
        call = lone_call(node, learned)
        key = self._key(call)
        found = self.cache.recall(*key)
        if found is None:
            if not self.budget.is_left:
                return Verdict.no(f"not measured: {self.budget.spent}")
            try:
                found = self._measured(call)
            except CannotMeasure as error:
                return Verdict.no(f"not measured: {error}")
            self.cache.remember(found, *key)
        return Verdict(found["wins"], f"measured on {self.arena.device}: {found['why']}")

    def _key(self, call: LoneCall) -> tuple[str, ...]:
        asked = repr((call, sorted(self.options.items())))
        digest = hashlib.sha256(asked.encode()).hexdigest()
        return ("contest", FORMAT, digest, self.arena.device, *versions())

    def _measured(self, call: LoneCall) -> dict[str, Any]:
        console = Console(stderr=True, quiet=not self.shown)
        with console.status(f"measuring the kernel of {call.op} {list(call.examples[0].shape)}"):
            found = self.arena.contest(call, self.options, self.budget.left)
        if found.problems:
            return {"wins": False, "why": f"it is not used: {found.problems[0]}"}
        said = verdict(found.kernel, found.host)
        ours, host = (micro(one.error or one.median) for one in (found.kernel, found.host))
        why = f"{ours} in the kernel, {host} without"
        return {"wins": said == "faster", "why": why if said == "faster" else f"{why}, {said}"}
