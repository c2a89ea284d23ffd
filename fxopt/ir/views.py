"""Which nodes give views of one tensor: the one that owns the memory, and what shares it."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from torch import fx

from fxopt.ir import facts
from fxopt.ir.facts import val
from fxopt.ir.propagate import storage_of
from fxopt.ir.same_value import DETACH


def viewed(node: fx.Node) -> fx.Node | None:
    """The tensor whose memory a call gives another view of; None where it has its own."""
    source: Any = node.args[0] if node.op == "call_function" and node.args else None
    if not facts.is_tensor(source) or not facts.is_tensor(node):
        return None
    return source if storage_of(val(source)) == storage_of(val(node)) else None


def views_up(view: fx.Node) -> Iterator[fx.Node]:
    """`view`, what it is a view of, and so on to the tensor that owns the memory."""
    node: fx.Node | None = view
    while node is not None:
        yield node
        node = viewed(node)


def base_of(view: fx.Node) -> fx.Node:
    """The tensor that owns the memory of a view."""
    return list(views_up(view))[-1]


def views_of(base: fx.Node) -> list[fx.Node]:
    """`base` and all views of it, in graph order."""
    found = {base: None}
    pending = [base]
    while pending:
        new = [user for user in pending.pop().users if user not in found and viewed(user) in found]
        found |= dict.fromkeys(new)
        pending += new
    return sorted(found)


def is_written(node: fx.Node) -> bool:
    """Somebody writes to a tensor, by the way of any view of its memory."""
    users = [user for view in views_of(base_of(node)) for user in view.users]
    return any(facts.is_write(user) and user.target is not DETACH for user in users)
