"""``linear(x, w, b)`` with a parameter w -> ``fxopt::qlinear`` of what w is when it is quantized.

Only on request (`options={"quantize": ...}`), which `fxopt.ir.quantization_policy` turns into a format for
each layer. The graph gets inputs for the codes and scales, which are made of the parameter: at this point,
and again once it has changed (`fxopt.runtime.packed_weights`). Assumed: nothing; the answer differs from
eager's by what rounding the weight loses, which the report tells in decibels.
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
from fxopt.ir.layer_names import layer_name
from fxopt.ir.ops.qlinear import QLINEAR
from fxopt.ir.propagate import fake_mode_of
from fxopt.ir.quantization_policy import Layer, Scheme, scheme_of
from fxopt.ir.quantize import NotFinite
from fxopt.runtime.packed_weights import HELD_KEY, PACKED_KEY, STORE, Packed, Spec

aten = torch.ops.aten

_PRODUCTS = (aten.mm.default, aten.matmul.default)
_TURNS = (aten.t.default, aten.numpy_T.default)
_FLOATS = (torch.float32, torch.bfloat16, torch.float16)


@dataclass(frozen=True)
class SubstituteQlinear:
    """Linear layers with quantized weights."""

    name: ClassVar[str] = "substitute-qlinear"
    anchors: ClassVar[tuple[OpOverload, ...]] = (aten.linear.default, aten.addmm.default, *_PRODUCTS)
    after: ClassVar[tuple[str, ...]] = ("eliminate-noops",)

    def match(self, node: fx.Node) -> Match | Miss | None:
        if not _is_shown(node.graph):
            return None
        x, operand, bias, transposed = _operands(node)
        weight, turned = _parameter(operand)
        if weight is None:
            is_linear = node.target is aten.linear.default
            return Miss("a weight that is a parameter of the graph", _what(operand)) if is_linear else None
        if facts.rank(weight) != 2 or (bias is not None and facts.rank(bias) != 1):
            return None
        if node.target is aten.addmm.default and any(facts.argument(node, n) != 1 for n in ("alpha", "beta")):
            return Miss("a product with factors 1", "another alpha or beta")
        parts = {"x": x, "weight": weight, "bias": bias, "transposed": transposed != turned}
        return Match(node, (node,), parts | {"layer": layer_name(weight), "found": {}})

    def legal(self, match: Match, ctx: Context) -> Verdict:
        weight, node = match["weight"], match.anchor
        held = weight.meta[HELD_KEY]
        if ctx.facts.differentiates(node) and weight.meta.get("fxopt_needs_grad"):
            return Verdict.no("its weight is trained")
        if type(held) not in (torch.Tensor, torch.nn.Parameter) or held.is_meta:
            return Verdict.no(f"its weight is a {type(held).__name__}")
        if held.dtype not in _FLOATS or facts.dtype(node) not in _FLOATS:
            return Verdict.no(f"wanted floats of 16 or 32 bits, saw {held.dtype}, {facts.dtype(node)}")
        writer = ctx.facts.written_after(weight, weight)
        if writer is not None:
            return Verdict.no(f"its weight is written by {writer.name} ({facts.location(writer)})")
        scheme = scheme_of(_layer(match), ctx.options)
        if not isinstance(scheme, Scheme):
            return Verdict.no(scheme)
        spec = Spec(scheme.format, scheme.group_size, match["transposed"])
        try:
            form = STORE.form(held, spec, checked=True)
        except NotFinite as error:
            return Verdict.no(str(error))
        match["found"].update(scheme=scheme, spec=spec, form=form)
        return Verdict.yes()

    def profit(self, match: Match, ctx: Context) -> Verdict:
        form, held = match["found"]["form"], match["weight"].meta[HELD_KEY]
        dense = held.numel() * held.element_size()
        return Verdict.yes(f"{match['found']['scheme']}, {dense} B -> {form.weight.nbytes} B of weights")

    def replace(self, match: Match, graph: fx.Graph) -> fx.Node:
        node, found = match.anchor, match["found"]
        weight = found["form"].weight
        parts = _inputs(graph, match["weight"], found["spec"], weight)
        x = match["x"]
        if facts.dtype(x) != facts.dtype(node):  # under autocast
            x = graph.call_function(aten.to.dtype, (x, facts.dtype(node)))
        kinds = {"format": weight.format.name, "group_size": weight.group_size}
        kinds["activation"] = found["scheme"].activation
        names = ("codes", "scales", "offsets", "columns")
        args = (x, *(parts.get(name) for name in names), match["bias"])
        return graph.call_function(QLINEAR.overload, args, kinds)


def _operands(node: fx.Node) -> tuple[Any, Any, Any, bool]:
    """x, the weight, the bias, and whether the weight is (K, N)."""
    if node.target is aten.linear.default:
        return node.args[0], node.args[1], facts.argument(node, "bias"), False
    if node.target is aten.addmm.default:
        return node.args[1], node.args[2], node.args[0], True
    return node.args[0], node.args[1], None, True


def _parameter(operand: Any) -> tuple[fx.Node | None, bool]:
    """The input that an operand is, and whether it is its transpose."""
    turned = False
    while is_call(operand, *_TURNS, aten.transpose.int, aten.permute.default) and facts.rank(operand) == 2:
        plain = is_call(operand, aten.permute.default) and list(operand.args[1]) in ([0, 1], [-2, -1])
        plain = plain or (is_call(operand, aten.transpose.int) and operand.args[1] % 2 == operand.args[2] % 2)
        turned = turned if plain else not turned
        operand = operand.args[0]
    is_input = isinstance(operand, fx.Node) and HELD_KEY in operand.meta
    return (operand if is_input else None), turned


def _is_shown(graph: fx.Graph) -> bool:
    """Whether anything is to be quantized: passes may look at parameters then, but not in sub-graphs."""
    inputs = graph.find_nodes(op="placeholder")
    outer = [each for node in inputs for each in node.meta.get("fxopt_outer", ()) if each is not None]
    return any(HELD_KEY in each.meta for each in (*inputs, *outer))


def _what(operand: Any) -> str:
    if isinstance(operand, fx.Node) and operand.op == "placeholder":
        inner = "an input of a sub-graph, as of a checkpointed region"
        return inner if "fxopt_outer" in operand.meta else f"{operand.name}, which is no parameter"
    return f"the result of {operand.target}" if isinstance(operand, fx.Node) else str(operand)


def _layer(match: Match) -> Layer:
    weight = match["weight"]
    rows, columns = weight.meta[HELD_KEY].shape
    shape = (columns, rows) if match["transposed"] else (rows, columns)
    reads = [user for user in weight.users if is_call(user, aten.embedding.default)]
    tied = f"an embedding ({reads[0].name})" if reads else ""
    return Layer(match["layer"], shape, tied, _is_kept_wide(weight))


def _is_kept_wide(weight: fx.Node) -> bool:
    """A float32 weight in a graph most of whose weights have 16 bits."""
    if facts.dtype(weight) is not torch.float32:
        return False
    held = [node for node in weight.graph.find_nodes(op="placeholder") if HELD_KEY in node.meta]
    matrices = [node for node in held if facts.rank(node) == 2]
    narrow = [node for node in matrices if facts.dtype(node).itemsize == 2]
    return 2 * len(narrow) > len(matrices)


def _inputs(graph: fx.Graph, source: fx.Node, spec: Spec, weight: Any) -> dict[str, fx.Node]:
    """Inputs for the tensors of a quantized weight, by name; those that another layer made of it."""
    placeholders = graph.find_nodes(op="placeholder")
    packed = Packed(placeholders.index(source), spec, tuple(weight.tensors))
    made = [node for node in placeholders if node.meta.get(PACKED_KEY, (None,))[0] == packed]
    if made:
        return {node.meta[PACKED_KEY][1]: node for node in made}
    mode, last = fake_mode_of(graph), placeholders[-1]
    assert mode is not None
    found: dict[str, fx.Node] = {}
    for name, tensor in weight.tensors.items():
        with graph.inserting_after(last):
            last = graph.placeholder(f"{source.name}_{name}")
        last._dynamo_source = None  # AOTAutograd asks each input for one
        last.meta[PACKED_KEY] = packed, name
        last.meta["val"] = last.meta["example_value"] = mode.from_tensor(tensor, static_shapes=True)
        found[name] = last
    return found
