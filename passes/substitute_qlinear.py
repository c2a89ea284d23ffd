"""``linear(x, w, b)`` with a parameter w -> ``fxopt::qlinear`` of what w is when it is quantized.

Only on request (`options={"quantize": ...}`), which `fxopt.ir.quantization_policy` turns into a format for
each layer. The graph gets inputs for the codes and scales, which are made of the parameter: at this point,
and again once it has changed (`fxopt.runtime.packed_weights`). w may be a matrix of a stack, as that of an
expert: it is picked from the codes then. Assumed: nothing; the answer differs from eager's by
what rounding the weight loses, which the report tells in decibels.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import fx
from torch._ops import OpOverload

from fxopt.ir import facts
from fxopt.ir.contract import Context, Match, Miss, Verdict
from fxopt.ir.facts import is_call
from fxopt.ir.layer_names import layer_name, parameter_name
from fxopt.ir.ops.qlinear import QLINEAR

from .packed_parameters import decide, is_shown, packed_inputs, parameter, unturned

aten = torch.ops.aten

_PRODUCTS = (aten.mm.default, aten.matmul.default)


@dataclass(frozen=True)
class SubstituteQlinear:
    """Linear layers with quantized weights."""

    name: ClassVar[str] = "substitute-qlinear"
    anchors: ClassVar[tuple[OpOverload, ...]] = (aten.linear.default, aten.addmm.default, *_PRODUCTS)
    after: ClassVar[tuple[str, ...]] = ("eliminate-noops",)

    def match(self, node: fx.Node) -> Match | Miss | None:
        if not is_shown(node.graph):
            return None
        x, operand, bias, transposed = _operands(node)
        weight, turned, pick = _weight(operand)
        if weight is None:
            is_linear = node.target is aten.linear.default
            return Miss("a weight that is a parameter of the graph", _what(operand)) if is_linear else None
        if facts.rank(weight) != (2 if pick is None else 3) or (bias is not None and facts.rank(bias) != 1):
            return None
        if node.target is aten.addmm.default and any(facts.argument(node, n) != 1 for n in ("alpha", "beta")):
            return Miss("a product with factors 1", "another alpha or beta")
        parts = {"x": x, "weight": weight, "bias": bias, "transposed": transposed != turned, "pick": pick}
        return Match(node, (node,), parts | {"found": {}})

    def legal(self, match: Match, ctx: Context) -> Verdict:
        weight = match["weight"]
        name = layer_name(weight) if match["pick"] is None else parameter_name(weight)
        return decide(match, name, ctx)

    def profit(self, match: Match, ctx: Context) -> Verdict:
        return Verdict.yes(match["found"]["chosen"].sizes(match["weight"]))

    def replace(self, match: Match, graph: fx.Graph) -> fx.Node:
        node, chosen = match.anchor, match["found"]["chosen"]
        parts = packed_inputs(graph, match["weight"], chosen)
        if match["pick"] is not None:
            count = facts.shape(match["weight"])[0]
            parts = [_picked(graph, part, match["pick"], count) for part in parts]
        x = match["x"]
        if facts.dtype(x) != facts.dtype(node):  # under autocast
            x = graph.call_function(aten.to.dtype, (x, facts.dtype(node)))
        return graph.call_function(QLINEAR.overload, (x, *parts, match["bias"]), chosen.attributes)


def _operands(node: fx.Node) -> tuple[Any, Any, Any, bool]:
    """x, the weight, the bias, and whether the weight is (K, N)."""
    if node.target is aten.linear.default:
        return node.args[0], node.args[1], facts.argument(node, "bias"), False
    if node.target is aten.addmm.default:
        return node.args[1], node.args[2], node.args[0], True
    return node.args[0], node.args[1], None, True


def _weight(operand: Any) -> tuple[fx.Node | None, bool, fx.Node | None]:
    """The input that an operand is of, whether transposed, and what picks it from a stack of matrices."""
    base, turned = unturned(operand)
    pick = base if _picks_one(base) else None
    weight, inner = parameter(base if pick is None else base.args[0])
    return weight, turned != inner, pick


def _picks_one(node: Any) -> bool:
    """``stack[3]``."""
    plain = is_call(node, aten.select.int) and isinstance(node.args[2], int)
    return plain and facts.rank(node) == 2 and node.args[1] in (0, -3)


def _picked(graph: fx.Graph, part: fx.Node | None, pick: fx.Node, count: Any) -> fx.Node | None:
    """What `pick` takes of the codes, or scales, of `count` matrices below each other."""
    if part is None:
        return None
    stack = graph.call_function(aten.unflatten.int, (part, 0, [count, -1]))
    return graph.call_function(aten.select.int, (stack, 0, pick.args[2]))


def _what(operand: Any) -> str:
    if isinstance(operand, fx.Node) and operand.op == "placeholder":
        inner = "an input of a sub-graph, as of a checkpointed region"
        return inner if "fxopt_outer" in operand.meta else f"{operand.name}, which is no parameter"
    return f"the result of {operand.target}" if isinstance(operand, fx.Node) else str(operand)
