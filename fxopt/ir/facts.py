"""Small questions about a normalized graph: metadata, order, aliasing, writes, autocast.

Passes match by asking these, not by spelling trees. Values are the fake tensors that normalization left in
``node.meta["val"]``; two values alias when their storages do.
"""

from __future__ import annotations

import operator
from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import fx
from torch._ops import HigherOrderOperator, OpOverload
from torch.fx.experimental.symbolic_shapes import statically_known_true

aten = torch.ops.aten

Size = int | torch.SymInt


def val(node: Any) -> Any:
    """The fake value of a node, or the argument itself when it is no node."""
    return node.meta.get("val") if isinstance(node, fx.Node) else node


def is_tensor(node: Any) -> bool:
    return isinstance(node, fx.Node) and isinstance(node.meta.get("val"), torch.Tensor)


def dtype(node: fx.Node) -> torch.dtype:
    found: torch.dtype = val(node).dtype
    return found


def shape(node: fx.Node) -> tuple[Size, ...]:
    return tuple(val(node).shape)


def rank(node: fx.Node) -> int:
    return len(val(node).shape)


def is_floating(node: fx.Node) -> bool:
    value = val(node)
    return isinstance(value, torch.Tensor) and (value.is_floating_point() or value.is_complex())


def same_size(a: Size, b: Size) -> bool:
    """Known to be equal for all values of the symbols. Adds no guard."""
    return bool(statically_known_true(a == b))


def same_shape(a: Iterable[Size], b: Iterable[Size]) -> bool:
    left, right = tuple(a), tuple(b)
    return len(left) == len(right) and all(same_size(x, y) for x, y in zip(left, right, strict=True))


def same_strides(a: torch.Tensor, b: torch.Tensor) -> bool:
    """Equal strides, where a dimension of size one has no stride to speak of."""
    return all(
        same_size(n, 1) or same_size(x, y) for n, x, y in zip(a.shape, a.stride(), b.stride(), strict=True)
    )


def is_last_dim(node: fx.Node, dim: int) -> bool:
    """`dim` names the last dimension of the tensor `node`, which has one."""
    return rank(node) > 0 and dim in (-1, rank(node) - 1)


def is_call(node: Any, *targets: OpOverload) -> bool:
    return isinstance(node, fx.Node) and node.op == "call_function" and node.target in targets


def argument(node: fx.Node, name: str, default: Any = None) -> Any:
    """An argument of an ATen call by its schema name, wherever it was written."""
    if name in node.kwargs:
        return node.kwargs[name]
    for position, formal in enumerate(node.target._schema.arguments):  # type: ignore[union-attr]
        if formal.name == name:
            if position < len(node.args):
                return node.args[position]
            return formal.default_value if formal.has_default_value() else default
    return default


def is_number(value: Any, wanted: float | None = None) -> bool:
    """A Python number (no bool, no symbol), equal to `wanted` if given."""
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        return False
    return wanted is None or value == wanted


def is_scalar(value: Any) -> bool:
    """A Python number, or a node that holds one which may differ from call to call (`dynamic=True`)."""
    if isinstance(value, fx.Node):
        return isinstance(val(value), (torch.SymFloat, torch.SymInt))
    return is_number(value)


CASTS = (
    aten.to.dtype,
    aten.to.dtype_layout,
    aten.to.device,
    aten.to.other,
    aten._to_copy.default,
    aten.type_as.default,
)


def is_cast(node: Any) -> bool:
    """A conversion of dtype (or of nothing), on the same device."""
    return is_call(node, *CASTS) and is_tensor(node.args[0]) and val(node).device == val(node.args[0]).device


PLAIN_FLOATS = (torch.float64, torch.float32, torch.bfloat16, torch.float16)


def is_float_cast(node: Any) -> bool:
    """A conversion between the floating dtypes that models compute in; others (float8) round on purpose."""
    return is_cast(node) and dtype(node) in PLAIN_FLOATS and dtype(node.args[0]) in PLAIN_FLOATS


def is_widening(node: fx.Node) -> bool:
    """A cast that keeps every value: the two dtypes promote to the target's, in the same category."""
    source, target = dtype(node.args[0]), dtype(node)  # type: ignore[arg-type]
    if source == target:
        return True
    return (
        source.is_floating_point
        and target.is_floating_point
        and torch.promote_types(source, target) == target
    )


def peel_casts(node: fx.Node) -> fx.Node:
    """Through all casts to the value that they convert."""
    while is_cast(node):
        node = node.args[0]  # type: ignore[assignment]
    return node


def peel_widening(node: fx.Node) -> fx.Node:
    """Through casts that keep every value."""
    while is_cast(node) and is_widening(node):
        node = node.args[0]  # type: ignore[assignment]
    return node


def drops(node: Any) -> bool:
    """A dropout in training, with a probability above zero."""
    return is_call(node, aten.dropout.default) and bool(argument(node, "train") and argument(node, "p"))


def only_user(node: fx.Node) -> fx.Node | None:
    """The single user of a node, or None."""
    return next(iter(node.users)) if len(node.users) == 1 else None


def commuted(node: fx.Node) -> Iterator[tuple[Any, Any]]:
    """The two operands of a commutative op, in both orders."""
    a, b = node.args[0], node.args[1]
    yield a, b
    yield b, a


