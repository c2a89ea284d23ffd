"""vmap regions of a Dynamo graph, replaced by what they compute in plain ATen.

Dynamo writes vmap as calls that enter a level, wrap tensors into batched ones, and unwrap and leave at the
end. Pre-dispatch tracing stands above vmap and would lose track of the batched tensors, so each region is
traced on its own below vmap, where it has become ordinary ATen, and that trace is run in its place.

Uses private torch APIs, listed in docs/torch_apis.md.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import fx
from torch.fx.experimental.proxy_tensor import disable_proxy_modes_tracing, make_fx

_ENTER, _LEAVE, _LOAD = "_vmap_increment_nesting", "_vmap_decrement_nesting", "lazy_load_decompositions"


class VmapRegion:
    """A region as one callable: traced below vmap for the inputs that it is given, then run."""

    def __init__(self, module: fx.GraphModule) -> None:
        self.module = module
        self.__name__ = "vmap_region"

    def __call__(self, *args: Any) -> Any:
        run = fx.Interpreter(self.module).run
        # The trace around this one has a mode that notes vmap's functions (torch 2.11).
        with disable_proxy_modes_tracing(), torch._C.DisableTorchFunction():
            flat = make_fx(lambda *inputs: run(*inputs))(*args)
        return fx.Interpreter(flat).run(*args)


def fold_vmap(gm: fx.GraphModule) -> fx.GraphModule:
    """A copy of `gm` with every outermost vmap region as one call; `gm` itself where there is none."""
    regions = _regions(gm.graph)
    if not regions:
        return gm
    graph = fx.Graph()
    env: dict[fx.Node, fx.Node] = {}
    starts = {region[0]: region for region in regions}
    inside = {node for region in regions for node in region}
    for node in gm.graph.nodes:
        if node in starts:
            _insert(gm, graph, starts[node], env)
        elif node not in inside and _name(node) != _LOAD:
            env[node] = graph.node_copy(node, lambda n: env[n])
    return fx.GraphModule(gm, graph)


def _insert(gm: fx.GraphModule, graph: fx.Graph, region: list[fx.Node], env: dict[fx.Node, fx.Node]) -> None:
    """One call that computes whatever of the region is read outside of it."""
    members = set(region)
    inputs = list(dict.fromkeys(a for n in region for a in n.all_input_nodes if a not in members))
    outputs = [node for node in region if any(user not in members for user in node.users)]
    body = fx.Graph()
    inner = {node: body.placeholder(node.name) for node in inputs}
    for node in region:
        inner[node] = body.node_copy(node, lambda n: inner[n])
    body.output(tuple(inner[node] for node in outputs))
    call = graph.call_function(VmapRegion(fx.GraphModule(gm, body)), tuple(env[node] for node in inputs))
    call.meta.update({k: v for k, v in region[-1].meta.items() if k != "example_value"})
    for position, node in enumerate(outputs):
        env[node] = graph.call_function(_item, (call, position))
        env[node].meta.update(node.meta)


def _item(values: tuple[Any, ...], position: int) -> Any:
    return values[position]


def _regions(graph: fx.Graph) -> list[list[fx.Node]]:
    """The nodes of each outermost region, from the call that enters it to the one that leaves it."""
    regions: list[list[fx.Node]] = []
    current: list[fx.Node] = []
    depth = 0
    for node in graph.nodes:
        depth += _name(node) == _ENTER
        if depth:
            current.append(node)
        if _name(node) == _LEAVE:
            depth -= 1
            if depth == 0:
                regions.append(current)
                current = []
    return regions


def _name(node: fx.Node) -> str:
    if (
        node.op != "call_function"
        or getattr(node.target, "__module__", "") != torch._functorch.predispatch.__name__
    ):
        return ""
    return str(getattr(node.target, "__name__", ""))
