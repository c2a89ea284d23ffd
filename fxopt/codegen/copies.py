"""Operators that several kernels compute: each gets its own in the graph, and takes their place."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import replace

from torch import fx

from fxopt.codegen.region import Region
from fxopt.codegen.view_index import is_view, view_base


def with_copies(regions: Iterable[Region], used: Sequence[Region]) -> dict[tuple[fx.Node, ...], Region]:
    """The regions, by their members, as they are when all that they compute are operators of their own.

    Copies are put into the graph for those that are `used`. One that the host computes needs them only where
    a kernel no longer writes what it has read before.
    """
    regions = list(regions)
    called = {node for region in used for node in region.members}
    kernels = {region.members for region in used}
    # All copies are made before any operator reads one: they are copies of what the graph was.
    copies = {
        region.members: _Copies(region.again)
        for region in regions
        if region.again and (region.members in kernels or not called.isdisjoint(region.again))
    }
    return {one.members: _with(one, copies[one.members]) if one.members in copies else one for one in regions}


def erase_unread(graph: fx.Graph, nodes: Iterable[fx.Node]) -> None:
    """Erase those of `nodes`, and views of them, that only copies were made for: nothing reads them."""
    own = frozenset(nodes)
    for node in reversed(graph.nodes):
        if not node.users and (node in own or (is_view(node) and view_base(node) in own)):
            graph.erase_node(node)


def _with(region: Region, own: _Copies) -> Region:
    for node in region.members:
        own.rewire(node)
    return replace(region, members=(*own.copies, *region.members), again=())


class _Copies:
    """Copies of operators, and of the views between them, each behind its original."""

    def __init__(self, again: tuple[fx.Node, ...]) -> None:
        self.made: dict[fx.Node, fx.Node] = {}
        self.again = frozenset(again)
        self.copies = [self._copy(node) for node in again]

    def _copy(self, node: fx.Node) -> fx.Node:
        if node not in self.made:
            with node.graph.inserting_after(node):
                self.made[node] = node.graph.node_copy(node)
            self.rewire(self.made[node])
        return self.made[node]

    def rewire(self, node: fx.Node) -> None:
        """Let a node read the copies."""
        for arg in node.all_input_nodes:
            if arg in self.again or (is_view(arg) and view_base(arg) in self.again):
                node.replace_input_with(arg, self._copy(arg))
