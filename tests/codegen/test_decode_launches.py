"""How many kernels one layer of a model takes when it decodes a token."""

from __future__ import annotations

import functools
import operator

import pytest
import torch
from torch import fx
from torch._inductor.decomposition import select_decomp_table
from transformers import LlamaConfig, LlamaForCausalLM, StaticCache

from fxopt.codegen.compile import compile_launches
from fxopt.codegen.emit import Emitted, kernels_for
from fxopt.codegen.matmul import MatmulBody
from fxopt.codegen.trace import is_created, operator_name
from fxopt.codegen.view_index import is_view
from fxopt.ir.cost import tensors_of
from fxopt.ir.target import Target
from support.aot_graphs import graphs_of

TARGET = Target.named("sm_90")


@functools.cache
def decode(batch: int) -> fx.Graph:
    """The graph of two layers in a step with a static cache, behind a prompt."""
    torch.manual_seed(0)
    sizes = {"hidden_size": 64, "intermediate_size": 96, "vocab_size": 50, "num_hidden_layers": 2}
    config = LlamaConfig(**sizes, num_attention_heads=4, num_key_value_heads=2)
    model = LlamaForCausalLM(config).to(torch.bfloat16).eval()
    cache = StaticCache(config=config, max_cache_len=32)
    ids = torch.randint(0, 50, (batch, 5))
    with torch.no_grad():
        model(ids, past_key_values=cache, cache_position=torch.arange(5))
        torch._dynamo.reset()
        (found,) = graphs_of(
            model,
            {"input_ids": ids[:, :1], "past_key_values": cache, "cache_position": torch.tensor([5])},
            training=False,
            decompositions=select_decomp_table(),
        )
    return found.graph


def launches(graph: fx.Graph) -> tuple[list[str], list[Emitted]]:
    """What is launched, in order: kernels of fxopt, and the operators of the host that compute."""
    emitted, _ = kernels_for(graph, frozenset({"cpu"}), TARGET)
    last = {one.region.members[-1]: one.kernel.name for one in emitted}
    inside = {node for one in emitted for node in one.region.members}
    found = []
    for node in graph.nodes:
        own = node.op == "call_function" and not is_view(node) and not is_created(node)
        if node in last:
            found.append(last[node])
        elif own and node not in inside and node.target is not operator.getitem and tensors_of(node):
            found.append(operator_name(node))
    return found, emitted


@pytest.mark.parametrize("batch", [1, pytest.param(3, marks=pytest.mark.slow)])
def test_a_layer_takes_few_launches(batch: int) -> None:
    found, emitted = launches(decode(batch))
    first, second = (place for place, name in enumerate(found) if "attention" in name)
    # On the CPU attention has its mask made for it, those of all layers by one kernel. That and the operator
    # are one: attention, by the host.
    layer = [
        name
        for name in found[first + 1 : second + 1]
        if name not in ("where", "fused_where", "fused_le_where")
    ]
    print("\n".join(layer))
    products = {one.kernel.name for one in emitted if isinstance(one.region.body, MatmulBody)}
    assert [name in products for name in layer[:4]] == [True] * 4, layer
    assert layer.count("index_put") == 2
    # Two sums of single numbers, lengths of the cache, are one launch of Inductor's.
    assert len(layer) - layer.count("add") + 1 <= 8, layer


def test_projections_carry_norm_rotary_embedding_and_residual() -> None:
    _, emitted = launches(decode(1))
    bodies = [one.region for one in emitted if isinstance(one.region.body, MatmulBody)]
    kinds = [[operator_name(node) for node in region.members] for region in bodies]
    projections, output, gated, down = kinds[:4]
    assert [len(region.outputs) for region in bodies[:4]] == [3, 1, 1, 1]
    assert {"rsqrt", "cat", "mm"} <= set(projections)
    assert projections.count("mm") == 3
    assert output == down == ["mm", "add"]
    assert {"rsqrt", "exp", "mm"} <= set(gated)
    assert gated.count("mm") == 2


@pytest.mark.slow
@pytest.mark.parametrize("target", ["sm_80", "sm_90", "sm_100", "sm_120"])
@pytest.mark.parametrize("batch", [1, 3])
def test_every_kernel_fits(batch: int, target: str) -> None:
    emitted, _ = kernels_for(decode(batch), frozenset({"cpu"}), Target.named(target))
    unique = {one.kernel.digest: one.kernel for one in emitted}.values()
    pairs = [(kernel, place) for kernel in unique for place in range(len(kernel.launches))]
    for found in compile_launches(pairs, Target.named(target)):
        found.check()
