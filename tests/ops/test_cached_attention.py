"""``fxopt::cached_attention``: what it means, and where it is chosen."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import fx

from fxopt.ir.contract import Verdict
from fxopt.ir.graph_facts import Facts, Kernels
from fxopt.ir.ops import register_ops
from fxopt.ir.ops.attention import ATTENTION, attention
from fxopt.ir.ops.cached_attention import cached_pays, in_cache

register_ops()
ON_CPU = Kernels(frozenset({"cpu"}), lambda node, facts: Verdict.no(""))


def operands(
    rows: int = 1, columns: int = 40, dtype: torch.dtype = torch.float32
) -> tuple[torch.Tensor, ...]:
    torch.manual_seed(0)
    shapes = ((2, 6, rows, 16), (2, 2, columns, 16), (2, 2, columns, 16))
    return tuple(torch.randn(shape).to(dtype) for shape in shapes)


def verdict(*tensors: torch.Tensor, kernels: Kernels | None = ON_CPU, **attributes: Any) -> Verdict:
    """Whether it is chosen for a call of attention."""
    graph = fx.Graph()

    def placed(value: Any) -> Any:
        if isinstance(value, torch.Tensor):
            node = graph.placeholder(f"x{len(graph.nodes)}")
            node.meta["val"] = value
            return node
        return [placed(each) for each in value] if isinstance(value, list) else value

    args = tuple(placed(each) for each in tensors)
    kwargs = {name: placed(each) for name, each in ({"enable_gqa": True} | attributes).items()}
    node = graph.call_function(ATTENTION.overload, args, kwargs)
    return cached_pays(node, Facts(graph, kernels))


def bool_mask(rows: int = 1, columns: int = 40, live: int = 23) -> torch.Tensor:
    return (torch.arange(columns) < live).expand(2, 1, rows, columns)


def test_it_is_chosen_for_few_queries_where_kernels_are_made() -> None:
    assert verdict(*operands(), attn_mask=bool_mask())
    assert verdict(*operands(16), attn_mask=bool_mask(16))
    assert verdict(*operands(), score="20*tanh(s/20)")
    assert not verdict(*operands(), attn_mask=bool_mask(), kernels=None)


@pytest.mark.parametrize(
    ("tensors", "attributes", "reason"),
    [
        (operands(17), {"attn_mask": bool_mask(17)}, "17 queries, it is for 16 at most"),
        (operands(), {"attn_mask": bool_mask(), "dropout_p": 0.1}, "no dropout"),
        (operands(dtype=torch.float64), {"attn_mask": bool_mask()}, "16 or 32 bits"),
        ((operands()[0][:, :5], *operands()[1:]), {"attn_mask": bool_mask()}, "heads of queries in groups"),
        ((operands()[0], operands()[1].mT.contiguous().mT, operands()[2]), {}, "neighbours in memory"),
        (
            operands(dtype=torch.float16),
            {"attn_mask": torch.zeros(2, 1, 1, 40).half(), "dead_rows": "mean"},
            "float16's lowest number",
        ),
    ],
)
def test_it_refuses_with_a_reason(tensors: Any, attributes: dict[str, Any], reason: str) -> None:
    found = verdict(*tensors, **attributes)
    assert not found
    assert reason in found.reason


@pytest.mark.parametrize("rows", [1, 3])
@pytest.mark.parametrize("dead_rows", ["zero", "nan", "mean"])
@pytest.mark.parametrize("form", ["mask", "formula", "numbers", "causal", "capped"])
def test_it_means_attention(form: str, dead_rows: str, rows: int) -> None:
    tensors, attributes = operands(rows), dict[str, Any](dead_rows=dead_rows, enable_gqa=True)
    mask = bool_mask(rows).clone()
    mask[1, :, -1] = form == "causal"
    if form == "numbers":
        lowest = torch.finfo(torch.float32).min if dead_rows == "mean" else -torch.inf
        attributes["attn_mask"] = torch.where(mask, 0.0, lowest)
    elif form == "causal":
        attributes["is_causal"] = True
    else:
        attributes["attn_mask"] = mask
    if form == "formula":
        attributes |= {"mask": "c0[b, 0, q, k]", "captures": [mask]}
    if form == "capped":
        attributes["score"] = "20*tanh(s/20)"
    found = in_cache(*tensors, **attributes)
    if dead_rows != "mean" or form in ("numbers", "causal"):
        eager = attention(*tensors, **attributes)
        torch.testing.assert_close(found, eager, equal_nan=True, rtol=1e-5, atol=1e-6)
    if form in ("mask", "formula") and dead_rows == "mean":
        mean = tensors[2][1].mean(1).repeat_interleave(3, 0)
        torch.testing.assert_close(found[1, :, -1], mean)
