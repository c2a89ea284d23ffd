"""``fxopt::qlinear``: x @ w^T + bias with a quantized weight; the arguments are those of `packed_linear`."""

from __future__ import annotations

from typing import Any

import torch
from torch import fx

from fxopt.ir.contract import Verdict
from fxopt.ir.facts import val
from fxopt.ir.graph_facts import Facts
from fxopt.ir.ops.op import Provider, SemanticOp
from fxopt.ir.ops.packed_linear import SCHEMA


def qlinear(
    x: torch.Tensor,
    codes: torch.Tensor,
    scales: torch.Tensor,
    offsets: torch.Tensor | None,
    columns: torch.Tensor | None,
    bias: torch.Tensor | None,
    **attributes: Any,
) -> torch.Tensor:
    """The result (..., N), of the dtype of x; see `fxopt.ir.ops.packed_linear`, whose body is its meaning."""
    out: torch.Tensor = torch.ops.fxopt.packed_linear(x, codes, scales, offsets, columns, bias, **attributes)
    return out


def _on_processor(node: fx.Node, _: Facts) -> Verdict:
    device = val(node.args[0]).device.type
    if device != "cpu":
        return Verdict.no(f"on {device} weights are widened for a dense product")
    return Verdict.yes("routed by the number of tokens, in each call")


QLINEAR = SemanticOp(
    name="qlinear",
    schema=SCHEMA,
    body=qlinear,
    providers=(Provider("processor", _on_processor, qlinear),),
)
