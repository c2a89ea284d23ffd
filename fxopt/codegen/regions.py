"""Regions: the parts of a graph after autograd that one kernel computes.

A region grows over the edges between operators that can be emitted, those that save the most memory traffic
first, as long as it stays convex (no path leaves it and comes back), crosses no barrier (a write, a
collective, random numbers) and is still one loop nest, which is tried by making it. Views belong to no
region: they are index arithmetic.
"""

from __future__ import annotations

import bisect
import contextlib
import itertools
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace

import networkx as nx
import torch
from torch import fx
from torch._ops import OpOverload

from fxopt.codegen.beside import NEAR, Joined, SmallLoop, joined, small_loop
from fxopt.codegen.gather import is_gather
from fxopt.codegen.loops import is_moment
from fxopt.codegen.product_operands import in_kernel
from fxopt.codegen.recompute import Recomputation
from fxopt.codegen.region import Region, body_of, can_emit, outputs_of
from fxopt.codegen.trace import CannotEmit
from fxopt.codegen.view_index import is_view, view_base
from fxopt.ir.cost import bytes_of, tensors_of
from fxopt.ir.facts import argument

MAX_MEMBERS = 96
_COLLECTIVES = ("_c10d_functional", "_c10d_functional_autograd", "c10d", "c10d_functional")

Edge = tuple[fx.Node, fx.Node]


@dataclass
class Partition:
    """The regions of a graph, in order, and why groups were not joined further: (node, reason)."""

    regions: list[Region] = field(default_factory=list)
    refused: list[tuple[fx.Node, str]] = field(default_factory=list)


def partition(graph: fx.Graph, devices: frozenset[str] = frozenset({"cuda"})) -> Partition:
    """The regions of `graph` whose tensors are on one of `devices`. The same graph gives the same regions."""
    return _Grower(graph, devices).grow()


def is_barrier(node: fx.Node) -> bool:
    """Whether nothing may be moved across `node`: it writes, communicates, or draws random numbers."""
    if not isinstance(node.target, OpOverload):
        return False
    if node.target.namespace in _COLLECTIVES or node.target._schema.is_mutable:
        return True
    return torch.Tag.nondeterministic_seeded in node.target.tags and not _drops_nothing(node)


def _drops_nothing(node: fx.Node) -> bool:
    """Whether `node` is an attention without dropout, which draws no numbers whatever its tags say."""
    assert isinstance(node.target, OpOverload)
    names = {one.name for one in node.target._schema.arguments}
    return "dropout_p" in names and argument(node, "dropout_p") == 0


