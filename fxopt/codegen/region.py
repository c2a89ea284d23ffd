"""One region: the operators of a kernel, its loop nest, and what it costs."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import fx

from fxopt.codegen.dequantize import is_dequantized
from fxopt.codegen.elementwise import TRITON_TYPES, formula_of, operations_of, supported
from fxopt.codegen.gather import is_gather
from fxopt.codegen.loops import REDUCTIONS, Loop, is_moment, loop_of
from fxopt.codegen.matmul import matmul_body
from fxopt.codegen.price import Price, prices_of
from fxopt.codegen.product_operands import in_kernel
from fxopt.codegen.statements import Body, merged
from fxopt.codegen.trace import CannotEmit, is_created, needed_for, trace
from fxopt.codegen.view_index import is_view
from fxopt.ir.cost import hint, numel, tensors_of
from fxopt.ir.ops.uniform import is_uniform

aten = torch.ops.aten

MAX_POINTERS = 24  # more arguments cost more to launch than a second kernel

_JOINTS = (aten.cat.default, aten.slice_scatter.default)


@dataclass(frozen=True)
class Region:
    """What one kernel computes.

    Attributes:
        members: its operators, in order. outputs: those whose results are read elsewhere. body: its loop.
        apart: what the operators cost each for itself. fused: what the kernel costs.
        again: operators of others that it computes once more, in place of reading what they have written.
        why_again: the bytes that this saves. why_beside: why kernels that need nothing of each other are one.
    """

    members: tuple[fx.Node, ...]
    outputs: tuple[fx.Node, ...]
    body: Body
    apart: Price
    fused: Price
    again: tuple[fx.Node, ...] = ()
    why_again: str = ""
    why_beside: str = ""


def can_emit(node: fx.Node, devices: frozenset[str]) -> bool:
    """Whether `node` alone could be a kernel."""
    if node.op != "call_function" or is_view(node) or is_created(node):
        return False
    values = tensors_of(node)
    read = [value for arg in node.all_input_nodes for value in tensors_of(arg)]
    if not values or not all(value.device.type in devices and _plain(value) for value in values + read):
        return False
    if is_moment(node) or node.target in REDUCTIONS or node.target in _JOINTS:
        return True
    if is_uniform(node.target) or is_gather(node) or is_dequantized(node):
        return True
    found = formula_of(node)
    return supported(node, found) if found is not None else in_kernel(node)


def _plain(value: torch.Tensor) -> bool:
    """A tensor whose memory can be indexed, and which has elements."""
    if value.layout is not torch.strided or value.dtype not in TRITON_TYPES:
        return False
    return all(hint(size) > 0 for size in value.shape)


def make_region(
    members: Iterable[fx.Node], outputs: Sequence[fx.Node] | None = None, again: Sequence[fx.Node] = ()
) -> Region:
    """The region of `members`, in order of the graph, which computes `again`, too, and stores `outputs`.

    Without `outputs`: all that something else reads.

    Raises:
        CannotEmit: they are not one loop nest.
    """
    own = tuple(members)
    stored = outputs_of(own) if outputs is None else tuple(outputs)
    body = body_of((*again, *own), stored)
    needed = needed_for(stored, {load.tensor for load in body.loads})
    computed = [node for node in (*again, *own) if node in needed]
    return Region(own, stored, body, *prices_of(own, computed, stored, body), again=tuple(again))


def body_of(members: Sequence[fx.Node], outputs: Sequence[fx.Node]) -> Body:
    """The loop nest that computes `members` and stores `outputs`.

    Raises:
        CannotEmit: there is none.
    """
    if not outputs:
        raise CannotEmit("nothing reads its results")
    products = any(map(in_kernel, members))
    body = matmul_body(members, outputs) if products else _loop_body(members, outputs)
    pointers = len({one.tensor for one in body.loads}) + len(outputs)
    if not body.loads:
        raise CannotEmit("it reads nothing: a constant, which the host folds")
    if pointers > MAX_POINTERS:
        raise CannotEmit(f"wanted at most {MAX_POINTERS} tensors in one kernel, saw {pointers}")
    return body


def _loop_body(members: Sequence[fx.Node], outputs: Sequence[fx.Node]) -> Body:
    loop = loop_of(members, outputs)
    _refuse_repetition(members, loop)
    return merged(trace(members, outputs, loop))


def _refuse_repetition(members: Iterable[fx.Node], loop: Loop) -> None:
    for node in members:
        if operations_of(node) > 1 and loop.home(node) is None:
            raise CannotEmit(f"{node.name} would be computed again for every element that it is broadcast to")


def outputs_of(members: Iterable[fx.Node]) -> tuple[fx.Node, ...]:
    """Those of `members` whose value something else reads, through views or not."""
    own = frozenset(members)
    return tuple(node for node in members if any(leads_outside(user, own) for user in node.users))


def leads_outside(user: fx.Node, members: frozenset[fx.Node]) -> bool:
    """Whether `user`, or what reads it as a view, is something else than a member."""
    if user in members:
        return False
    return not is_view(user) or any(leads_outside(one, members) for one in user.users)


def stands_alone(node: fx.Node) -> bool:
    """Whether a kernel for `node` alone is worth while, or has to be: the host cannot draw our numbers, nor
    widen codes in one pass."""
    return node.target in REDUCTIONS or is_uniform(node.target) or is_dequantized(node)


def are_numbers(members: Iterable[fx.Node]) -> bool:
    """Whether tensors of one element are all that `members` read and make, such as a counter of tokens."""
    nodes = {one for node in members for one in (node, *node.all_input_nodes)}
    values = [value for node in nodes for value in tensors_of(node)]
    return all(numel(value) == 1 for value in values) and not any(is_uniform(node.target) for node in nodes)
