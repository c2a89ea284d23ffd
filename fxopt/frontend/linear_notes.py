"""What became of the linear layers of a graph, read from it once the passes have run."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import replace
from typing import Any

import torch
from torch import fx

from fxopt.ir.contract import Evidence, Status
from fxopt.ir.cost import numel
from fxopt.ir.facts import is_call, val
from fxopt.ir.layer_names import layer_name, parameter_name
from fxopt.ir.linear_notes import LinearNote, LinearNotes
from fxopt.ir.ops.expert_linear import EXPERT_LINEAR
from fxopt.ir.ops.qlinear import QLINEAR
from fxopt.report.record import GraphRecord
from fxopt.runtime.packed_weights import HELD_KEY, PACKED_KEY, STORE

aten = torch.ops.aten

_PRODUCTS = (
    aten.addbmm.default, aten.addmm.default, aten.addmv.default, aten.baddbmm.default, aten.bilinear.default,
    aten._trilinear.default, aten.bmm.default, aten.einsum.default, aten.linear.default, aten.matmul.default,
    aten.mm.default, aten.mv.default,
)  # fmt: skip
NAMES = ("substitute-qlinear", "substitute-expert-products")


def linear_notes(gm: fx.GraphModule, evidence: Iterable[Evidence]) -> LinearNotes:
    """Layers with quantized weights, and those that were left; empty where nothing was to be quantized.

    What computes a layer is known after lowering only: until then it is the op, and the name of the node.
    """
    calls = [node for node in gm.graph.nodes if is_call(node, QLINEAR.overload, EXPERT_LINEAR.overload)]
    # Products with single matrices of a stack are one layer.
    first = {_codes(node) if _is_picked(node) else node: node for node in reversed(calls)}
    found = LinearNotes(_quantized(gm, node) for node in reversed(first.values()))
    left = [entry for entry in evidence if entry.rewrite in NAMES and entry.status is not Status.APPLIED]
    nodes = {node.name: node for node in gm.graph.nodes}
    for entry in left:
        weight = _weight_of(nodes.get(entry.anchor))
        if weight is not None:
            found.append(_dense(weight, "a parameter", entry.reason))
    told = {note.name for note in found}
    others = [node for node in _multiplied(gm) if _name(node) not in told]
    if found:
        others += [node for node in _stacks(gm) if _name(node) not in told and node not in others]
    found += [_dense(node, "a parameter", "no product that fxopt knows reads it") for node in others]
    return found


def note_routes(record: GraphRecord) -> None:
    """Complete the record's notes by the providers that lowering has chosen."""
    record.linears = LinearNotes(
        replace(note, route=_route(note, record)) if note.is_quantized else note for note in record.linears
    )


def _route(note: LinearNote, record: GraphRecord) -> str:
    op, node = note.route.split()
    return f"fxopt::{op} ({record.chosen[node]})"


def _parts(node: fx.Node) -> list[fx.Node | None]:
    """Codes, scales, offsets and columns of a product's weight, as the graph is given them."""
    return [_input(each) for each in node.args[2 if is_call(node, EXPERT_LINEAR.overload) else 1 : 5]]


def _input(part: Any) -> fx.Node | None:
    """Behind views, as bytes that are seen as float8, and picks from a stack."""
    while isinstance(part, fx.Node) and part.op == "call_function":
        part = part.args[0]
    return part if isinstance(part, fx.Node) else None


def _codes(node: fx.Node) -> fx.Node:
    found = _parts(node)[0]
    assert found is not None
    return found


def _is_picked(node: fx.Node) -> bool:
    """Whether the weight of a linear layer is one of a stack."""
    return val(_codes(node)).shape[0] != val(node).shape[-1] and is_call(node, QLINEAR.overload)


def _quantized(gm: fx.GraphModule, node: fx.Node) -> LinearNote:
    x, codes, parts = node.args[0], _codes(node), _parts(node)
    group, kinds = node.kwargs["group_size"], node.kwargs
    op = EXPERT_LINEAR if is_call(node, EXPERT_LINEAR.overload) else QLINEAR
    route = f"{op.name} {node.name}"
    form = f"{kinds['format']} of groups of {group}" if group != val(x).shape[-1] else str(kinds["format"])
    if kinds["activation"]:
        form += f", {kinds['activation']} activations"
    after = sum(_bytes(each) for each in parts if each is not None)
    if PACKED_KEY not in codes.meta:
        dense = int(val(codes).shape[0]) * int(val(x).shape[-1]) * val(x).dtype.itemsize
        return LinearNote(layer_name(codes), form, "QuantizedLinear", route, dense, after, None, "")
    packed = codes.meta[PACKED_KEY][0]
    source = gm.graph.find_nodes(op="placeholder")[packed.source]
    decibels = STORE.form(source.meta[HELD_KEY], packed.spec).decibels
    return LinearNote(_name(source), form, "a parameter", route, _bytes(source), after, decibels, "")


def _name(weight: fx.Node) -> str:
    """Of a linear layer, or of a stack of matrices: a module may have several."""
    return parameter_name(weight) if val(weight).dim() == 3 else layer_name(weight)


def _weight_of(node: fx.Node | None) -> fx.Node | None:
    """The largest parameter that a product reads, through views."""
    reads: list[Any] = [] if node is None else list(node.all_input_nodes)
    for _ in range(2):
        reads += [each for read in reads if read.op == "call_function" for each in read.all_input_nodes]
    held = [each for each in reads if HELD_KEY in each.meta and val(each).dim() >= 2]
    return max(held, key=lambda each: numel(val(each)), default=None)


def _stacks(gm: fx.GraphModule) -> Iterator[fx.Node]:
    for node in gm.graph.find_nodes(op="placeholder"):
        if isinstance(node.meta.get(HELD_KEY), torch.nn.Parameter) and val(node).dim() == 3 and node.users:
            yield node


def _multiplied(gm: fx.GraphModule) -> Iterator[fx.Node]:
    """Matrices that products of other kinds read, as `einsum` or `bilinear`, themselves or through views."""
    for node in gm.graph.find_nodes(op="placeholder"):
        if HELD_KEY not in node.meta or val(node).dim() < 2 or not val(node).is_floating_point():
            continue
        readers = list(node.users)
        for reader in readers:  # those behind a view are added to its end
            readers += reader.users if getattr(reader.target, "is_view", False) else ()
        if any(reader.target in _PRODUCTS for reader in readers):
            yield node


def _dense(weight: fx.Node, source: str, reason: str) -> LinearNote:
    size = _bytes(weight)
    return LinearNote(_name(weight), "", source, "the host", size, size, None, reason)


def _bytes(node: fx.Node) -> int:
    return int(numel(val(node))) * int(val(node).dtype.itemsize)