class _Grower:
    def __init__(self, graph: fx.Graph, devices: frozenset[str]) -> None:
        self.order = {node: position for position, node in enumerate(graph.nodes)}
        self.epoch: dict[fx.Node, int] = {}
        for node in graph.nodes:
            before = self.epoch.get(node.prev, 0)
            self.epoch[node] = before + is_barrier(node)
        self.members = [node for node in graph.nodes if can_emit(node, devices)]
        self.group = {node: self.order[node] for node in self.members}
        self.groups = {self.order[node]: [node] for node in self.members}
        self.refused: list[tuple[fx.Node, str]] = []
        self.reasons: dict[Edge, str] = {}
        self.beside: dict[int, Joined] = {}
        self._tried: dict[Edge, tuple[int, int, int, int]] = {}
        self._gaps: list[int] | None = None  # ends of groups behind which no group has begun before
        self.paths = self._paths(graph)
        for node in self.members:
            if is_moment(node):
                self._join(self.group[node.args[0]], self.group[node])

    def _paths(self, graph: fx.Graph) -> nx.DiGraph:
        """Who reads whom, through views of members, as groups will be joined in it."""
        paths = nx.DiGraph()
        for node in graph.nodes:
            for arg in node.all_input_nodes:
                base = view_base(arg)
                inside = base in self.group
                if not (inside and is_view(node)):
                    paths.add_edge(self.order[base if inside else arg], self.order[node])
        return paths

    def grow(self) -> Partition:
        """Join until nothing can be joined, first what only one group reads: it leaves no result behind.

        What follows a product belongs to it before what is in front of it does, which programs compute again.
        """
        every = self._edges()
        edges = [pair for pair in every if not is_gather(pair[0])]
        behind = [pair for pair in edges if not in_kernel(pair[1])]
        loops = [pair for pair in behind if not in_kernel(pair[0])]
        self._join_all(behind, loops)
        siblings = self._siblings()
        self._join_siblings(pair for pair in siblings if all(map(in_kernel, pair)))
        self._join_all(edges, edges)
        # Last what looks up its places: a product takes a norm that is in front of it, but no gather.
        self._join_all(every, every)
        self._join_siblings(siblings)
        self._join_beside()
        found = list(self._regions())
        apart = [pair for pair in every if self.group[pair[0]] != self.group[pair[1]]]
        refused = [(pair[1], f"not joined with {pair[0].name}: {self.reasons[pair]}") for pair in apart]
        return Partition(found, self.refused + refused)

    def _join_all(self, only_readers: Sequence[Edge], others: Sequence[Edge]) -> None:
        while self._join_some(only_readers, only_reader=True) or self._join_some(others, only_reader=False):
            pass

    def _join_siblings(self, pairs: Iterable[Edge]) -> None:
        for pair in pairs:
            if not self._ordered(*pair):
                self._try(pair, only_reader=False)

    def _join_beside(self) -> None:
        """Small kernels of one loop, of which none needs another."""
        alike: dict[tuple[SmallLoop, int], list[int]] = {}
        for key, members in sorted(self.groups.items()):
            with contextlib.suppress(CannotEmit):
                if loop := small_loop(members):
                    alike.setdefault((loop, self.epoch[members[0]]), []).append(key)
        for keys in alike.values():
            kept: list[int] = []
            for key in keys:
                if not any(self._try_beside(one, key) for one in kept[-NEAR:]):
                    kept.append(key)

    def _try_beside(self, first: int, second: int) -> bool:
        if self._needs(first, second) or self._needs(second, first):
            return False
        try:
            self._check(first, second)
            apart = self.groups[first], self.groups[second]
            found = joined(*apart, self._joined(first, second), self.beside.get(first))
        except CannotEmit:
            return False
        if found is not None:
            self.beside[first] = found
            self._join(first, second)
        return found is not None

    def _join_some(self, edges: Iterable[Edge], *, only_reader: bool) -> bool:
        """All joins of results that nobody else reads, or the first of the others."""
        joined = False
        for pair in edges:
            if self._try(pair, only_reader):
                joined = True
                if not only_reader:
                    break
        return joined

    def _edges(self) -> list[Edge]:
        """Pairs of operators, one of which reads the other, largest values first."""
        found: dict[Edge, int] = {}
        for consumer in self.members:
            for arg in consumer.all_input_nodes:
                base = view_base(arg)
                if base in self.group:
                    found[(base, consumer)] = sum(map(bytes_of, tensors_of(base)))

        def rank(pair: Edge) -> tuple[bool, int, int, int]:
            return (not in_kernel(pair[0]), -found[pair], self.order[pair[0]], self.order[pair[1]])

        return sorted(found, key=rank)

    def _siblings(self) -> list[Edge]:
        """Pairs of operators that read the same tensor, the largest first."""
        readers: dict[fx.Node, dict[fx.Node, None]] = {}
        for consumer in self.members:
            for arg in consumer.all_input_nodes:
                readers.setdefault(view_base(arg), {})[consumer] = None
        large = sorted(readers, key=lambda read: (-sum(map(bytes_of, tensors_of(read))), self.order[read]))
        pairs = [pair for read in large for pair in itertools.pairwise(readers[read])]
        return list(dict.fromkeys(pairs))

    def _ordered(self, first: fx.Node, second: fx.Node) -> bool:
        """Whether the group of one needs that of the other, on any way."""
        a, b = self.group[first], self.group[second]
        return a == b or self._needs(a, b) or self._needs(b, a)

    def _needs(self, first: int, second: int) -> bool:
        return self.paths.has_edge(first, second) or self._path_outside(first, second)

    def _try(self, pair: Edge, only_reader: bool) -> bool:
        """Join the groups of a pair; what was refused once is refused until one of them has grown."""
        first, second = self.group[pair[0]], self.group[pair[1]]
        tried = (first, second, len(self.groups[first]), len(self.groups[second]))
        if first == second or self._tried.get(pair) == tried:
            return False
        members = self._joined(first, second)
        if only_reader and not set(self.groups[first]).isdisjoint(outputs_of(members)):
            return False
        try:
            self._check(first, second)
            body_of(members, outputs_of(members))
        except CannotEmit as refusal:
            self._tried[pair], self.reasons[pair] = tried, refusal.reason
            return False
        self._join(first, second)
        return True

    def _joined(self, first: int, second: int) -> list[fx.Node]:
        return sorted(self.groups[first] + self.groups[second], key=self.order.__getitem__)

    def _check(self, first: int, second: int) -> None:
        members = self.groups[first] + self.groups[second]
        if len({self.epoch[node] for node in members}) > 1:
            raise CannotEmit("a write, a collective or random numbers lie between them")
        if len({tensors_of(node)[0].device for node in members}) > 1:
            raise CannotEmit("they are on different devices")
        if len(members) > MAX_MEMBERS:
            raise CannotEmit(f"wanted at most {MAX_MEMBERS} operators in one kernel, saw {len(members)}")
        if self._path_outside(first, second):
            raise CannotEmit("what is computed between them reads the one and is read by the other")

    def _path_outside(self, first: int, second: int) -> bool:
        """Whether something that is in neither group lies on a path from the first to the second."""
        last = self._end(max(self.order[node] for node in self.groups[second]))
        todo = [key for key in self.paths.successors(first) if key != second] if first in self.paths else []
        seen: set[int] = set(todo)
        while todo:
            key = todo.pop()
            for after in self.paths.successors(key):
                if after == second:
                    return True
                if after not in seen and after <= last:
                    seen.add(after)
                    todo.append(after)
        return False

    def _end(self, place: int) -> int:
        """Behind which no path leads back to `place`: it would need a group with operators on both sides."""
        if self._gaps is None:
            spans = sorted((key, self.order[members[-1]]) for key, members in self.groups.items())
            ends = itertools.accumulate((end for _, end in spans), max)
            starts = itertools.chain((key for key, _ in spans[1:]), (len(self.order),))
            self._gaps = [end for end, start in zip(ends, starts, strict=True) if end < start]
        at = bisect.bisect_left(self._gaps, place)
        return self._gaps[at]

    def _join(self, first: int, second: int) -> None:
        """Into the group with the lower key: a group's key is the place of its first operator."""
        self._gaps = None
        low, high = sorted((first, second))
        self.groups[low] = self._joined(first, second)
        for node in self.groups.pop(high):
            self.group[node] = low
        if high not in self.paths:
            return
        before, after = list(self.paths.predecessors(high)), list(self.paths.successors(high))
        self.paths.remove_node(high)
        self.paths.add_edges_from((key, low) for key in before if key != low)
        self.paths.add_edges_from((low, key) for key in after if key != low)

    def _regions(self) -> Iterator[Region]:
        """Those of the groups that are worth a kernel, with what each computes again of others."""
        found = Recomputation(self.groups, self.order, self.epoch)
        found.improve()
        for key, members in sorted(self.groups.items()):
            try:
                region = found.region(key)
            except CannotEmit as refusal:
                self.refused.append((members[0], refusal.reason))
                continue
            if region is not None:
                why = str(self.beside[key]) if key in self.beside else ""
                yield replace(region, why_beside=why) if why else region
