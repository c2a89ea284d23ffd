"""Random numbers of a graph made functions of seeds, which kernels can compute where they are needed.

The seeds are drawn at the beginning, from torch's generator: `torch.manual_seed` decides what they are.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import fx

from fxopt.ir.ops import register_ops
from fxopt.ir.ops.uniform import BITS

aten, prims = torch.ops.aten, torch.ops.prims

_DRAWS = (aten.rand.default, aten.rand_like.default)


def seed_random_numbers(graph: fx.Graph) -> int:
    """Replace draws of uniform numbers by ``fxopt::uniform`` of one seed each; how many."""
    register_ops()
    drawn = [node for node in graph.nodes if node.target in _DRAWS and node.meta["val"].dtype in BITS]
    for device in dict.fromkeys(node.meta["val"].device for node in drawn):
        own = [node for node in drawn if node.meta["val"].device == device]
        seeds = _seeds(graph, own[0], len(own), device)
        for place, node in enumerate(own):
            _replace(graph, node, seeds, place)
    return len(drawn)


def _seeds(graph: fx.Graph, first: fx.Node, count: int, device: torch.device) -> fx.Node:
    with graph.inserting_before(first):
        limits = (0, 2**63 - 1, [count])
        seeds = graph.call_function(aten.randint.low, limits, {"dtype": torch.int64, "device": device})
    seeds.meta["val"] = first.meta["val"].new_empty([count], dtype=torch.int64)
    return seeds


def _replace(graph: fx.Graph, node: fx.Node, seeds: fx.Node, place: int) -> None:
    value = node.meta["val"]
    source: Any = node.args[0]
    with graph.inserting_before(node):
        seed = graph.call_function(aten.select.int, (seeds, 0, place))
        size = _sizes(graph, source) if isinstance(source, fx.Node) else source
        bits = BITS[value.dtype]
        drawn = graph.call_function(torch.ops.fxopt.uniform.default, (size, seed, bits))
        drawn.meta["val"] = value.new_empty(value.shape, dtype=torch.float32)
        result = drawn
        if value.dtype != torch.float32:
            result = graph.call_function(prims.convert_element_type.default, (drawn, value.dtype))
    seed.meta["val"] = seeds.meta["val"][place]
    result.meta["val"] = value
    for one in (seed, drawn, result):
        one.meta["stack_trace"] = node.meta.get("stack_trace")
    node.replace_all_uses_with(result)
    graph.erase_node(node)


def _sizes(graph: fx.Graph, source: fx.Node) -> list[Any]:
    sizes: list[Any] = list(source.meta["val"].shape)
    for dim, size in enumerate(sizes):
        if isinstance(size, torch.SymInt):
            sizes[dim] = graph.call_function(aten.sym_size.int, (source, dim))
            sizes[dim].meta["val"] = size
    return sizes
