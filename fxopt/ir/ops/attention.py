"""``fxopt::attention``: softmax(score(scale * Q K^T) + mask) V, as ATen's SDPA means it.

    query         (B, Hq, Sq, D)
    key, value    (B, Hkv, Skv, D) and (B, Hkv, Skv, Dv); Hq is a multiple of Hkv with `enable_gqa`
    attn_mask     broadcastable to (B, Hq, Sq, Skv); bool (True takes part) or additive, float32 or as query
    dropout_p     probability of dropping an attention weight
    is_causal     mask k > q, aligned to the upper left corner
    scale         factor of the scores; 1/sqrt(D) when None
    enable_gqa    query head h reads key and value head h // (Hq / Hkv)
    dead_rows     what a row without a live key gives, see `masking`
    mask_replaces an entry of an additive mask that is so low that it absorbs any score stands in the place of
                  the score, which then gets no gradient (``masked_fill``, not a sum)
    wide_scores   Q K^T is computed and kept in float32
    score         the text of a `ScoreProgram`: what a scaled score becomes before the mask acts; "" leaves it
    sinks         (Hq,): for each head the score of one more key, whose value is 0
    query_rest,   (B, Hq, Sq, E) and (B, Hkv, Skv, E): Q and K are ``cat([query, query_rest], -1)`` and
    key_rest      ``cat([key, key_rest], -1)``, of width D + E, without a copy of the keys; where `key` and
                  `value` have one head, `key_rest` may have several
    mask, bias    `attn_mask` as formulas, for providers that need no tensor: where a key takes part
                  (`MaskProgram`), and what is added to its score (`ScoreProgram`)
    bias_replaced the numbers that exclude keys stand in the place of `bias`, which then gets no gradient;
                  None where that is not known, or makes no difference
    captures      the tensors ``c0, c1, ...`` of all formulas
    sizes         the integers ``n0, n1, ...`` of all formulas

Source: Vaswani et al., "Attention Is All You Need", 2017, eq. 1.
"""

from __future__ import annotations

from typing import Any

import torch

from fxopt.ir.contract import Verdict
from fxopt.ir.ops.attention_attributes import SCHEMA, Attributes, without_symbol
from fxopt.ir.ops.attention_providers import (
    blocks_pay,
    decode_pays,
    decomposed_wins,
    grouped_pays,
    kernel_serves,
    only_broadcasts,
)
from fxopt.ir.ops.block_attention import in_blocks, in_kernel
from fxopt.ir.ops.cached_attention import cached_pays, in_cache
from fxopt.ir.ops.decode_attention import grouped, in_decode
from fxopt.ir.ops.decomposed_attention import decomposed
from fxopt.ir.ops.masking import NAN, NONE
from fxopt.ir.ops.op import Provider, SemanticOp


def attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attn_mask: torch.Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    **attributes: Any,
) -> torch.Tensor:
    """Scaled dot-product attention; the arguments are explained above.

    Returns:
        (B, Hq, Sq, Dv), of query's dtype.
    """
    given = Attributes(**attributes)
    if given.query_rest is not None and given.key_rest is not None:
        attributes |= {"scale": given.factor(query), "query_rest": None, "key_rest": None}
        query = torch.cat([query, given.query_rest], -1)
        key, value = (each.expand(-1, given.key_rest.shape[1], -1, -1) for each in (key, value))
        key = torch.cat([key, given.key_rest], -1)
        return attention(query, key, value, attn_mask, dropout_p, is_causal, **attributes)
    if given.dead_rows == NAN or given.mask_replaces or given.score or given.sinks is not None:
        return decomposed(query, key, value, attn_mask, dropout_p, is_causal, **attributes)
    scale = given.scale
    if given.dead_rows == NONE and scale is not None:
        query, scale = without_symbol(query, scale)
    return torch.nn.functional.scaled_dot_product_attention(
        query, key, value, attn_mask, dropout_p, is_causal, scale=scale, enable_gqa=given.enable_gqa
    )


ATTENTION = SemanticOp(
    name="attention",
    schema=(
        f"(Tensor query, Tensor key, Tensor value, {SCHEMA}, "
        "Tensor? query_rest=None, Tensor? key_rest=None) -> Tensor"
    ),
    body=attention,
    providers=(
        Provider("broadcast", only_broadcasts, attention),
        Provider("cached", cached_pays, in_cache),
        Provider("triton", kernel_serves, in_kernel),
        Provider("decode", decode_pays, in_decode),
        Provider("grouped", grouped_pays, grouped),
        Provider("blocks", blocks_pay, in_blocks),
        Provider("decomposed", decomposed_wins, decomposed),
        Provider("sdpa", lambda node, facts: Verdict.yes(), attention),
    ),
)
