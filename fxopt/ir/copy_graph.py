"""Graphs as they were."""

from __future__ import annotations

from torch import fx


def copy_of(graph: fx.Graph) -> fx.Graph:
    """The same nodes in a graph of their own."""
    copy = fx.Graph()
    copy.output(copy.graph_copy(graph, {}))
    return copy
