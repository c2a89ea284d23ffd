"""The part of a graph that makes a value, and running it on real numbers at chosen sizes."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import sympy
import torch
from torch import fx
from torch._ops import OpOverload

from fxopt.ir.facts import val
from fxopt.ir.known import literal
from fxopt.ir.linear import Unsupported
from fxopt.ir.same_value import DETACH

aten = torch.ops.aten

# Ops that read no more of their tensor arguments than shape, dtype and device.
METADATA_ONLY = frozenset(
    {
        aten.new_ones.default,
        aten.new_zeros.default,
        aten.new_full.default,
        aten.ones_like.default,
        aten.zeros_like.default,
        aten.full_like.default,
        aten.fill.Scalar,
    }
)

# Ops that read the contents of their first tensor only.
FIRST_ONLY = frozenset(
    {
        aten.to.other,
        aten.type_as.default,
        aten.expand_as.default,
        aten.view_as.default,
        aten.reshape_as.default,
    }
)

MAX_CONE = 256

# What ops raise for sizes, and for indices, that do not go together.
NOT_AT_THESE_SIZES = (RuntimeError, IndexError, OverflowError)


def reads(node: fx.Node) -> list[fx.Node]:
    """The tensors whose contents decide the contents of `node`."""
    if node.op == "placeholder":
        outer = outer_of(node)
        return [] if outer is None else [outer]
    if node.target in METADATA_ONLY:
        return []
    inputs = node.all_input_nodes[:1] if node.target in FIRST_ONLY else node.all_input_nodes
    return [arg for arg in inputs if not isinstance(val(arg), (torch.SymInt, int))]


def outer_of(node: fx.Node) -> fx.Node | None:
    """For an input of a sub-graph, what all calls of the sub-graph pass for it, if they pass the same."""
    outer = set(node.meta.get("fxopt_outer", ()))
    return outer.pop() if len(outer) == 1 else None


def inside(graph: fx.Graph, node: fx.Node) -> fx.Node:
    """`node`, or the input of the sub-graph `graph` that stands for it.

    Raises:
        LookupError: there is none.
    """
    if node.graph is graph:
        return node
    for placeholder in graph.find_nodes(op="placeholder"):
        if outer_of(placeholder) is node:
            found: fx.Node = placeholder
            return found
    raise LookupError(f"{node.name} is outside of the sub-graph")


def cone(root: fx.Node, reads: Callable[[fx.Node], list[fx.Node]] = reads) -> list[fx.Node]:
    """All that decides the contents of `root`, itself included, arguments first.

    Raises Unsupported when it is too large to look at.
    """
    done: dict[fx.Node, None] = {}
    pending = [root]
    while pending:
        node = pending[-1]
        missing = [arg for arg in reads(node) if arg not in done]
        if node in done or not missing:
            pending.pop()
            done[node] = None
        pending += missing if node not in done else []
        if len(done) > MAX_CONE:
            raise Unsupported(f"more than {MAX_CONE} operations")
    return list(done)


def from_sizes(root: fx.Node) -> bool:
    """`root` is made from sizes and constants of the code alone: no data, hence no gradient."""
    try:
        return data_in(cone(root)) is None
    except Unsupported:
        return False


def data_in(nodes: Sequence[fx.Node]) -> fx.Node | None:
    """The first of a `cone` that is neither computed nor a literal of the code."""
    given = (node for node in nodes if node.op != "call_function" and not reads(node))
    return next((node for node in given if literal(node) is None), None)


def symbols(nodes: list[fx.Node]) -> dict[sympy.Symbol, int | None]:
    """The symbols in the sizes and integer arguments of `nodes`, with the values they have while tracing."""
    found: dict[sympy.Symbol, int | None] = {}
    for node in nodes:
        for value in (val(node), *(val(arg) for arg in node.all_input_nodes)):
            sizes = (*value.shape, *value.stride()) if isinstance(value, torch.Tensor) else (value,)
            for size in sizes:
                if isinstance(size, torch.SymInt):
                    _note_symbols(size, found)
    return dict(sorted(found.items(), key=lambda item: str(item[0])))


def _note_symbols(size: torch.SymInt, found: dict[sympy.Symbol, int | None]) -> None:
    expression = size.node.expr
    for symbol in expression.free_symbols:
        found.setdefault(symbol, None)
    if expression.is_Symbol and size.node.has_hint():
        found[expression] = size.node.hint


def run(nodes: Sequence[fx.Node], at: Mapping[sympy.Symbol, int]) -> torch.Tensor:
    """Compute the last of `nodes` (a `cone`) on the CPU, each symbol replaced by the integer in `at`.

    Raises:
        Unsupported: an op whose result does not depend on its arguments alone, has not the recorded form, or
            fails at these sizes.
    """
    try:
        found = run_all(nodes, at)[nodes[-1]]
    except NOT_AT_THESE_SIZES as error:
        raise Unsupported(f"{nodes[-1].name}, which fails at these sizes: {error}") from error
    if not isinstance(found, torch.Tensor):
        raise Unsupported(f"{nodes[-1].name}, which is no tensor")
    return found


def run_all(
    nodes: Sequence[fx.Node],
    at: Mapping[sympy.Symbol, int],
    given: Callable[[fx.Node], torch.Tensor] | None = None,
) -> dict[fx.Node, Any]:
    """Compute `nodes` on the CPU, as `run` does. `given` makes those that can not be computed."""
    results: dict[fx.Node, Any] = {}
    with torch.no_grad(), torch.autocast("cpu", enabled=False):
        for node in nodes:
            try:
                results[node] = _run_node(node, results, at)
            except Unsupported:
                if given is None:
                    raise
                results[node] = given(node)
    return results


def _run_node(node: fx.Node, results: dict[fx.Node, Any], at: Mapping[sympy.Symbol, int]) -> Any:
    op = node.target
    outer = outer_of(node)
    if outer is not None:
        _check_form(node, results[outer], at)
        return results[outer]
    held = literal(node)
    if held is not None:
        return held
    if node.op != "call_function" or not isinstance(op, OpOverload):
        raise Unsupported(f"{node.name}, which is no operation on sizes alone")
    if (op._schema.is_mutable and op is not DETACH) or torch.Tag.nondeterministic_seeded in op.tags:
        raise Unsupported(f"{op}")
    found = call_on_cpu(node, lambda arg: results[arg] if arg in results else stand_in(val(arg), at))
    _check_form(node, found, at)
    return found


def call_on_cpu(node: fx.Node, value_of: Callable[[fx.Node], Any]) -> Any:
    """Run the op of a node, on the values that its arguments are given."""

    def concrete(arg: Any) -> Any:
        if isinstance(arg, fx.Node):
            return value_of(arg)
        if isinstance(arg, (list, tuple)):
            return type(arg)(concrete(item) for item in arg)
        return torch.device("cpu") if isinstance(arg, torch.device) else arg

    args = tuple(concrete(arg) for arg in node.args)
    kwargs = {name: concrete(arg) for name, arg in node.kwargs.items()}
    formals = node.target._schema.arguments  # type: ignore[union-attr]
    if any(formal.name == "device" for formal in formals[len(args) :]):
        kwargs["device"] = torch.device("cpu")
    return node.target(*args, **kwargs)  # type: ignore[operator]


def stand_in(value: Any, at: Mapping[sympy.Symbol, int]) -> Any:
    """An integer for a size; for a tensor of which only the metadata is read, one without contents."""
    if isinstance(value, torch.Tensor):
        return torch.empty(shape_at(value, at), dtype=value.dtype, device="cpu")
    return size_at(value, at)


def _check_form(node: fx.Node, found: Any, at: Mapping[sympy.Symbol, int]) -> None:
    recorded = val(node)
    if not isinstance(recorded, torch.Tensor) or not isinstance(found, torch.Tensor):
        raise Unsupported(f"{node.name}, which is no tensor")
    if found.dtype != recorded.dtype or list(found.shape) != shape_at(recorded, at):
        raise Unsupported(f"{node.name} as {found.dtype} {list(found.shape)}, which is not what was recorded")


def shape_at(value: torch.Tensor, at: Mapping[sympy.Symbol, int]) -> list[int]:
    """The shape of a value, each symbol replaced by the integer in `at`."""
    return [size_at(size, at) for size in value.shape]


def size_at(size: Any, at: Mapping[sympy.Symbol, int]) -> int:
    """A size, or an expression of sizes, each symbol replaced by the integer in `at`.

    Raises:
        Unsupported: it has other symbols.
    """
    expression = size.node.expr if isinstance(size, torch.SymInt) else sympy.sympify(size)
    found = expression.xreplace({symbol: sympy.Integer(number) for symbol, number in at.items()})
    if not found.is_Integer:
        raise Unsupported(f"the size {size}")
    return int(found)
