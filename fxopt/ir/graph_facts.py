"""Questions that need the whole graph: order, aliasing, writes, autocast and grad mode.

Values are the fake tensors that normalization left in ``node.meta["val"]``; two values alias when their
storages do.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx
from torch._ops import HigherOrderOperator, OpOverload

from fxopt.ir.contract import Verdict
from fxopt.ir.facts import drops, is_call, is_opaque, is_tensor, is_write, location, val

aten = torch.ops.aten


@dataclass(frozen=True)
class Kernels:
    """What the host puts kernels in the place of.

    Attributes:
        devices: types of devices on which they run. attention: says of a call of ``fxopt::attention`` whether
            one can take its place. referee: says of a call of a semantic op that a kernel can take the place
            of whether it is faster there; None: all that can are taken. float8: they can write it.
    """

    devices: frozenset[str]
    attention: Callable[[fx.Node, Facts], Verdict]
    referee: Callable[[fx.Node, Facts], Verdict] | None = None
    float8: bool = True

    def __call__(self, node: fx.Node, facts: Facts) -> Verdict:
        return self.judged(node, facts, self.attention(node, facts))

    def judged(self, node: fx.Node, facts: Facts, verdict: Verdict) -> Verdict:
        """`verdict`, of whether a kernel can take the place of a call; where it can, the referee's."""
        if self.referee is None or not verdict:
            return verdict
        found = self.referee(node, facts)
        return Verdict(found.ok, f"{verdict.reason}; {found.reason}" if found else found.reason)


class Facts:
    """Answers about one graph, kept up to date with `update` while a pass edits it.

    Args:
        kernels: says of the call of a semantic op whether a kernel will take its place; None: none is made.
    """

    def __init__(self, graph: fx.Graph, kernels: Kernels | None = None) -> None:
        self.graph = graph
        self.kernels = kernels
        self._aliases = _Aliases()
        self._writers: list[fx.Node] = []
        self._modes: dict[fx.Node, Mode] = _modes(graph)
        self._inference = _in_inference_mode(graph)
        for node in graph.nodes:
            self._note(node)
        recorded = any(grad for grad, _ in self._modes.values())
        self.needs_grad = recorded and any(
            node.meta.get("fxopt_needs_grad") for node in graph.find_nodes(op="placeholder")
        )

    @property
    def measures(self) -> bool:
        """Whether it is measured that kernels are faster where they are used."""
        return self.kernels is not None and self.kernels.referee is not None

    def update(self, inserted: Iterable[fx.Node], changed: Iterable[fx.Node], beside: fx.Node) -> None:
        """Take note of an edit. Nodes that were erased need no mention.

        Args:
            inserted: new nodes, in the regions that `beside` is or was in. changed: those with new values.
        """
        for node in inserted:
            if not node._erased:
                self._modes[node] = self._modes[beside]
                if beside in self._inference:
                    self._inference.add(node)
                self._note(node)
        for node in changed:
            if not node._erased:
                self._aliases.note(node)
        self._writers = sorted(node for node in self._writers if not node._erased)

    def _note(self, node: fx.Node) -> None:
        self._aliases.note(node)
        if _may_write(node):
            self._writers.append(node)

    def alias_class(self, node: fx.Node) -> int | None:
        """A number shared by all values that may share memory; None for what is no tensor."""
        return self._aliases.of(node)

    def sharing(self, value: fx.Node) -> list[fx.Node]:
        """All nodes with a value, or one of several, that may share memory with `value`; itself too."""
        owner = self.alias_class(value)
        return [node for node in self.graph.nodes if owner in self._aliases.all_of(node)]

    def written_between(self, value: fx.Node, first: fx.Node, last: fx.Node) -> fx.Node | None:
        """A node after `first` and before `last` that may write to the memory of `value`."""
        between = (node for node in self._writers if first < node < last)
        return next((node for node in between if self._writes_to(node, value)), None)

    def written_after(self, value: fx.Node, node: fx.Node) -> fx.Node | None:
        """A node after `node` that may write to the memory of `value`."""
        later = (writer for writer in self._writers if node < writer)
        return next((writer for writer in later if self._writes_to(writer, value)), None)

    def leaves_graph(self, value: fx.Node) -> bool:
        """An output of the graph may share memory with `value`."""
        returned = self.graph.output_node().all_input_nodes
        return self.alias_class(value) in map(self.alias_class, returned)

    def unsafe_read(self, values: Iterable[fx.Node], first: fx.Node, last: fx.Node) -> str | None:
        """Why reading `values` at `last` instead of from `first` on would see something else, or None."""
        for value in values:
            writer = self.written_between(value, first, last)
            if writer is not None:
                return f"{value.name} is written by {writer.name} ({location(writer)}) in between"
        return None

    def mode_at(self, node: fx.Node) -> Mode:
        """Grad mode and autocast regions in which a node runs; grad mode is False when nothing needs grad."""
        grad, autocast = self._modes[node]
        return (grad and self.needs_grad, autocast)

    def differentiates(self, node: fx.Node) -> bool:
        """Whether autograd may record this node: grad is enabled there and some graph input needs grad."""
        return self.needs_grad and self._modes[node][0]

    def in_inference_mode(self, node: fx.Node) -> bool:
        """Inside of an inference mode region that the graph itself opens."""
        return node in self._inference

    def in_autocast(self, node: fx.Node) -> bool:
        """Inside of an enabled autocast region that the graph itself opens."""
        autocast = self._modes[node][1]  # (device, dtype, enabled, cache) each
        return any(
            {device: enabled for device, _, enabled, *_ in autocast}.values()
        )  # innermost of each device

    def _writes_to(self, writer: fx.Node, value: fx.Node) -> bool:
        return self.alias_class(value) in map(self.alias_class, _written_args(writer))


