"""A parameter that a product reads, what it is when it is quantized, and the inputs of a graph for that."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from fxopt.ir import facts
from fxopt.ir.contract import Context, Match, Verdict
from fxopt.ir.facts import is_call
from fxopt.ir.propagate import fake_mode_of
from fxopt.ir.quantization_policy import Layer, Scheme, scheme_of
from fxopt.ir.quantize import NotFinite
from fxopt.runtime.packed_weights import HELD_KEY, PACKED_KEY, STORE, Form, Packed, Spec

from .transpositions import swaps

aten = torch.ops.aten

_FLOATS = (torch.float32, torch.bfloat16, torch.float16)
_TURNS = (
    aten.t.default, aten.numpy_T.default, aten.mT.default, aten.transpose.int, aten.permute.default,
)  # fmt: skip
_PARTS = ("codes", "scales", "offsets", "columns")


@dataclass(frozen=True)
class Chosen:
    """How a parameter is quantized, and what it then is."""

    scheme: Scheme
    spec: Spec
    form: Form

    def sizes(self, weight: fx.Node) -> str:
        """The format, and bytes before and after."""
        held = weight.meta[HELD_KEY]
        dense = held.numel() * held.element_size()
        return f"{self.scheme}, {dense} B -> {self.form.weight.nbytes} B of weights"

    @property
    def attributes(self) -> dict[str, Any]:
        """Of the ops that multiply with it."""
        weight = self.form.weight
        kinds = {"format": weight.format.name, "group_size": weight.group_size}
        return kinds | {"activation": self.scheme.activation}


def parameter(operand: Any) -> tuple[fx.Node | None, bool]:
    """The input that an operand is, and whether it is its transpose."""
    base, turned = unturned(operand)
    is_input = isinstance(base, fx.Node) and HELD_KEY in base.meta
    return (base if is_input else None), turned


def unturned(operand: Any) -> tuple[Any, bool]:
    """What an operand is but for transposition of its last two dimensions, and whether it is transposed."""
    turned = False
    while is_call(operand, *_TURNS) and (swapped := swaps(operand)) is not None:
        turned, operand = turned != swapped, operand.args[0]
    return operand, turned


def is_shown(graph: fx.Graph) -> bool:
    """Whether anything is to be quantized: passes may look at parameters then, but not in sub-graphs."""
    inputs = graph.find_nodes(op="placeholder")
    outer = [each for node in inputs for each in node.meta.get("fxopt_outer", ()) if each is not None]
    return any(HELD_KEY in each.meta for each in (*inputs, *outer))


def decide(match: Match, name: str, ctx: Context) -> Verdict:
    """Whether the parameter `name`, the match's "weight", can be quantized; how is kept with the match.

    It has "transposed", and "found" for what is kept, too.
    """
    chosen = _choose(match["weight"], match.anchor, name, match["transposed"], ctx)
    if not isinstance(chosen, Chosen):
        return Verdict.no(chosen)
    match["found"]["chosen"] = chosen
    return Verdict.yes()


def _choose(weight: fx.Node, node: fx.Node, name: str, transposed: bool, ctx: Context) -> Chosen | str:
    """How a parameter that the product `node` reads is quantized, or why it is left alone."""
    held = weight.meta[HELD_KEY]
    if ctx.facts.differentiates(node) and weight.meta.get("fxopt_needs_grad"):
        return "its weight is trained"
    if type(held) not in (torch.Tensor, torch.nn.Parameter) or held.is_meta:
        return f"its weight is a {type(held).__name__}"
    if held.dtype not in _FLOATS or facts.dtype(node) not in _FLOATS:
        return f"wanted floats of 16 or 32 bits, saw {held.dtype}, {facts.dtype(node)}"
    writer = ctx.facts.written_after(weight, weight)
    if writer is not None:
        return f"its weight is written by {writer.name} ({facts.location(writer)})"
    scheme = scheme_of(_layer(weight, name, transposed), ctx.options)
    if not isinstance(scheme, Scheme):
        return scheme
    spec = Spec(scheme.format, scheme.group_size, transposed)
    try:
        return Chosen(scheme, spec, STORE.form(held, spec, checked=True))
    except NotFinite as error:
        return str(error)


def _layer(weight: fx.Node, name: str, transposed: bool) -> Layer:
    rows, columns = weight.meta[HELD_KEY].shape[-2:]
    shape = (columns, rows) if transposed else (rows, columns)
    reads = [user for user in weight.users if is_call(user, aten.embedding.default)]
    tied = f"an embedding ({reads[0].name})" if reads else ""
    return Layer(name, shape, tied, _is_kept_wide(weight))


def _is_kept_wide(weight: fx.Node) -> bool:
    """A float32 weight in a graph most of whose weights have 16 bits."""
    if facts.dtype(weight) is not torch.float32:
        return False
    held = [node for node in weight.graph.find_nodes(op="placeholder") if HELD_KEY in node.meta]
    matrices = [node for node in held if facts.rank(node) in (2, 3)]
    narrow = [node for node in matrices if facts.dtype(node).itemsize == 2]
    return 2 * len(narrow) > len(matrices)


def packed_inputs(graph: fx.Graph, source: fx.Node, chosen: Chosen) -> list[fx.Node | None]:
    """Inputs for codes, scales, offsets and columns; those that another product made of the parameter."""
    weight, placeholders = chosen.form.weight, graph.find_nodes(op="placeholder")
    packed = Packed(placeholders.index(source), chosen.spec, tuple(weight.tensors))
    made = [node for node in placeholders if node.meta.get(PACKED_KEY, (None,))[0] == packed]
    found = {node.meta[PACKED_KEY][1]: node for node in made}
    mode, last = fake_mode_of(graph), placeholders[-1]
    assert mode is not None
    # A weight that is read as it is and transposed has two forms.
    others = {node.meta[PACKED_KEY][0] for node in placeholders if PACKED_KEY in node.meta}
    count = len([each for each in others if each.source == packed.source])
    label = f"{source.name}_{count}" if count else source.name
    for name, tensor in () if found else weight.tensors.items():
        with graph.inserting_after(last):
            last = graph.placeholder(f"{label}_{name}")
        last._dynamo_source = None  # AOTAutograd asks each input for one
        last.meta[PACKED_KEY] = packed, name
        last.meta["val"] = last.meta["example_value"] = mode.from_tensor(tensor, static_shapes=True)
        found[name] = last
    return [found.get(name) for name in _PARTS]
