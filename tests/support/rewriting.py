"""Runs chosen passes over the graph of a function, and keeps what a test of a pass looks at."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import fx

from fxopt.frontend.lower import lower
from fxopt.frontend.normalize import normalize
from fxopt.ir.contract import Evidence, Status
from fxopt.ir.graph_facts import Kernels
from fxopt.ir.ops import register_ops
from fxopt.options import Options
from fxopt.pipeline import load_passes, run_pass
from fxopt.report.record import GraphRecord

from .golden import render


@dataclass
class Rewritten:
    """The outcome: text before and after, evidence of the passes asked for, the compiled function."""

    call: Callable[..., Any]
    before: list[str] = field(default_factory=list)
    after: list[str] = field(default_factory=list)
    evidence: list[Evidence] = field(default_factory=list)
    lowered: list[str] = field(default_factory=list)
    providers: list[str] = field(default_factory=list)
    graphs: int = 0

    def statuses(self, rewrite: str | None = None) -> list[Status]:
        return [e.status for e in self.evidence if rewrite in (None, e.rewrite)]

    def applied(self, rewrite: str | None = None) -> int:
        return self.statuses(rewrite).count(Status.APPLIED)

    def reasons(self, rewrite: str | None = None) -> str:
        return "; ".join(e.reason for e in self.evidence if rewrite in (None, e.rewrite))


def rewriting(
    fn: Callable[..., Any],
    passes: Sequence[str],
    *,
    dynamic: bool | None = False,
    kernels: Kernels | None = None,
) -> Rewritten:
    """Compile `fn` with just `passes`, in the pipeline's order, run op by op.

    `kernels`: what the passes are told that a host makes; none is made.
    """
    register_ops()
    found = Rewritten(call=fn)

    def backend(gm: fx.GraphModule, inputs: Sequence[Any]) -> Callable[..., Any]:
        normal = normalize(gm, inputs)
        found.before.append(render(normal))
        for one in load_passes():
            if one.name in passes:
                found.evidence += run_pass(one, normal, Options(strict=True), kernels)
        found.after.append(render(normal))
        found.graphs += 1
        record = GraphRecord(index=0)
        lowered = lower(normal, record, kernels)
        found.lowered.append(render(lowered))
        found.providers += [str(provider) for provider in record.providers]
        return lowered.forward

    found.call = torch.compile(fn, backend=backend, dynamic=dynamic, fullgraph=True)
    return found
