"""Writes into a part of a tensor that the passes made functional come back where that is still wanted.

A host that runs op by op would otherwise copy the whole tensor for each of them. A write comes back where its
tensor was made in the graph, and nobody misses what was there before.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import fx
from torch._ops import OpOverload

from fxopt.frontend.dead_code import erase_unused
from fxopt.ir import facts
from fxopt.ir.cone import reads
from fxopt.ir.facts import is_call, val
from fxopt.ir.propagate import evaluate, fake_mode_of, propagate_from
from fxopt.ir.views import base_of, views_of
from fxopt.ir.writes import PURE, SCATTERS, STANDS_FOR_WRITE, is_replaced, part_of

aten = torch.ops.aten

IN_PLACE: dict[OpOverload, OpOverload] = {
    **{pure: write for write, pure in PURE.items()},
    aten.fill.Scalar: aten.fill_.Scalar,
}


def restore_writes(gm: fx.GraphModule) -> None:
    """Write in place what marked nodes would return in a new tensor."""
    marked = [node for node in gm.graph.nodes if node.meta.get(STANDS_FOR_WRITE)]
    inner = {step for node in marked for step in part_of(node)[0][1:]}
    for node in marked:
        if node not in inner and _may_write(node):
            _write(node)
    if marked:
        gm.recompile()


def _write_of(scatter: fx.Node) -> OpOverload | None:
    """The write whose result `scatter` takes as its part."""
    part: Any = scatter.args[1]
    if not is_call(part, *IN_PLACE) or len(part.users) > 1 or not is_replaced(part.args[0], scatter):
        return None
    return IN_PLACE[part.target]


def _may_write(node: fx.Node) -> bool:
    """The tensor was made in the graph, and nobody who reads it would miss what it was."""
    base = base_of(node.args[0])  # type: ignore[arg-type]
    if base.op != "call_function":
        return False
    shared, (steps, part) = views_of(base), part_of(node)
    own = {*shared, *steps, *([part] if _write_of(steps[-1]) is not None else [])}
    edges = [(value, user) for value in shared for user in value.users if user not in own]
    if any(node < user for _, user in edges):
        return False
    # Autograd may have kept what is read before the write.
    kept = any(value in reads(user) and not facts.is_write(user) for value, user in edges)
    return not (kept and facts.is_floating(base) and facts.may_train(node.graph))


def _write(node: fx.Node) -> None:
    graph, mode = node.graph, fake_mode_of(node.graph)
    base: fx.Node = node.args[0]  # type: ignore[assignment]
    steps, part = part_of(node)

    def call(op: OpOverload, *args: Any, **kwargs: Any) -> fx.Node:
        made = graph.call_function(op, args, kwargs)
        made.meta |= {key: value for key, value in node.meta.items() if key not in ("val", STANDS_FOR_WRITE)}
        return made

    with graph.inserting_before(node):
        view = base
        for scatter in steps:
            view = call(SCATTERS[scatter.target], view, *scatter.args[2:], **scatter.kwargs)  # type: ignore[index]
            view.meta["val"] = evaluate(view, mode) if mode is not None else None
        write = _write_of(steps[-1])
        if write is not None:
            result = call(write, view, *part.args[1:], **part.kwargs)
        else:
            while is_call(part, aten.clone.default, aten.expand_as.default) and len(part.users) == 1:
                part = part.args[0]  # type: ignore[assignment]
            result = call(aten.copy_.default, view, part)
        result.meta["val"] = val(view)
    node.replace_all_uses_with(base)
    if mode is not None:
        propagate_from(base, val(node), mode, lambda changed, value: None)
    erase_unused([node])
