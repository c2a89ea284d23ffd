"""The edit that turns one concatenation into an append."""

from __future__ import annotations

from typing import Any

import torch
from torch import fx
from torch._subclasses import FakeTensorMode

from fxopt.ir.facts import argument, val
from fxopt.ir.graph_facts import Facts
from fxopt.ir.propagate import evaluate, fake_mode_of, propagate_from

aten = torch.ops.aten
_END = 2**63 - 1


def append_instead(past: fx.Node, cat: fx.Node, dim: int, rows: fx.Node | int) -> str | None:
    """Make the input `past` one with room for the rows that `cat` puts behind it.

    Returns what stands against it, if anything does.

    Outputs that are `cat` stay, and are for the caller to take care of.

    Args:
        rows: how many rows along `dim` the input had.
    """
    edit = _Edit(past, cat, rows)
    try:
        edit.apply(dim)
    except Exception as error:
        edit.undo()
        first = " ".join(str(error).splitlines()[:1])
        return f"wanted readers that take rows of other strides, saw {type(error).__name__}: {first}"
    return None


class _Edit:
    """One concatenation turned into an append, and the way back."""

    def __init__(self, past: fx.Node, cat: fx.Node, rows: fx.Node | int) -> None:
        self.graph, self.past, self.cat, self.rows = past.graph, past, cat, rows
        self.readers = [user for user in past.users if user is not cat]
        self.users = [user for user in cat.users if user.op != "output"]
        self.made: list[fx.Node] = []
        self.values: dict[fx.Node, Any] = {}
        self.mode = fake_mode_of(past.graph)

    def apply(self, dim: int) -> None:
        """Raises: what an op raises that cannot take the strides of the buffer."""
        past, cat, new = self.past, self.cat, argument(self.cat, "tensors")[1]
        before, joined = val(past), val(cat)
        assert self.mode is not None
        self.values[past] = before
        past.meta["val"] = past.meta["example_value"] = rows_outermost(joined, dim, self.mode)
        if self.readers:
            with self.graph.inserting_before(min(self.readers)):
                old = self._call(aten.slice.Tensor, past, dim, 0, self.rows)
            for reader in self.readers:
                reader.replace_input_with(past, old)
        with self.graph.inserting_before(cat):
            room = self._call(aten.slice.Tensor, past, dim, self.rows, _END)
            self._call(aten.copy_.default, room, new)
        for user in self.users:
            user.replace_input_with(cat, past)
        self._propagate(past, joined)
        if self.readers:
            self._propagate(self.made[0], before)

    def _propagate(self, start: fx.Node, replaced: torch.Tensor) -> None:
        assert self.mode is not None
        found = Facts(self.graph)
        propagate_from(
            start, replaced, self.mode, self.values.setdefault, lambda node: found.mode_at(node)[1]
        )

    def undo(self) -> None:
        """Have the graph as it was."""
        for node, value in self.values.items():
            node.meta["val"] = value
        self.past.meta["example_value"] = self.past.meta["val"]
        for user in self.users:
            user.replace_input_with(self.past, self.cat)
        for reader in self.readers:
            reader.replace_input_with(self.made[0], self.past)
        for node in reversed(self.made):
            self.graph.erase_node(node)

    def _call(self, target: Any, *args: Any) -> fx.Node:
        node = self.graph.call_function(target, args)
        assert self.mode is not None
        node.meta["val"] = evaluate(node, self.mode)
        self.made.append(node)
        return node


def rows_outermost(like: torch.Tensor, dim: int, mode: FakeTensorMode) -> torch.Tensor:
    """A fake of the form of `like`, with `dim` outermost in memory and the others in their order."""
    order = [dim, *(each for each in range(like.dim()) if each != dim)]
    inverse = [order.index(each) for each in range(like.dim())]
    with mode:
        memory = torch.empty([like.shape[each] for each in order], dtype=like.dtype, device=like.device)
        return memory.permute(inverse)
