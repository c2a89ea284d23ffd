"""What must hold of a graph after every pass. A violation is a fault of the pass, never of the user."""

from __future__ import annotations

import torch
from torch import fx

from fxopt.ir.facts import is_opaque, same_shape
from fxopt.ir.propagate import describe


class Violation(Exception):  # noqa: N818 - reported as evidence with status error
    """A graph that a pass left in a state in which it must not be."""


def check_graph(graph: fx.Graph) -> None:
    """Well-formed, every call has a value, arguments are defined before they are used."""
    graph.lint()
    for node in graph.nodes:
        if node.op == "call_function" and "val" not in node.meta and not _needs_no_value(node):
            raise Violation(f"{node.format_node()} has no value")


def _needs_no_value(node: fx.Node) -> bool:
    return is_opaque(node) or not node.users


def check_replacement(old: fx.Node, new: fx.Node) -> None:
    """The replacement has the shape, dtype and device of what it replaces. Strides may differ."""
    before, after = old.meta.get("val"), new.meta.get("val")
    if not isinstance(before, torch.Tensor) or not isinstance(after, torch.Tensor):
        if type(before) is not type(after):
            raise Violation(f"{new.name} is {describe(after)}, replaced {describe(before)}")
        return
    if (
        before.dtype != after.dtype
        or before.device != after.device
        or not same_shape(before.shape, after.shape)
    ):
        raise Violation(f"{new.name} is {describe(after)}, replaced {describe(before)}")
