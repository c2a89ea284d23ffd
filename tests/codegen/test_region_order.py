"""Kernels can be called one after the other, each behind what it reads."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import networkx as nx
import torch
from torch import fx
from torch._inductor.decomposition import select_decomp_table
from torch.fx.experimental.proxy_tensor import make_fx

from fxopt.codegen.copies import with_copies
from fxopt.codegen.region import make_region
from fxopt.codegen.regions import partition

x = torch.randn(6, 8)


def graph_of(function: Callable[..., Any], *inputs: Any) -> fx.GraphModule:
    return make_fx(function, decomposition_table=select_decomp_table(), tracing_mode="fake")(*inputs)


def test_regions_that_need_each_other_are_kept_apart() -> None:
    """What is computed first is read by one result of a kernel, and the other result leads back to it."""

    def function(a: torch.Tensor, h: torch.Tensor, w: torch.Tensor) -> tuple[torch.Tensor, ...]:
        total = a.sum(-1, keepdim=True)
        share = a / total
        read, summed = h * share.view(-1)[:, None], (h * w).sum(-1)
        back = torch.cumsum(summed, 0).view(6, 8)  # by the host
        negative = -back * (share / total)
        return read, back / total + negative.sum(-1, keepdim=True)

    gm = graph_of(function, x, torch.randn(48, 16), torch.randn(48, 16))
    found = partition(gm.graph, frozenset({"cpu"}))
    owner = {node: place for place, region in enumerate(found.regions) for node in region.members}
    quotient = nx.DiGraph()
    for node in gm.graph.nodes:
        for user in node.users:
            ends = owner.get(node, node), owner.get(user, user)
            if ends[0] != ends[1]:
                quotient.add_edge(*ends)
    assert nx.is_directed_acyclic_graph(quotient), [region.members for region in found.regions]


def test_copies_are_of_what_the_graph_was() -> None:
    """One kernel computes again what another one has, which itself computes again what is in front of it."""
    gm = graph_of(lambda a: ((((a + 1).sin() * 2).sum(-1)), ((a + 1).sin() * 2).relu()), x)
    (given,) = gm.graph.find_nodes(op="placeholder")
    front = next(iter(given.users))
    middle = [node for node in gm.graph.nodes if node.name.startswith(("sin", "mul"))][:2]
    ends = [user for user in middle[-1].users]
    first = make_region([*middle, ends[0]], (ends[0],), (front,))
    other = gm.graph.output_node().all_input_nodes[1]
    other.replace_input_with(other.all_input_nodes[0], middle[-1])
    second = make_region([other], (other,), (front, *middle))
    found = with_copies([first, second], [first, second])
    own = [set(each.members) for each in found.values()]
    for region in own:
        read = {arg for node in region for arg in node.all_input_nodes}
        assert read - region == {given}
