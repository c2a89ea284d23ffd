"""``fxopt::qlinear``: x @ w^T + bias with a quantized weight; the arguments are those of `packed_linear`."""

from __future__ import annotations

from typing import Any

import torch
from torch import fx

from fxopt.ir.contract import Verdict
from fxopt.ir.graph_facts import Facts
from fxopt.ir.ops.op import Provider, SemanticOp
from fxopt.ir.ops.packed_linear import SCHEMA, differentiable, is_transformed


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
    if is_transformed():
        plain: torch.Tensor = differentiable(x, codes, scales, offsets, columns, bias, **attributes)
        return plain
    trains = torch.is_grad_enabled() and (x.requires_grad or (bias is not None and bias.requires_grad))
    op = torch.ops.fxopt.packed_linear if trains else torch.ops.fxopt.packed_product
    out: torch.Tensor = op(x, codes, scales, offsets, columns, bias, **attributes)
    return out


def with_gradients(*operands: torch.Tensor | None, **attributes: Any) -> torch.Tensor:
    """`qlinear` that autograd can record."""
    out: torch.Tensor = torch.ops.fxopt.packed_linear(*operands, **attributes)
    return out


def without_gradients(*operands: torch.Tensor | None, **attributes: Any) -> torch.Tensor:
    """`qlinear` that autograd never sees."""
    out: torch.Tensor = torch.ops.fxopt.packed_product(*operands, **attributes)
    return out


def _on_processor(node: fx.Node, facts: Facts) -> Verdict:
    if facts.differentiates(node):
        return Verdict.no("it has no gradient")
    return Verdict.yes("routed by the number of tokens, in each call")


def _trained(node: fx.Node, facts: Facts) -> Verdict:
    return Verdict.yes("likewise, with the gradient for x and the bias")


QLINEAR = SemanticOp(
    name="qlinear",
    schema=SCHEMA,
    body=qlinear,
    providers=(
        Provider("product", _on_processor, without_gradients),
        Provider("product with gradients", _trained, with_gradients),
    ),
)
