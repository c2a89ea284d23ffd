"""``fxopt::attention``: softmax(scale * Q K^T + mask) V."""

from __future__ import annotations

import torch

from fxopt.ir.ops.op import SemanticOp


def attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attn_mask: torch.Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    *,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> torch.Tensor:
    """Scaled dot-product attention with the signature and the meaning of ATen's.

    Args:
        query: (B, Hq, Sq, D). key: (B, Hkv, Skv, D); Hq is a multiple of Hkv with `enable_gqa`, else equal.
        value: (B, Hkv, Skv, Dv). attn_mask: broadcastable to (B, Hq, Sq, Skv); bool (True takes part) or
        additive, of float32 or query's dtype. dropout_p: probability of dropping an attention weight.
        is_causal: mask j > i, aligned to the upper left corner. scale: factor of the scores; 1/sqrt(D) when
        None. enable_gqa: query head h reads key and value head h // (Hq / Hkv).

    Returns:
        (B, Hq, Sq, Dv), of query's dtype.

    Source: Vaswani et al., "Attention Is All You Need", 2017, eq. 1.
    """
    return torch.nn.functional.scaled_dot_product_attention(
        query, key, value, attn_mask, dropout_p, is_causal, scale=scale, enable_gqa=enable_gqa
    )


ATTENTION = SemanticOp(
    name="attention",
    schema=(
        "(Tensor query, Tensor key, Tensor value, Tensor? attn_mask=None, float dropout_p=0.0, "
        "bool is_causal=False, *, float? scale=None, bool enable_gqa=False) -> Tensor"
    ),
    body=attention,
)
