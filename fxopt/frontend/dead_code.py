"""What becomes useless when a node goes."""

from __future__ import annotations

from collections.abc import Iterable

from torch import fx
from torch._ops import OpOverload

from fxopt.ir.facts import is_opaque, is_write


def has_effect(node: fx.Node) -> bool:
    """Writes and calls that are no ATen op. A random op has none: what replaced it draws its own numbers."""
    return is_write(node) or is_opaque(node) or (node.is_impure() and not isinstance(node.target, OpOverload))


def dead_cone(roots: tuple[fx.Node, ...], kept: frozenset[fx.Node] = frozenset()) -> list[fx.Node]:
    """What only serves `roots`, users first. Impure nodes, inputs and `kept` are never dead."""
    dead: dict[fx.Node, None] = {}
    pending = list(reversed(roots))
    while pending:
        node = pending.pop()
        if node in dead or node in kept or node.op in ("placeholder", "output"):
            continue
        # A pass that names a write as a root answers for it; no other effect may disappear.
        if has_effect(node) and node not in roots:
            continue
        alive = [user for user in node.users if user not in dead]
        if all(_is_unread(user) and user not in kept for user in alive):
            # Such as the indices that come with a maximum.
            dead |= dict.fromkeys(alive)
            dead[node] = None
            pending += node.all_input_nodes
    return list(dead)


def _is_unread(node: fx.Node) -> bool:
    """Nobody reads it, and nobody would miss it."""
    return node.op == "call_function" and not node.users and not has_effect(node)


def erase_unused(nodes: Iterable[fx.Node]) -> None:
    """Erase those of `nodes` that nobody reads, and what only served them. Effects stay."""
    unused = tuple(node for node in nodes if not node.users and not has_effect(node))
    for node in dead_cone(unused):
        node.graph.erase_node(node)
