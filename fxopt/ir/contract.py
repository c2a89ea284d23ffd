"""The contract between a rewrite and the driver: what a pass is asked, and what it answers.

A pass answers four questions and does nothing else. Timing, dumping, rewiring, metadata, verification, fuel
and evidence are the driver's. The invariant that every pass keeps: **the graph computes the same values, in
the same dtypes, with the same writes in the same order, before and after**.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import Enum
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, ClassVar, Protocol, runtime_checkable

from torch import fx
from torch._ops import OpOverload

if TYPE_CHECKING:
    from fxopt.ir.graph_facts import Facts
    from fxopt.options import Options


class Status(str, Enum):
    """What happened at one anchor."""

    APPLIED = "applied"
    MISS = "miss"
    ILLEGAL = "illegal"
    UNPROFITABLE = "unprofitable"
    DISABLED = "disabled"
    OUT_OF_FUEL = "out_of_fuel"
    ERROR = "error"


@dataclass(frozen=True)
class Miss:
    """The anchor is not an instance of what the pass rewrites. `wanted` and `saw` make the reason."""

    wanted: str
    saw: str

    @property
    def reason(self) -> str:
        return f"wanted {self.wanted}, saw {self.saw}"


@dataclass(frozen=True)
class Match:
    """An instance of what the pass rewrites.

    `anchor` is the node that the search started from; `roots` are the nodes whose values the replacement
    computes (their users are rewired), in graph order; `values` is what the pass has learnt, by name;
    `outside` are the values of an enclosing graph that the replacement reads. The driver makes inputs of the
    sub-graph of them, which `cone.inside` finds. `since` is a write that the replacement is in the place of:
    who reads the roots before it goes on to do so.
    """

    anchor: fx.Node
    roots: tuple[fx.Node, ...]
    values: Mapping[str, Any] = field(default_factory=lambda: MappingProxyType({}))
    outside: tuple[fx.Node, ...] = ()
    since: fx.Node | None = None

    def readers(self, root: fx.Node) -> list[fx.Node]:
        """Those users of a root that are to read its replacement."""
        return [user for user in root.users if self.since is None or self.since < user]

    def __getitem__(self, name: str) -> Any:
        return self.values[name]


@dataclass(frozen=True)
class Verdict:
    """Yes or no, with the reason. Truthy when the answer is yes."""

    ok: bool
    reason: str = ""

    def __bool__(self) -> bool:
        return self.ok

    @staticmethod
    def yes(reason: str = "") -> Verdict:
        return Verdict(True, reason)

    @staticmethod
    def no(reason: str) -> Verdict:
        return Verdict(False, reason)


@dataclass(frozen=True)
class Cost:
    """Predicted cost of a piece of graph: bytes moved, floating-point operations, kernel launches.

    The numbers are integers for static shapes and the hint's value for symbolic ones.
    """

    bytes: int = 0
    flops: int = 0
    launches: int = 0

    def __str__(self) -> str:
        return f"{self.bytes} B, {self.flops} flop, {self.launches} launches"


@dataclass(frozen=True)
class Evidence:
    """What one pass did, or did not do, at one anchor."""

    rewrite: str
    anchor: str
    location: str
    status: Status
    reason: str
    detail: str = ""
    before: Cost | None = None
    after: Cost | None = None


@dataclass(frozen=True)
class Context:
    """What `legal` and `profit` may look at besides the match itself."""

    graph: fx.Graph
    facts: Facts
    options: Options


@runtime_checkable
class Rewrite(Protocol):
    """A rewrite: a frozen dataclass whose fields are its options."""

    name: ClassVar[str]
    after: ClassVar[tuple[str, ...]]

    @property
    def anchors(self) -> tuple[OpOverload, ...]:
        """The ops that a search starts from. Passes on ATen ops alone declare it as a class variable."""

    def match(self, node: fx.Node) -> Match | Miss | None:
        """Structure only; pure. None when the node is no candidate at all (it leaves no evidence)."""

    def legal(self, match: Match, ctx: Context) -> Verdict:
        """Dtype, shape, strides, aliasing, escapes, mutation, grad, device."""

    def profit(self, match: Match, ctx: Context) -> Verdict:
        """Whether it pays; the numbers belong in the reason. The reason of a yes is kept as evidence."""

    def replace(self, match: Match, graph: fx.Graph) -> fx.Node | tuple[fx.Node, ...]:
        """Insert the replacement of `match.roots`, at the graph's insertion point, one node per root."""
