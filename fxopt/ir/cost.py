"""The cost of pieces of graph as the sum over their ops, each op taken alone: bytes, flops, launches.

This is what eager execution would move and compute; what a host fuses is not subtracted. It serves to
compare a piece of graph with what replaces it. Sizes that are symbolic count with their hint.
"""

from __future__ import annotations

import math
from collections.abc import Iterable

import torch
from torch import fx
from torch._ops import OpOverload

from fxopt.ir.contract import Cost
from fxopt.ir.facts import Size, val

aten = torch.ops.aten


def cost_of(nodes: Iterable[fx.Node]) -> Cost:
    """Sum over `nodes`. Views and metadata ops are free."""
    total_bytes = total_flops = launches = 0
    for node in nodes:
        results = tensors_of(node)
        if node.op != "call_function" or not results or _is_free(node):
            continue
        launches += 1
        total_bytes += sum(map(bytes_of, results)) + sum(
            bytes_of(val(arg)) for arg in set(node.all_input_nodes)
        )
        total_flops += _flops(node)
    return Cost(total_bytes, total_flops, launches)


def tensors_of(node: fx.Node) -> list[torch.Tensor]:
    """The tensors that a node makes: one, or those of an op with several results."""
    value = node.meta.get("val")
    several = value if isinstance(value, (tuple, list)) else (value,)
    return [one for one in several if isinstance(one, torch.Tensor)]


def _is_free(node: fx.Node) -> bool:
    if not isinstance(node.target, OpOverload):
        return True
    if node.target.is_view:
        return True
    value = val(node)
    return any(isinstance(val(arg), torch.Tensor) and val(arg) is value for arg in node.all_input_nodes)


def hint(size: Size) -> int:
    """The size seen while tracing; adds no guard. Sizes that depend on data count as one."""
    if isinstance(size, torch.SymInt):
        return size.node.hint if size.node.has_hint() else 1
    return int(size)


def numel(value: torch.Tensor) -> int:
    return math.prod(hint(size) for size in value.shape)


def bytes_of(value: object) -> int:
    """Bytes of memory behind a value: an expanded dimension is stored once."""
    if not isinstance(value, torch.Tensor):
        return 0
    if value.layout is not torch.strided:
        return numel(value) * value.element_size()
    stored = math.prod(
        hint(n)
        for n, s in zip(value.shape, value.stride(), strict=True)
        if not (isinstance(s, int) and s == 0)
    )
    return stored * value.element_size()


_MATMULS = (aten.matmul.default, aten.bmm.default, aten.mm.default)


def _flops(node: fx.Node) -> int:
    """Two per multiply-add of a matrix product; one per output element of anything else."""
    out = sum(numel(result) for result in tensors_of(node))
    if node.target in _MATMULS:
        return 2 * out * hint(val(node.args[0]).shape[-1])
    if node.target is aten.linear.default:
        return 2 * out * hint(val(node.args[1]).shape[-1])
    if node.target in (aten.baddbmm.default, aten.addmm.default):
        return 2 * out * hint(val(node.args[1]).shape[-1])
    if getattr(node.target, "__name__", "").startswith(("scaled_dot_product_attention", "attention")):
        query, key = val(node.args[0]), val(node.args[1])
        return 2 * hint(key.shape[-2]) * (numel(query) + out)
    return out
