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
    mask, bias    `attn_mask` as formulas, for providers that need no tensor: where a key takes part
                  (`MaskProgram`), and what is added to its score (`ScoreProgram`)
    captures      the tensors ``c0, c1, ...`` of all formulas
    sizes         the integers ``n0, n1, ...`` of all formulas

Source: Vaswani et al., "Attention Is All You Need", 2017, eq. 1.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import fx

from fxopt.ir.contract import Verdict
from fxopt.ir.cost import hint
from fxopt.ir.facts import Facts, argument, val
from fxopt.ir.ops.decomposed_attention import decomposed
from fxopt.ir.ops.masking import NAN, NONE, ZERO, in_blocks
from fxopt.ir.ops.op import Provider, SemanticOp, is_symbol

# Below these numbers of scores per head (Sq * Skv) the host's own fusion of product, softmax and product
# beats the CPU flash kernel, whose forward has a fixed cost and whose backward recomputes the scores.
# Measured on one core, float32, D = 16..64, H = 4..8: forward 0.84x at 16^2, 1.0x at 64^2, 1.2x at 128^2;
# with backward 0.87x at 128^2, 1.04x at 512^2.
FLASH_FORWARD_SCORES = 64 * 64
FLASH_BACKWARD_SCORES = 256 * 256


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
    dead_rows: str = ZERO,
    mask_replaces: bool = False,
    wide_scores: bool = False,
    score: str = "",
    sinks: torch.Tensor | None = None,
    mask: str = "",
    bias: str = "",
    captures: Sequence[torch.Tensor] | None = None,
    sizes: Sequence[int] | None = None,
) -> torch.Tensor:
    """Scaled dot-product attention; the arguments are explained above.

    Returns:
        (B, Hq, Sq, Dv), of query's dtype.
    """
    if mask and attn_mask is None:
        return in_blocks(
            query, key, value, mask, captures or (), scale=scale, enable_gqa=enable_gqa, dead_rows=dead_rows
        )
    if dead_rows == NAN or mask_replaces or score or sinks is not None:
        attributes: Any = {"dead_rows": dead_rows, "mask_replaces": mask_replaces, "wide_scores": wide_scores}
        attributes |= {"score": score, "sinks": sinks, "captures": captures, "sizes": sizes}
        attributes |= {"scale": scale, "enable_gqa": enable_gqa}
        return decomposed(query, key, value, attn_mask, dropout_p, is_causal, **attributes)
    if dead_rows == NONE and scale is not None and is_symbol(scale):
        # The op takes no symbol: it would make a guard of the number, and a recompile of each of its values.
        query, scale = query * scale, 1.0
    return torch.nn.functional.scaled_dot_product_attention(
        query, key, value, attn_mask, dropout_p, is_causal, scale=scale, enable_gqa=enable_gqa
    )


def _decomposed_wins(node: fx.Node, facts: Facts) -> Verdict:
    """Where the decomposed form is the faster one, or the only one with the right answer."""
    query, key, mask = val(node.args[0]), val(node.args[1]), val(argument(node, "attn_mask"))
    if argument(node, "dead_rows") == NAN:
        return Verdict.yes("a row of -inf gives NaN, as softmax does; kernels give 0")
    if argument(node, "mask_replaces") and facts.differentiates(node):
        return Verdict.yes("filled scores get no gradient; kernels give them one in rows of nothing else")
    if query.dtype is torch.float16 and mask is not None and argument(node, "dead_rows") == NONE:
        return Verdict.yes(
            "kernels add masks in float32, where float16's lowest number does not absorb a score"
        )
    if argument(node, "dead_rows") == ZERO:
        return Verdict.no("written as scaled_dot_product_attention, whose rounding is kept")
    if query.device.type != "cpu":
        return Verdict.no(f"device {query.device.type} has fused kernels")
    if argument(node, "dropout_p"):
        return Verdict.yes("the CPU has no fused kernel with dropout")
    scores = hint(query.shape[-2]) * hint(key.shape[-2])
    limit = FLASH_BACKWARD_SCORES if facts.differentiates(node) else FLASH_FORWARD_SCORES
    if scores < limit:
        return Verdict.yes(f"{scores} scores per head, flash pays from {limit}")
    return Verdict.no(f"{scores} scores per head, decomposed pays below {limit}")


def _has_program(node: fx.Node, facts: Facts) -> Verdict:
    return Verdict(bool(argument(node, "mask")))


ATTENTION = SemanticOp(
    name="attention",
    schema=(
        "(Tensor query, Tensor key, Tensor value, Tensor? attn_mask=None, float dropout_p=0.0, "
        "bool is_causal=False, *, Scalar? scale=None, bool enable_gqa=False, str dead_rows='zero', "
        "bool mask_replaces=False, bool wide_scores=False, str score='', Tensor? sinks=None, "
        "str mask='', str bias='', Tensor[]? captures=None, SymInt[]? sizes=None) -> Tensor"
    ),
    body=attention,
    providers=(
        Provider("blocks", _has_program, attention),
        Provider("decomposed", _decomposed_wins, decomposed),
        Provider("sdpa", lambda node, facts: Verdict.yes(), attention),
    ),
)
