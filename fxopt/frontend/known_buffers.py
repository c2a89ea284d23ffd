"""Tensors of a module whose contents are an index rule, as the triangle that many models register.

Such a tensor is an input of the graph, of which nothing is known. It is read while compiling, and where every
entry is what ``column - row <= diagonal`` says, the passes see the rule. What is compiled is used as long as
the module has the same tensor, unwritten; a call that finds another one runs the graph as it was captured.
"""

from __future__ import annotations

import logging
import weakref
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx
from torch._subclasses import FakeTensor, FakeTensorMode

from fxopt.frontend.dead_code import erase_unused
from fxopt.ir.contract import Evidence, Status
from fxopt.ir.facts import val
from fxopt.ir.graph_facts import Facts
from fxopt.ir.propagate import evaluate, fake_mode_of

aten = torch.ops.aten
log = logging.getLogger("fxopt")

NAME = "known-buffers"
# More entries than this are not read.
MOST = 2**24


@dataclass(frozen=True)
class Triangle:
    """`inside` where ``column - row <= diagonal``, `outside` elsewhere."""

    diagonal: int
    inside: Any
    outside: Any

    def holds(self, matrix: torch.Tensor) -> bool:
        """Every entry is what the rule says. Args: matrix: (R, C)."""
        rows, columns = (torch.arange(size, device=matrix.device) for size in matrix.shape)
        wanted = torch.where(columns - rows[:, None] <= self.diagonal, self.inside, self.outside)
        return torch.equal(matrix, wanted.to(matrix.dtype))

    def __str__(self) -> str:
        return f"{self.inside} where column - row <= {self.diagonal}, {self.outside} elsewhere"


def triangle_of(tensor: torch.Tensor) -> Triangle | None:
    """The rule of a tensor (1, ..., R, C), or None."""
    matrix = _matrix(tensor)
    if matrix is None:
        return None
    inside, outside = matrix[-1, 0].item(), matrix[0, -1].item()
    first = int((matrix[0] == inside).sum())
    diagonal = first - 1 if first else -int((matrix[:, 0] == outside).sum())
    found = Triangle(diagonal, inside, outside)
    return found if inside != outside and found.holds(matrix) else None


def _matrix(tensor: torch.Tensor) -> torch.Tensor | None:
    if tensor.dim() < 2 or min(tensor.shape[-2:]) < 2 or tensor.numel() > MOST or tensor.is_complex():
        return None
    if any(size != 1 for size in tensor.shape[:-2]):
        return None
    return tensor.detach().reshape(tensor.shape[-2:])


@dataclass
class KnownBuffer:
    """An input that is a triangle, and the node that computes it."""

    place: int
    placeholder: fx.Node
    made: fx.Node
    rule: Triangle
    tensor: weakref.ref[torch.Tensor]
    version: int

    def __str__(self) -> str:
        return f"{self.placeholder.name} is {self.rule}"

    def holds(self, inputs: Sequence[Any]) -> bool:
        """The input has the contents that were seen."""
        given: torch.Tensor = inputs[self.place]
        if not given.is_inference() and given is self.tensor() and given._version == self.version:
            return True
        matrix = None if given.is_inference() else _matrix(given)
        if matrix is None or not self.rule.holds(matrix):
            return False
        self.tensor, self.version = weakref.ref(given), given._version
        return True


def compute_known_buffers(gm: fx.GraphModule, inputs: Sequence[Any]) -> list[KnownBuffer]:
    """Replace the buffers in `gm` that are triangles by what computes them."""
    mode, facts = fake_mode_of(gm.graph), None
    found: list[KnownBuffer] = []
    for place, node in enumerate(gm.graph.find_nodes(op="placeholder")):
        if mode is None or not node.users or not _is_buffer(node, inputs[place]):
            continue
        rule = triangle_of(inputs[place])
        facts = facts or Facts(gm.graph)
        if rule is None or facts.written_after(node, node) is not None or facts.leaves_graph(node):
            continue
        made = _build(gm.graph, node, rule, mode)
        version = inputs[place]._version
        found.append(KnownBuffer(place, node, made, rule, weakref.ref(inputs[place]), version))
    if found:
        gm.recompile()
    return found


