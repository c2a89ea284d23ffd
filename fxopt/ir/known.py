"""Tensors that are the same in every call: made of sizes and literals alone."""

from __future__ import annotations

from typing import Any

import torch
from torch import fx
from torch._ops import OpOverload

from fxopt.ir.facts import is_write, val
from fxopt.ir.same_value import DETACH

# Larger ones, and longer ways to them, would cost more time than they are worth.
MOST_ELEMENTS = 2**20
MOST_NODES = 200


class _UnknownError(Exception):
    """A value that differs from call to call, or costs too much."""


def known_value(node: fx.Node) -> torch.Tensor | None:
    """The value of a node that depends on no input, computed here; else None."""
    found: dict[fx.Node, Any] = {}
    try:
        with torch.no_grad(), torch.autocast("cpu", enabled=False):
            value = _value(node, found)
    except _UnknownError:
        return None
    return value if isinstance(value, torch.Tensor) else None


def _value(node: fx.Node, found: dict[fx.Node, Any]) -> Any:
    if node in found:
        return found[node]
    held = literal(node)
    if held is not None:
        return held
    if len(found) > MOST_NODES or not _is_plain(node):
        raise _UnknownError
    if node.target is DETACH:
        return _value(node.args[0], found)  # type: ignore[arg-type]
    args, kwargs = fx.map_arg((node.args, node.kwargs), lambda each: _value(each, found))
    found[node] = node.target(*args, **kwargs)  # type: ignore[operator]
    return found[node]


def literal(node: fx.Node) -> torch.Tensor | None:
    """A number that the code names, which a trace holds as an attribute."""
    held = getattr(node.graph.owning_module, str(node.target), None) if node.op == "get_attr" else None
    return held if type(held) is torch.Tensor and held.dim() == 0 and not _is_written(node) else None


def _is_plain(node: fx.Node) -> bool:
    """A call that gives the same tensor each time, of known and moderate size, that nobody writes to."""
    if node.op != "call_function" or not isinstance(node.target, OpOverload) or _writes(node):
        return False
    value = val(node)
    if not isinstance(value, torch.Tensor) or value.device.type != "cpu":
        return False
    if not all(isinstance(size, int) for size in value.shape) or value.numel() > MOST_ELEMENTS:
        return False
    random = torch.Tag.nondeterministic_seeded in node.target.tags
    return not random and not _is_written(node)


def _is_written(node: fx.Node) -> bool:
    """Somebody writes to it, or to a view of it."""
    return any(_writes(user) or (_is_view(user) and _is_written(user)) for user in node.users)


def _writes(node: fx.Node) -> bool:
    return is_write(node) and node.target is not DETACH


def _is_view(node: fx.Node) -> bool:
    if not isinstance(node.target, OpOverload):
        return node.op != "output"
    return any(formal.alias_info is not None for formal in node.target._schema.arguments)
