"""Quantized weights as inputs of a graph: what passes may look at, and what its calls have to be given."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx
from torch._subclasses import FakeTensor

from fxopt.runtime.packed_weights import HELD_KEY, PACKED_KEY, Packed


def show_parameters(gm: fx.GraphModule, inputs: Sequence[Any]) -> None:
    """Let passes see the parameters of modules that `inputs` are, and frozen tensors in their place."""
    for node, value in zip(gm.graph.find_nodes(op="placeholder"), inputs, strict=False):
        if _is_of_module(node) and isinstance(value, torch.Tensor) and not isinstance(value, FakeTensor):
            node.meta[HELD_KEY] = value


def hide_parameters(gm: fx.GraphModule) -> None:
    """Forget what `show_parameters` noted: a graph must not keep parameters alive."""
    for node in gm.graph.find_nodes(op="placeholder"):
        node.meta.pop(HELD_KEY, None)


def _is_of_module(node: fx.Node) -> bool:
    source = getattr(node, "_dynamo_source", None)
    return "NN_MODULE" in str(getattr(source, "guard_source", "")) or node.meta.get("fxopt_parameter", False)


@dataclass(frozen=True)
class PackedInputs:
    """The inputs that were added to a graph, from number `first` on."""

    packed: tuple[Packed, ...]
    first: int


def packed_inputs(gm: fx.GraphModule) -> PackedInputs | None:
    """Those that passes have added, or None."""
    placeholders = gm.graph.find_nodes(op="placeholder")
    marked = [place for place, node in enumerate(placeholders) if PACKED_KEY in node.meta]
    if not marked:
        return None
    packed = dict.fromkeys(placeholders[place].meta[PACKED_KEY][0] for place in marked)
    return PackedInputs(tuple(packed), marked[0])
