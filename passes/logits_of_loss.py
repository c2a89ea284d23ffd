"""From the input of a loss up to the linear layer: which rows of it are read, and how they are scaled."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import fx
from torch._ops import OpOverload

from fxopt.ir import facts
from fxopt.ir.contract import Miss
from fxopt.ir.facts import argument, is_call, is_number, val

from .attention_parts import Factor, readers, seen
from .attention_steps import VIEWS, read_scale

aten = torch.ops.aten

_OF_ONE_DIM = (aten.slice.Tensor, aten.narrow.default, aten.select.int)
_COPIES = (aten.contiguous.default, aten.clone.default)
_PRODUCTS = (aten.linear.default, aten.matmul.default, aten.mm.default, aten.addmm.default)
_TRANSPOSES = (
    aten.t.default,
    aten.mT.default,
    aten.numpy_T.default,
    aten.transpose.int,
    aten.permute.default,
)

_WANTED = "logits of a linear layer, scaled or capped by numbers at most"


@dataclass(frozen=True)
class Logits:
    """What a loss reads: ``softcap(scale * (hidden weight^T + bias))``, some rows of it.

    Attributes:
        product: the node of the linear layer, or of the sum with the bias.
        hidden: (..., H). weight: (V, H); with `transposed`, (H, V). bias: (V,) or None.
        rows: nodes that choose and reshape rows, in graph order. They leave the last dimension alone.
        scale, softcap: attributes of ``fxopt::linear_cross_entropy``.
    """

    product: fx.Node
    hidden: fx.Node
    weight: fx.Node
    transposed: bool
    bias: fx.Node | None
    rows: tuple[fx.Node, ...] = ()
    scale: float = 1.0
    softcap: float = 0.0

    @property
    def operands(self) -> tuple[fx.Node, ...]:
        found = (self.hidden, self.weight, self.bias)
        return tuple(node for node in found if node is not None)


@dataclass(frozen=True)
class _Walk:
    """What was seen between the loss and `node`: factors before and after a tanh, and the rows.

    `log_softmax` is what the loss leaves to the model; None once it is found, or where the loss has its own.
    """

    node: fx.Node
    log_softmax: OpOverload | None
    factor: Factor = Factor()
    after_tanh: Factor | None = None
    rows: tuple[fx.Node, ...] = ()


def logits_of(read: fx.Node, log_softmax: OpOverload | None) -> Logits | Miss:
    """The logits that `read` holds, whose last dimension is the vocabulary; their logarithms of softmax."""
    walk = _Walk(read, log_softmax)
    while True:
        if len(walk.node.users) != 1:
            return _read_elsewhere(walk.node)
        if is_call(walk.node, *_PRODUCTS, aten.add.Tensor):
            return _finished(walk)
        further = _step(walk)
        if isinstance(further, Miss):
            return further
        walk = further


def classes_last(read: fx.Node) -> fx.Node | Miss:
    """The tensor (..., V) behind the (N, V), or (N, V, S), that a loss reads."""
    if facts.rank(read) == 2:
        return read
    if facts.rank(read) == 3 and is_call(read, *_TRANSPOSES) and _swapped(read) == {1, 2}:
        return read.args[0] if len(read.users) == 1 else _read_elsewhere(read)  # type: ignore[return-value]
    return Miss(
        "logits of the shape (N, V), or (N, S, V) transposed", f"{read.name} {tuple(val(read).shape)}"
    )


def _read_elsewhere(node: fx.Node) -> Miss:
    way = ": fxopt.loss_only(model) does not return them"
    returned = any(user.op == "output" for user in node.users)
    return Miss("logits that only the loss reads", readers(node) + (way if returned else ""))


def _step(walk: _Walk) -> _Walk | Miss:
    node = walk.node
    source: Any = node.args[0] if node.op == "call_function" and node.args else None
    if facts.is_tensor(source):
        if facts.is_float_cast(node) or is_call(node, *_COPIES):
            return replace(walk, node=source)
        if _chooses_rows(node):
            return replace(walk, node=source, rows=(node, *walk.rows))
        if walk.log_softmax is not None:
            return _below_log_softmax(walk, source)
        if is_call(node, aten.tanh.default) and walk.after_tanh is None:
            return replace(walk, node=source, factor=Factor(), after_tanh=walk.factor)
        scaled = read_scale(node, walk.factor)
        if scaled is not None and scaled[1].is_number and scaled[1].number != 0.0:
            return replace(walk, node=scaled[0], factor=scaled[1])
    return Miss(_WANTED, seen(node))


def _below_log_softmax(walk: _Walk, source: fx.Node) -> _Walk | Miss:
    node = walk.node
    if node.target is not walk.log_softmax or not facts.is_last_dim(source, node.args[1]):  # type: ignore[arg-type]
        return Miss("the log-softmax of the last dimension", seen(node))
    return replace(walk, node=source, log_softmax=None)


def _chooses_rows(node: fx.Node) -> bool:
    """A view of rows, whole and in order."""
    source = node.args[0]
    if facts.rank(node) == 0 or not facts.same_size(val(node).shape[-1], val(source).shape[-1]):
        return False
    if is_call(node, *VIEWS):
        return True
    last = facts.rank(source) - 1  # type: ignore[arg-type]
    if is_call(node, *_OF_ONE_DIM):
        return int(argument(node, "dim")) % (last + 1) != last
    return is_call(node, aten.flatten.using_ints) and int(argument(node, "end_dim")) % (last + 1) != last


def _finished(walk: _Walk) -> Logits | Miss:
    found = _linear(walk.node) or _linear_and_bias(walk.node)
    if found is None or walk.log_softmax is not None:
        return Miss(_WANTED, seen(walk.node))
    scale, softcap = walk.factor.number, 0.0
    if walk.after_tanh is not None:
        softcap = walk.after_tanh.number
    return replace(found, rows=walk.rows, scale=scale * (softcap or 1.0), softcap=softcap)


def _linear(node: fx.Node) -> Logits | None:
    if is_call(node, aten.linear.default):
        hidden, weight = node.args[:2]
        return Logits(node, hidden, weight, False, argument(node, "bias"))  # type: ignore[arg-type]
    if is_call(node, aten.addmm.default):
        plain = all(is_number(argument(node, name), 1) for name in ("alpha", "beta"))
        bias, hidden, weight = node.args
        if not plain or facts.rank(bias) != 1:  # type: ignore[arg-type]
            return None
        return _of_product(node, hidden, weight, bias)
    return _of_product(node, node.args[0], node.args[1], None) if is_call(node, *_PRODUCTS) else None


def _of_product(node: fx.Node, hidden: Any, weight: Any, bias: Any) -> Logits | None:
    if facts.rank(hidden) < 2 or facts.rank(weight) != 2:
        return None
    if is_call(weight, *_TRANSPOSES) and _swapped(weight) == {0, 1}:
        return Logits(node, hidden, weight.args[0], False, bias)
    return Logits(node, hidden, weight, True, bias)


def _linear_and_bias(node: fx.Node) -> Logits | None:
    """``linear(hidden, weight) + bias``."""
    if not is_call(node, aten.add.Tensor) or not is_number(argument(node, "alpha"), 1):
        return None
    for product, bias in facts.commuted(node):
        if not facts.is_tensor(product) or not facts.is_tensor(bias) or len(product.users) != 1:
            continue
        found = _linear(product)
        width = val(product).shape[-1:]
        if found is not None and found.bias is None and facts.same_shape(val(bias).shape, width):
            return replace(found, product=node, bias=bias)
    return None


def _swapped(node: fx.Node) -> set[int] | None:
    """The two dimensions that a call exchanges; None when it is another permutation."""
    rank = facts.rank(node.args[0])  # type: ignore[arg-type]
    if is_call(node, aten.transpose.int):
        return {int(dim) % rank for dim in node.args[1:3]}  # type: ignore[arg-type]
    if is_call(node, aten.permute.default):
        order = [int(dim) % rank for dim in node.args[1]]  # type: ignore[union-attr,arg-type]
        moved = {place for place, dim in enumerate(order) if dim != place}
        return moved if len(moved) == 2 else None
    return {rank - 2, rank - 1} if rank == 2 or is_call(node, aten.mT.default) else None
