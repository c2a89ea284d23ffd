"""Small questions about a node of a normalized graph: its op, arguments, dtype, shape, source line.

Passes match by asking these, not by spelling trees. Values are the fake tensors that normalization left in
``node.meta["val"]``.
"""

from __future__ import annotations

import operator
from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import fx
from torch._ops import HigherOrderOperator, OpOverload

from fxopt.ir.sizes import Size as Size
from fxopt.ir.sizes import same_size as same_size

aten = torch.ops.aten


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


def may_train(graph: fx.Graph) -> bool:
    """Whether autograd may record any of a graph, by the grad mode around it."""
    inputs = graph.find_nodes(op="placeholder")
    return torch.is_grad_enabled() and any(node.meta.get("fxopt_needs_grad") for node in inputs)
