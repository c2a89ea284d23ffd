"""Whether two nodes compute the same. Writes between them are the caller's to rule out."""

from __future__ import annotations

from typing import Any

import torch
from torch import fx

from fxopt.ir import facts

DEPTH = 12
# It writes no entry; traces of literals have it.
DETACH = torch.ops.aten.detach_.default


def same_value(a: Any, b: Any, depth: int = DEPTH) -> bool:
    """The same argument, or the result of the same calls of the same arguments."""
    if a is b:
        return True
    if not isinstance(a, fx.Node) or not isinstance(b, fx.Node):
        return type(a) is type(b) and _same_plain(a, b, depth)
    if a.op == b.op == "get_attr":
        return _same_attribute(a, b)
    if depth == 0 or a.op != "call_function" or a.target is not b.target:
        return False
    if facts.is_opaque(a) or (facts.is_write(a) and a.target is not DETACH):
        return False
    random = torch.Tag.nondeterministic_seeded in getattr(a.target, "tags", ())
    return not random and same_value((a.args, a.kwargs), (b.args, b.kwargs), depth - 1)


def _same_plain(a: Any, b: Any, depth: int) -> bool:
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same_value(a[name], b[name], depth) for name in a)
    if isinstance(a, (tuple, list)):
        return len(a) == len(b) and all(same_value(x, y, depth) for x, y in zip(a, b, strict=True))
    return bool(a == b)


def _same_attribute(a: fx.Node, b: fx.Node) -> bool:
    """One attribute of the module, or two literals of one value."""
    held = [getattr(node.graph.owning_module, str(node.target), None) for node in (a, b)]
    if held[0] is held[1]:
        return True
    literals = all(type(each) is torch.Tensor and each.dim() == 0 for each in held)
    return literals and held[0].dtype == held[1].dtype and bool(torch.equal(*held))  # type: ignore[union-attr, arg-type]
