"""Architectures of transformers, inference and training: the Hugging Face suite."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import replace
from typing import Any

from fxopt.commands.targets import Request, resolve
from fxopt.measure.full_models import FULL
from fxopt.measure.jobs import Job
from fxopt.measure.results import Row
from fxopt.measure.suite import NAMED, SUITE, UNTRAINED, Case, cases, expanded, measure, suite_of
from fxopt.suites.plan import Plan, megabytes, milliseconds, over

TITLE = "time of inductor / time of fxopt: more than 1 means that fxopt is faster"
COLUMNS: dict[str, Callable[[Row], str]] = {
    "inductor ms": milliseconds("inductor"),
    "fxopt ms": milliseconds("fxopt"),
    "over eager": over("eager"),
    "cold s": lambda row: _pair(row, "first_call"),
    "warm s": lambda row: _pair(row, "warm"),
    "MB": megabytes,
    "graphs/breaks/again": lambda row: "/".join(map(str, row["dynamo"]["fxopt"].values())),
    "right": lambda row: {None: "-", True: "yes", False: "NO"}[row.get("dashboard")],
    "sites": lambda row: str(sum(row["sites"].values())),
}


def jobs(plan: Plan) -> list[Job]:
    """One for each architecture and phase."""
    plan = replace(plan, models=expanded(plan.models))
    own = tuple(FULL if plan.size == "full" else suite_of(plan.size))
    names = plan.targets(own, names={name: kind for name, (kind, _) in NAMED.items()})
    found = cases(names, infer=plan.infer, train=plan.train, size=plan.size)
    todo = [case for case in found if not case.training or _is_trained(plan, case)]
    return [
        Job({"model": case.model, "phase": case.phase}, functools.partial(_one, plan, case)) for case in todo
    ]


def _is_trained(plan: Plan, case: Case) -> bool:
    """Without a choice of models or phases, the size that is quick trains some of the first architectures."""
    if case.model in FULL:
        return FULL[case.model].trained
    if plan.size != "tiny" or plan.models or not plan.infer:
        return True
    return case.model in SUITE and case.model not in UNTRAINED


def _one(plan: Plan, case: Case) -> Row:
    subject = resolve(case.target, _request(plan, case), **case.overrides)
    more: dict[str, Any] = {"check": plan.check, "tuned": plan.tuned, "mode": plan.mode}
    more["cold"] = plan.cold or not case.training
    more |= {"budget_seconds": plan.budget, "block_seconds": plan.block}
    found = measure(case, subject, plan.options, **more)
    return {name: value for name, value in found.items() if name not in ("model", "phase")}


def _request(plan: Plan, case: Case) -> Request:
    """Inference has the layers of the size. A step of training compiles for as long as two of them: one layer
    is enough at the size that is quick."""
    layers = 1 if plan.size == "tiny" and case.training else None
    return plan.request(training=case.training, layers=layers)


def _pair(row: Row, name: str) -> str:
    seconds = row.get(name, {})
    return " → ".join(f"{seconds[each]:.1f}" for each in ("inductor", "fxopt") if each in seconds) or "-"
