"""Fake execution of single nodes: the metadata of what a rewrite inserted, and of what reads it."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import torch.utils._pytree as pytree
from torch import fx
from torch._dispatch.python import enable_python_dispatcher
from torch._ops import HigherOrderOperator, OpOverload
from torch._subclasses import FakeTensor, FakeTensorMode

from fxopt.ir.facts import is_write, same_shape, same_strides


def fake_mode_of(graph: fx.Graph) -> FakeTensorMode | None:
    """The fake mode that the values of a normalized graph belong to; None when it has no tensor."""
    for node in graph.nodes:
        value = node.meta.get("val")
        if isinstance(value, FakeTensor):
            return value.fake_mode
    return None


Region = tuple[Any, ...]  # the arguments of an autocast region


def evaluate(node: fx.Node, mode: FakeTensorMode, autocast: Iterable[Region] = ()) -> Any:
    """The fake value of a call from the fake values of its arguments. Writes are not repeated.

    `autocast` are the regions that the node is in, outermost first: they decide dtypes.
    """
    args, kwargs = fx.node.map_arg((node.args, node.kwargs), lambda n: n.meta["val"])
    target = node.target
    if not callable(target):
        raise TypeError(f"{node.format_node()} is no function call")
    if isinstance(target, OpOverload) and target.namespace == "fxopt":
        return _evaluated_once(target, args, kwargs, mode)
    with _faking(mode), ExitStack() as regions:
        for region in autocast:
            regions.enter_context(torch.amp.autocast_mode.autocast(*region))
        return target(*args, **kwargs)


@contextmanager
def _faking(mode: FakeTensorMode) -> Iterator[None]:
    """As Dynamo runs fake operators. Without the dispatcher in Python composite ones ask for sizes as
    numbers, which torch before 2.13 answers with those that were traced, and with guards on them.
    """
    with mode, torch.no_grad(), enable_python_dispatcher():
        yield


@dataclass(frozen=True)
class _Form:
    """What a tensor is besides its contents. Holds no fake tensor, which would hold the mode."""

    shape: tuple[Any, ...]
    strides: tuple[Any, ...]
    dtype: torch.dtype
    device: torch.device

    @staticmethod
    def of(tensor: torch.Tensor) -> _Form:
        return _Form(tuple(tensor.shape), tensor.stride(), tensor.dtype, tensor.device)

    def make(self) -> torch.Tensor:
        return torch.empty_strided(self.shape, self.strides, dtype=self.dtype, device=self.device)


_RESULTS: weakref.WeakKeyDictionary[FakeTensorMode, dict[Any, Any]] = weakref.WeakKeyDictionary()


def _evaluated_once(target: OpOverload, args: Any, kwargs: Any, mode: FakeTensorMode) -> Any:
    """The value of a semantic op, whose results share memory with nothing.

    Its body takes milliseconds, and layers are alike: it runs once for each form of its arguments.
    """
    flat, spec = pytree.tree_flatten((args, kwargs))
    key = (target, spec, tuple(map(signature, flat)))
    results = _RESULTS.setdefault(mode, {})
    with _faking(mode):
        if key in results:
            return pytree.tree_map_only(_Form, _Form.make, results[key])
        found = target(*args, **kwargs)
    results[key] = pytree.tree_map_only(torch.Tensor, _Form.of, found)
    return found


def signature(arg: Any) -> Any:
    """What decides on the metadata of a result: two arguments of one signature give results of one form."""
    value = arg.meta["val"] if isinstance(arg, fx.Node) else arg
    if isinstance(value, torch.Tensor):
        sizes = tuple(str(n) for n in (*value.shape, *value.stride()))
        return (value.dtype, value.device, sizes)
    if isinstance(value, torch.SymFloat):
        return torch.SymFloat  # no size depends on it
    return (type(value).__name__, str(value))


def can_evaluate(node: fx.Node) -> bool:
    """Pure calls only: what writes or is opaque keeps the value that was recorded for it."""
    if node.op != "call_function" or is_write(node) or isinstance(node.target, HigherOrderOperator):
        return False
    return all("val" in arg.meta for arg in node.all_input_nodes)


def equivalent(a: Any, b: Any) -> bool:
    """Same shape, strides, dtype and device; for what is no tensor, same type."""
    if not isinstance(a, torch.Tensor) or not isinstance(b, torch.Tensor):
        return type(a) is type(b)
    if a.dtype != b.dtype or a.device != b.device or not same_shape(a.shape, b.shape):
        return False
    return same_strides(a, b)


def describe(value: Any) -> str:
    """dtype, shape and strides in one short line."""
    if not isinstance(value, torch.Tensor):
        return type(value).__name__
    return f"{value.dtype} {tuple(value.shape)} strides {tuple(value.stride())} on {value.device}"


def propagate_from(
    start: fx.Node,
    replaced: Any,
    mode: FakeTensorMode,
    on_change: Callable[[fx.Node, Any], None],
    autocast_at: Callable[[fx.Node], Iterable[Region]] = lambda node: (),
) -> None:
    """Bring the values of everything that reads `start`, directly or not, up to date.

    `replaced` is the value of what stood in its place; `autocast_at` tells the regions that a node is in.

    `on_change` is told of a node and its value before each change, so that a caller can undo. Whatever an
    op raises when it cannot take the new strides is passed on.
    """
    made = start.meta.get("val")
    moved = storage_of(replaced) if storage_of(replaced) != storage_of(made) else None
    alike = isinstance(made, torch.Tensor) and equivalent(replaced, made)
    changed = set() if alike else {start}
    dirty = set(start.users)
    node = start.next
    while dirty and node.op != "root":
        old = node.meta.get("val")
        aliases = moved is not None and storage_of(old) == moved
        # Most rewrites keep the form of the value: only its views have to be looked at.
        if node in dirty and (aliases or not changed.isdisjoint(node.all_input_nodes)):
            value = _updated(node, aliases, lambda n: evaluate(n, mode, autocast_at(n)))
            if value is not None:
                on_change(node, old)
                node.meta["val"] = value
                changed |= set() if equivalent(old, value) else {node}
                dirty |= set(node.users)
        dirty.discard(node)
        node = node.next


def storage_of(value: Any) -> int | None:
    """Identity of the memory behind a strided tensor."""
    if not isinstance(value, torch.Tensor) or value.layout is not torch.strided:
        return None
    storage: int = value.untyped_storage()._cdata
    return storage


def _updated(node: fx.Node, aliases: bool, value_of: Callable[[fx.Node], Any]) -> torch.Tensor | None:
    """The new value of a node; None where it keeps its own. `aliases`: it is a view of what was replaced."""
    old = node.meta.get("val")
    if aliases and is_write(node):
        new = node.args[0].meta["val"] if isinstance(node.args[0], fx.Node) else old
    elif node.op == "output" or not can_evaluate(node):
        return None
    else:
        new = value_of(node)
    keeps = not isinstance(new, torch.Tensor) or (equivalent(old, new) and not aliases)
    return None if keeps else new
