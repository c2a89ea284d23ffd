"""Queries, keys and values as projections leave them reach attention as views: nothing is copied in front."""

from __future__ import annotations

import operator
from collections.abc import Callable

import pytest
import torch
from torch import fx
from torch.nn.functional import scaled_dot_product_attention

from support.aot_graphs import graphs_of

B, S, H, D, WINDOW = 2, 24, 4, 16, 5
Heads = tuple[torch.Tensor, torch.Tensor, torch.Tensor]


def unbound(x: torch.Tensor) -> Heads:
    q, k, v = x.view(B, S, 3, H, D).permute(2, 0, 3, 1, 4).unbind(0)
    return q, k, v


def split(x: torch.Tensor) -> Heads:
    q, k, v = (each.view(B, S, H, D).transpose(1, 2) for each in x.split(H * D, dim=-1))
    return q, k, v


def by_heads(x: torch.Tensor) -> Heads:
    """As in BLOOM and GPT-NeoX: the three parts of a head lie side by side."""
    q, k, v = x.view(B, S, H, 3 * D).transpose(1, 2).chunk(3, dim=-1)
    return q, k, v


def grouped(x: torch.Tensor) -> Heads:
    """Two heads of queries for each of keys."""
    heads = x.view(B, S, 3 * H, D).transpose(1, 2)
    q, k, v = heads[:, :H], heads[:, H : H + H // 2], heads[:, 2 * H : 2 * H + H // 2]
    return q, k.repeat_interleave(2, 1), v.repeat_interleave(2, 1)


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("heads", [unbound, split, by_heads, grouped])
def test_no_copy_in_front_of_attention(heads: Callable[[torch.Tensor], Heads], training: bool) -> None:
    def attend(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        q, k, v = heads(x @ weight)
        rows = torch.arange(S)
        apart = rows[:, None] - rows
        keep = (apart >= 0) & (apart < WINDOW)
        out = scaled_dot_product_attention(q, k, v, attn_mask=keep)
        return out.transpose(1, 2).reshape(B, S, H * D)

    x, weight = torch.randn(B, S, 32), torch.randn(32, 3 * H * D, requires_grad=training)
    torch._dynamo.reset()
    forward = graphs_of(attend, {"x": x, "weight": weight}, training=training, kernels=True)[0]
    name = "fxopt.block_attention.default"
    (attention,) = [node for node in forward.graph.nodes if str(node.target) == name]
    for operand in attention.args[:3]:
        assert str(source_of(operand).target) == "aten.mm.default", forward.code


def source_of(node: fx.Node) -> fx.Node:
    """What `node` is a view of."""
    while is_view(node):
        node = node.all_input_nodes[0]
    return node


def is_view(node: fx.Node) -> bool:
    if node.target in (operator.getitem, torch.ops.aten._unsafe_view.default):
        return True
    schema = getattr(node.target, "_schema", None)
    return schema is not None and schema.arguments[0].alias_info is not None