def _is_buffer(node: fx.Node, value: Any) -> bool:
    """A plain tensor that a module holds."""
    source = getattr(node, "_dynamo_source", None)
    held = "NN_MODULE" in str(getattr(source, "guard_source", ""))
    if not held or type(value) is not torch.Tensor or isinstance(value, FakeTensor):
        return False
    if value.requires_grad or value.is_inference() or value.layout is not torch.strided or value.is_meta:
        return False
    if torch._C._functorch.is_functorch_wrapped_tensor(value):
        return False
    return isinstance(val(node), torch.Tensor) and all(isinstance(size, int) for size in val(node).shape)


def _build(graph: fx.Graph, node: fx.Node, rule: Triangle, mode: FakeTensorMode) -> fx.Node:
    value = val(node)
    rows, columns = value.shape[-2:]

    def call(target: Any, *args: Any, **kwargs: Any) -> fx.Node:
        made = graph.call_function(target, args, kwargs)
        made.meta["val"] = evaluate(made, mode)
        return made

    whole = {"dtype": torch.int64, "device": value.device}
    own = {"dtype": value.dtype, "device": value.device}
    users = list(node.users)
    last = graph.find_nodes(op="placeholder")[-1]
    with graph.inserting_before(last.next):
        row = call(aten.unsqueeze.default, call(aten.arange.default, rows, **whole), -1)
        offset = call(aten.sub.Tensor, call(aten.arange.default, columns, **whole), row)
        inside = call(aten.le.Scalar, offset, rule.diagonal)
        if value.dtype is torch.bool:
            result = inside if rule.inside else call(aten.logical_not.default, inside)
        else:
            numbers = [call(aten.full.default, [], number, **own) for number in (rule.inside, rule.outside)]
            result = call(aten.where.self, inside, *numbers)
        result = call(aten.view.default, result, list(value.shape))
    for user in users:
        user.replace_input_with(node, result)
    return result


def settle(gm: fx.GraphModule, known: Sequence[KnownBuffer]) -> tuple[list[KnownBuffer], list[Evidence]]:
    """Read those buffers again of which the tensor is still needed. Returns the others, with evidence."""
    kept: list[KnownBuffer] = []
    for each in known:
        if each.made._erased or not each.made.users:
            kept.append(each)
        else:
            each.made.replace_all_uses_with(each.placeholder)
        if not each.made._erased:
            erase_unused({each.made: None})
    if known:
        gm.recompile()
    notes = [
        Evidence(NAME, each.placeholder.name, "-", Status.APPLIED, f"{each}; checked at each call")
        for each in kept
    ]
    return kept, notes


_CHANGED = (
    "%s: so it was when it was compiled, and is not any more. Its calls run uncompiled. "
    "torch.compiler.reset() has them compiled anew."
)


def when_changed(
    known: Sequence[KnownBuffer], captured: Callable[..., Any]
) -> Callable[[Sequence[Any]], Callable[..., Any] | None]:
    """A function of the inputs of a call: `captured` where a buffer is not what it was, else None."""
    told: set[str] = set()

    def instead(inputs: Sequence[Any]) -> Callable[..., Any] | None:
        changed = next((each for each in known if not each.holds(inputs)), None)
        if changed is None:
            return None
        if str(changed) not in told:
            told.add(str(changed))
            log.warning(_CHANGED, changed)
        return captured

    return instead


def checked(
    compiled: Callable[..., Any], instead: Callable[[Sequence[Any]], Callable[..., Any] | None]
) -> Callable[..., Any]:
    """`compiled`, or what `instead` gives for the inputs of a call."""

    def run(*inputs: Any) -> Any:
        return (instead(inputs) or compiled)(*inputs)

    return run