def location(node: fx.Node) -> str:
    """The user's ``file:line`` for a node, or a dash. Frames of torch itself are skipped."""
    trace = node.meta.get("stack_trace") or ""
    frames = [line.strip() for line in trace.splitlines() if line.strip().startswith("File ")]
    for frame in reversed(frames):
        path, _, rest = frame.removeprefix('File "').partition('", line ')
        if path and "/torch/" not in path:
            return f"{path}:{rest.split(',')[0]}"
    return "-"


def is_write(node: fx.Node) -> bool:
    """An op that writes to one of its inputs."""
    return (
        node.op == "call_function" and isinstance(node.target, OpOverload) and node.target._schema.is_mutable
    )


def is_opaque(node: fx.Node) -> bool:
    """A call that may write to any tensor it is given: higher-order ops and whatever is no ATen op."""
    if node.op in ("call_module", "call_method"):
        return True
    if node.op != "call_function" or isinstance(node.target, OpOverload):
        return False
    return isinstance(node.target, HigherOrderOperator) or not _is_plain(node.target)


_PLAIN_MODULES = ("_operator", "operator", "math", "builtins", "torch.amp.autocast_mode", "torch._C", "torch")


def _is_plain(target: Any) -> bool:
    return target is operator.getitem or getattr(target, "__module__", None) in _PLAIN_MODULES


class Facts:
    """Answers that need the whole graph: order, aliasing, writes, autocast and grad mode. Built per pass."""

    def __init__(self, graph: fx.Graph) -> None:
        self.order = {node: index for index, node in enumerate(graph.nodes)}
        self._owner = _alias_classes(graph)
        self._writes = [(self.order[node], self._written(node)) for node in graph.nodes if _may_write(node)]
        self._modes = _modes(graph)
        self._inference = _in_inference_mode(graph)
        self._returned = {self.alias_class(node) for node in graph.output_node().all_input_nodes}
        recorded = any(grad for grad, _ in self._modes.values())
        self.needs_grad = recorded and any(
            node.meta.get("fxopt_needs_grad") for node in graph.find_nodes(op="placeholder")
        )

    def alias_class(self, node: fx.Node) -> int | None:
        """A number shared by all values that may share memory; None for what is no tensor."""
        value = val(node)
        return self._owner.get(_storage(value)) if isinstance(value, torch.Tensor) else None

    def sharing(self, value: fx.Node) -> list[fx.Node]:
        """All nodes with a value, or one of several, that may share memory with `value`; itself too."""
        owner = self.alias_class(value)
        return [
            node
            for node in self.order
            if any(self._owner.get(_storage(each)) == owner for each in _tensors(node.meta.get("val")))
        ]

    def written_between(self, value: fx.Node, first: fx.Node, last: fx.Node) -> fx.Node | None:
        """A node after `first` and before `last` that may write to the memory of `value`."""
        owner = self.alias_class(value)
        low, high = self.order[first], self.order[last]
        for position, (node, owners) in self._writes:
            if low < position < high and owner in owners:
                return node
        return None

    def written_after(self, value: fx.Node, node: fx.Node) -> fx.Node | None:
        """A node after `node` that may write to the memory of `value`."""
        owner, position = self.alias_class(value), self.order[node]
        return next(
            (writer for at, (writer, owners) in self._writes if at > position and owner in owners), None
        )

    def leaves_graph(self, value: fx.Node) -> bool:
        """An output of the graph may share memory with `value`."""
        return self.alias_class(value) in self._returned

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

    def _written(self, node: fx.Node) -> tuple[fx.Node, frozenset[int | None]]:
        return node, frozenset(self.alias_class(arg) for arg in _written_args(node))


def _may_write(node: fx.Node) -> bool:
    return is_write(node) or (is_opaque(node) and not _calls_readers(node))


def _calls_readers(node: fx.Node) -> bool:
    """A higher-order op whose sub-graphs write to nothing that they are given."""
    root = node.graph.owning_module
    if not isinstance(node.target, HigherOrderOperator) or root is None:
        return False
    held = [getattr(root, str(arg.target), None) for arg in node.all_input_nodes if arg.op == "get_attr"]
    graphs = [module.graph for module in held if isinstance(module, fx.GraphModule)]
    return bool(graphs) and not any(_writes_inputs(graph) for graph in graphs)


def _writes_inputs(graph: fx.Graph) -> bool:
    owner = _alias_classes(graph)
    given = [node for node in graph.nodes if node.op in ("placeholder", "get_attr")]
    inputs = {owner.get(_storage(value)) for node in given for value in _tensors(node.meta.get("val"))}
    for node in graph.nodes:
        if is_write(node):
            written = [value for arg in _written_args(node) for value in _tensors(arg.meta.get("val"))]
            if not written or any(owner.get(_storage(value)) in inputs for value in written):
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


def _alias_classes(graph: fx.Graph) -> dict[int, int]:
    """Storage of each value -> alias class. Inputs that share memory outside share a class here."""
    owner: dict[int, int] = {}
    by_input: dict[int, int] = {}
    for node in graph.nodes:
        for value in _tensors(node.meta.get("val")):
            key = _storage(value)
            shared = node.meta.get("fxopt_alias") if node.op == "placeholder" else None
            if shared is not None:
                owner[key] = by_input.setdefault(shared, key)
            passed = _passed_on(node)
            if passed is not None:
                owner[key] = owner[_storage(val(passed))]
            owner.setdefault(key, key)
    return owner


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
