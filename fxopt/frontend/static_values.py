"""What of a graph depends on nothing but the tensors that a module holds: it is the same in every call."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import fx
from torch._ops import OpOverload
from torch._subclasses import FakeTensor

from fxopt.ir.facts import is_tensor, is_write
from fxopt.ir.graph_facts import Facts


class StaticValues:
    """The static nodes of a normalized graph, and their values."""

    def __init__(self, gm: fx.GraphModule, inputs: Sequence[Any]) -> None:
        self._gm = gm
        self._inputs = inputs
        placeholders = gm.graph.find_nodes(op="placeholder")
        self._places = {node: place for place, node in enumerate(placeholders[: len(inputs)])}
        self._static = self._find()

    def __contains__(self, node: fx.Node) -> bool:
        return node in self._static

    def place(self, node: fx.Node) -> int | None:
        """Which input of the graph a node is."""
        return self._places.get(node)

    def tensor(self, node: fx.Node) -> torch.Tensor | None:
        """What a static input is when it is compiled."""
        place = self._places.get(node)
        return None if place is None or node not in self._static else self._inputs[place]

    def origins(self, root: fx.Node) -> list[fx.Node]:
        """The inputs that decide a static node, in the graph's order."""
        return [node for node in self._cone(root) if node.op == "placeholder"]

    def value(self, root: fx.Node) -> torch.Tensor:
        """The value of a static node."""
        if root.op == "placeholder":
            found: torch.Tensor = self._inputs[self._places[root]]
            return found
        result: torch.Tensor = self.run(self.part(root))[root]
        return result

    def run(self, part: list[fx.Node]) -> dict[fx.Node, Any]:
        """The values of nodes that `part` gave. Writes among them are to memory of their own."""
        env: dict[fx.Node, Any] = {}
        with torch.no_grad():
            for node in part:
                if node.op == "placeholder":
                    env[node] = self._inputs[self._places[node]].detach()
                elif node.op == "get_attr":
                    env[node] = getattr(self._gm, str(node.target))
                else:
                    args, kwargs = fx.node.map_arg((node.args, node.kwargs), env.__getitem__)
                    env[node] = node.target(*args, **kwargs)  # type: ignore[operator]
        return env

    def part(self, root: fx.Node) -> list[fx.Node]:
        """What computes a static node, in the graph's order: also what writes to what it reads."""
        return self._cone(root)

    def _cone(self, root: fx.Node) -> list[fx.Node]:
        """All static nodes that `root` reads, and those that write to what it reads before it does."""
        wanted: set[fx.Node] = set()
        pending = [root]
        while pending:
            node = pending.pop()
            if node not in wanted:
                wanted.add(node)
                pending += node.all_input_nodes
                pending += [each for each in self._writers_of(node) if each < root]
        return sorted(wanted)

    def _writers_of(self, node: fx.Node) -> list[fx.Node]:
        return self._writers.get(self._facts.alias_class(node), []) if is_tensor(node) else []

    def _find(self) -> set[fx.Node]:
        """Inputs that modules hold and nobody writes to, and what is computed of nothing else."""
        self._facts = Facts(self._gm.graph)
        self._writers: dict[int | None, list[fx.Node]] = {}
        for node in self._gm.graph.nodes:
            if is_write(node) and is_tensor(node.args[0]):
                self._writers.setdefault(self._facts.alias_class(node.args[0]), []).append(node)
        static: set[fx.Node] = set()
        for node in self._gm.graph.nodes:
            if node.op == "placeholder":
                found = self._is_held(node)
            elif node.op == "get_attr":
                found = isinstance(getattr(self._gm, str(node.target), None), torch.Tensor)
            else:
                found = _is_pure(node) and all(each in static for each in node.all_input_nodes)
            if found:
                static.add(node)
        return self._without_written(static)

    def _without_written(self, static: set[fx.Node]) -> set[fx.Node]:
        """Without values that somebody writes to who is not static, and what is computed of them."""
        unsafe = {
            where
            for where, writers in self._writers.items()
            if any(each not in static for each in writers) or self._is_outside(where)
        }
        kept: set[fx.Node] = set()
        for node in self._gm.graph.nodes:
            own = self._facts.alias_class(node) if is_tensor(node) else None
            if node in static and own not in unsafe and all(each in kept for each in node.all_input_nodes):
                kept.add(node)
        return kept

    def _is_outside(self, where: int | None) -> bool:
        return any(self._facts.alias_class(node) == where for node in self._places)

    def _is_held(self, node: fx.Node) -> bool:
        source = getattr(node, "_dynamo_source", None)
        if "NN_MODULE" not in str(getattr(source, "guard_source", "")):
            return False
        value = self._inputs[self._places[node]] if node in self._places else None
        if not isinstance(value, torch.Tensor) or isinstance(value, FakeTensor) or value.is_meta:
            return False
        trained = value.requires_grad and torch.is_grad_enabled()
        return not torch._C._functorch.is_functorch_wrapped_tensor(value) and not trained


def _is_pure(node: fx.Node) -> bool:
    """A call whose result the same arguments decide."""
    if node.op != "call_function" or not isinstance(node.target, OpOverload):
        return False
    if torch.Tag.nondeterministic_seeded in node.target.tags or not is_tensor(node):
        return False
    return all(isinstance(size, int) for size in node.meta["val"].shape)