class _Aliases:
    """Which values may share memory: the storage of each -> a number. Inputs may share it outside."""

    def __init__(self) -> None:
        self._owner: dict[int, int] = {}
        self._by_input: dict[Any, int] = {}
        # Keeps the storages alive: another one at the address of a dead one would have its number.
        self._held: list[torch.Tensor] = []

    def note(self, node: fx.Node) -> None:
        """Take the values of a node; those of its arguments come first."""
        for value in _tensors(node.meta.get("val")):
            key = _storage(value)
            if key not in self._owner:
                self._held.append(value)
            shared = node.meta.get("fxopt_alias") if node.op == "placeholder" else None
            if shared is not None:
                self._owner[key] = self._by_input.setdefault(shared, key)
            passed = _passed_on(node)
            if passed is not None:
                self._owner[key] = self._owner[_storage(val(passed))]
            self._owner.setdefault(key, key)

    def of(self, node: fx.Node) -> int | None:
        value = val(node)
        return self._owner.get(_storage(value)) if isinstance(value, torch.Tensor) else None

    def all_of(self, node: fx.Node) -> set[int | None]:
        """The numbers of all values of a node."""
        return {self._owner.get(_storage(value)) for value in _tensors(node.meta.get("val"))}


def _may_write(node: fx.Node) -> bool:
    return (is_write(node) and node.target is not aten.detach_.default) or (
        is_opaque(node) and not _calls_readers(node)
    )


def _calls_readers(node: fx.Node) -> bool:
    """A higher-order op whose sub-graphs write to nothing that they are given."""
    root = node.graph.owning_module
    if not isinstance(node.target, HigherOrderOperator) or root is None:
        return False
    held = [getattr(root, str(arg.target), None) for arg in node.all_input_nodes if arg.op == "get_attr"]
    graphs = [module.graph for module in held if isinstance(module, fx.GraphModule)]
    return bool(graphs) and not any(_writes_inputs(graph) for graph in graphs)


def _writes_inputs(graph: fx.Graph) -> bool:
    aliases = _Aliases()
    inputs: set[int | None] = {None}
    for node in graph.nodes:
        aliases.note(node)
        if node.op in ("placeholder", "get_attr"):
            inputs |= aliases.all_of(node)
        elif is_write(node) and _may_write(node):
            if any(aliases.of(arg) in inputs for arg in _written_args(node)):
                return True
        elif _may_write(node):
            return True
    return False


def _written_args(node: fx.Node) -> list[fx.Node]:
    if not isinstance(node.target, OpOverload):
        return list(node.all_input_nodes)
    written: list[fx.Node] = []
    for position, formal in enumerate(node.target._schema.arguments):
        if formal.alias_info is None or not formal.alias_info.is_write:
            continue
        value = node.args[position] if position < len(node.args) else node.kwargs.get(formal.name)
        items = value if isinstance(value, (list, tuple)) else (value,)
        written += [item for item in items if isinstance(item, fx.Node)]
    return written


def _storage(value: torch.Tensor) -> int:
    return value.untyped_storage()._cdata if value.layout is torch.strided else id(value)


def _passed_on(node: fx.Node) -> fx.Node | None:
    """What a dropout that drops nothing returns: its input in eager, though the trace records a copy."""
    if not is_call(node, aten.dropout.default) or not is_tensor(node.args[0]):
        return None
    return None if drops(node) else node.args[0]  # type: ignore[return-value]


def _tensors(value: Any) -> list[torch.Tensor]:
    if isinstance(value, torch.Tensor):
        return [value]
    if isinstance(value, (tuple, list)):
        return [item for item in value if isinstance(item, torch.Tensor)]
    return []


Mode = tuple[bool, tuple[tuple[Any, ...], ...]]


def _modes(graph: fx.Graph) -> dict[fx.Node, Mode]:
    """For each node: is grad enabled, and the arguments of the autocast regions it is in, outermost first."""
    modes: dict[fx.Node, Mode] = {}
    grad = torch.is_grad_enabled()
    entered: dict[fx.Node, tuple[Any, ...]] = {}
    outside: dict[Any, bool] = {}  # inference mode entered at -> grad mode to return to
    for node in graph.nodes:
        if node.target is torch._C._set_grad_enabled:
            grad = bool(node.args[0])
        elif node.target is torch.autograd.grad_mode._enter_inference_mode:
            outside[node] = grad
            grad = not node.args[0]
        elif node.target is torch.autograd.grad_mode._exit_inference_mode:
            grad = outside.pop(node.args[0], grad)
        elif node.target is torch.amp.autocast_mode._enter_autocast:
            entered[node] = tuple(node.args)
        elif node.target is torch.amp.autocast_mode._exit_autocast:
            entered.pop(node.args[0], None)
        modes[node] = (grad, tuple(entered.values()))
    return modes


def _in_inference_mode(graph: fx.Graph) -> set[fx.Node]:
    inside: set[fx.Node] = set()
    entered: dict[Any, bool] = {}
    for node in graph.nodes:
        if node.target is torch.autograd.grad_mode._enter_inference_mode:
            entered[node] = bool(node.args[0])
        elif node.target is torch.autograd.grad_mode._exit_inference_mode:
            entered.pop(node.args[0], None)
        elif entered and list(entered.values())[-1]:
            inside.add(node)
    return inside
