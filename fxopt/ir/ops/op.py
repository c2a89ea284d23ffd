"""What a semantic op is: a plain-torch body that is its meaning, its fake and its fallback, and providers.

A semantic op is declared once. Registered with the dispatcher as a composite op, its body is differentiated
by autograd and traced by AOTAutograd like any other code. A *provider* is another way to compute it (an
ATen op, a kernel) and states what it supports; the chosen one is recorded. The body is the provider of last
resort.

Semantic ops state their dtypes: autocast never acts inside of one.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import fx
from torch._ops import OpOverload

from fxopt.ir.contract import Verdict
from fxopt.ir.graph_facts import Facts

NAMESPACE = "fxopt"


def define_op(
    library: torch.library.Library,
    schema: str,
    body: Callable[..., Any],
    fake: Callable[..., Any],
    dispatch: str = "CompositeExplicitAutograd",
) -> None:
    """Make an op that is no composite known to torch's dispatcher; `schema` begins with its name."""
    name = schema.partition("(")[0]
    library.define(schema)
    library.impl(name, body, dispatch)
    torch.library.register_fake(f"{NAMESPACE}::{name}", fake, lib=library)


@dataclass(frozen=True)
class Provider:
    """One way to compute a semantic op.

    Attributes:
        name: recorded in the evidence.
        supports: says whether it should compute this call, with the condition that decides. Metadata only.
        build: computes the op from its arguments with ops that the host understands.
    """

    name: str
    supports: Callable[[fx.Node, Facts], Verdict]
    build: Callable[..., Any]


@dataclass(frozen=True)
class SemanticOp:
    """A semantic op: name, dispatcher schema (no namespace), body, providers in order of preference."""

    name: str
    schema: str
    body: Callable[..., Any]
    providers: tuple[Provider, ...] = field(default=())

    @property
    def overload(self) -> OpOverload:
        """The registered op. Raises AttributeError before `register`."""
        overload: OpOverload = getattr(getattr(torch.ops, NAMESPACE), self.name).default
        return overload

    def register(self, library: torch.library.Library) -> None:
        library.define(self.name + self.schema)
        library.impl(self.name, without_autocast(self.body), "CompositeImplicitAutograd")

    def choose(self, node: fx.Node, facts: Facts) -> tuple[Provider, list[str]]:
        """The first provider that supports the call, and why the ones before it do not; where kernels are
        measured also why that one does."""
        said: list[str] = []
        for provider in self.providers:
            verdict = provider.supports(node, facts)
            if verdict.reason and (not verdict or facts.measures):
                said.append(f"{provider.name}: {verdict.reason}")
            if verdict:
                return provider, said
        return Provider("body", lambda *_: Verdict.yes(), self.body), said


def is_symbol(number: object) -> bool:
    """Whether a number may change from call to call."""
    return isinstance(number, torch.SymFloat | torch.SymInt)


def without_autocast(body: Callable[..., Any]) -> Callable[..., Any]:
    """`body`, run without the autocast that its caller may be in."""

    @functools.wraps(body)
    def run(*args: Any, **kwargs: Any) -> Any:
        device = next((a.device.type for a in args if isinstance(a, torch.Tensor)), "cpu")
        if not torch.amp.is_autocast_available(device) or not torch.is_autocast_enabled(device):
            return body(*args, **kwargs)
        with torch.autocast(device, enabled=False):
            return body(*args, **kwargs)

    return run
