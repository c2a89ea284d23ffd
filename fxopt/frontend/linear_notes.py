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
from fxopt.ir.layer_names import layer_name
from fxopt.ir.linear_notes import LinearNote, LinearNotes
from fxopt.ir.ops.qlinear import QLINEAR
from fxopt.report.record import GraphRecord
from fxopt.runtime.packed_weights import HELD_KEY, PACKED_KEY, STORE

NAME = "substitute-qlinear"


def linear_notes(gm: fx.GraphModule, evidence: Iterable[Evidence]) -> LinearNotes:
    """Layers with quantized weights, and those that were left; empty where nothing was to be quantized.

    What computes a layer is known after lowering only: until then it is the name of the node.
    """
    found = LinearNotes(_quantized(gm, node) for node in gm.graph.nodes if is_call(node, QLINEAR.overload))
    left = [entry for entry in evidence if entry.rewrite == NAME and entry.status is not Status.APPLIED]
    nodes = {node.name: node for node in gm.graph.nodes}
    for entry in left:
        weight = _weight_of(nodes.get(entry.anchor))
        if weight is not None:
            found.append(_dense(weight, "a parameter", entry.reason))
    if found:
        found += [_dense(node, "a stack of matrices", "it is no linear layer") for node in _stacks(gm)]
    return found


def note_routes(record: GraphRecord) -> None:
    """Complete the record's notes by the providers that lowering has chosen."""
    record.linears = LinearNotes(
        replace(note, route=f"fxopt::qlinear ({record.chosen[note.route]})") if note.is_quantized else note
        for note in record.linears
    )


def _quantized(gm: fx.GraphModule, node: fx.Node) -> LinearNote:
    x, codes, *others = node.args[:5]
    while isinstance(codes, fx.Node) and codes.op == "call_function":  # bytes, seen as float8
        codes = codes.args[0]
    assert isinstance(codes, fx.Node)
    group, kinds = node.kwargs["group_size"], node.kwargs
    form = f"{kinds['format']} of groups of {group}" if group != val(x).shape[-1] else str(kinds["format"])
    if kinds["activation"]:
        form += f", {kinds['activation']} activations"
    after = sum(_bytes(each) for each in (codes, *others) if isinstance(each, fx.Node))
    if PACKED_KEY not in codes.meta:
        dense = int(val(node.args[1]).shape[0]) * int(val(x).shape[-1]) * val(x).dtype.itemsize
        return LinearNote(layer_name(codes), form, "QuantizedLinear", node.name, dense, after, None, "")
    packed = codes.meta[PACKED_KEY][0]
    source = gm.graph.find_nodes(op="placeholder")[packed.source]
    decibels = STORE.form(source.meta[HELD_KEY], packed.spec).decibels
    return LinearNote(layer_name(source), form, "a parameter", node.name, _bytes(source), after, decibels, "")


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


def _dense(weight: fx.Node, source: str, reason: str) -> LinearNote:
    size = _bytes(weight)
    return LinearNote(layer_name(weight), "", source, "the host", size, size, None, reason)


def _bytes(node: fx.Node) -> int:
    return int(numel(val(node))) * int(val(node).dtype.itemsize)
