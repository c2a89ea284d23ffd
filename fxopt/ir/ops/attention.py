"""``fxopt::attention``: softmax(scale * Q K^T + mask) V, as ATen's scaled_dot_product_attention means it."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import fx

from fxopt.ir.contract import Verdict
from fxopt.ir.cost import hint
from fxopt.ir.facts import Facts, argument, val
from fxopt.ir.ops.masking import LOWEST_SHARE, NAN, NONE, ZERO, in_blocks
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
    mask: str = "",
    captures: Sequence[torch.Tensor] | None = None,
) -> torch.Tensor:
    """Scaled dot-product attention.

    Args:
        query: (B, Hq, Sq, D). key: (B, Hkv, Skv, D); Hq is a multiple of Hkv with `enable_gqa`, else equal.
        value: (B, Hkv, Skv, Dv). attn_mask: broadcastable to (B, Hq, Sq, Skv); bool (True takes part) or
        additive, float32 or query's dtype. dropout_p: probability of dropping an attention weight.
        is_causal: mask j > i, aligned to the upper left corner. scale: factor of the scores; 1/sqrt(D) when
        None. enable_gqa: query head h reads key and value head h // (Hq / Hkv). dead_rows: what a row
        without a live key gives, see `masking`. mask_replaces: an entry of an additive mask that is so low
        that it absorbs any score stands in the place of the score, which then gets no gradient
        (``masked_fill``, not a sum). wide_scores: Q K^T is computed and kept in float32. mask: the text of a
        `MaskProgram`, instead of `attn_mask`; captures: its tensors ``c0, c1, ...``.

    Returns:
        (B, Hq, Sq, Dv), of query's dtype.

    Source: Vaswani et al., "Attention Is All You Need", 2017, eq. 1.
    """
    if mask:
        return in_blocks(
            query, key, value, mask, captures or (), scale=scale, enable_gqa=enable_gqa, dead_rows=dead_rows
        )
    if dead_rows == NAN or mask_replaces:
        given = (query, key, value, attn_mask, dropout_p, is_causal)
        kept = {"dead_rows": dead_rows, "mask_replaces": mask_replaces, "wide_scores": wide_scores}
        return decomposed(*given, scale=scale, enable_gqa=enable_gqa, **kept)  # type: ignore[arg-type]
    if dead_rows == NONE and scale is not None and is_symbol(scale):
        # The op takes no symbol: it would make a guard of the number, and a recompile of each of its values.
        query, scale = query * scale, 1.0
    return torch.nn.functional.scaled_dot_product_attention(
        query, key, value, attn_mask, dropout_p, is_causal, scale=scale, enable_gqa=enable_gqa
    )


def decomposed(
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
) -> torch.Tensor:
    """The same as product, softmax in float32, product. Keys of a group are not repeated."""
    factor = 1.0 / math.sqrt(query.shape[-1]) if scale is None else scale
    batch, heads, rows, _ = query.shape
    grouped = enable_gqa and key.shape[1] != heads
    if grouped:
        query = query.reshape(batch, key.shape[1], -1, query.shape[-1])
    scores = _scores(query, key, factor, wide_scores)
    if grouped:
        scores = scores.reshape(batch, heads, rows, -1)
    if is_causal:
        # Compared, not `tril` of ones: Inductor's code for that is 1.25 times slower, with backward.
        row, column = (torch.arange(n, device=query.device) for n in (rows, key.shape[-2]))
        live = column <= row[:, None]
        scores = torch.where(live, scores, -math.inf)
    elif attn_mask is not None:
        scores = _masked(scores, attn_mask, mask_replaces)
    weights = _softmax(scores, dead_rows != ZERO or attn_mask is None).to(value.dtype)
    if dropout_p > 0.0:
        weights = torch.dropout(weights, dropout_p, True)
    if not grouped:
        return torch.matmul(weights, value)
    weights = weights.reshape(batch, key.shape[1], -1, key.shape[-2])
    return torch.matmul(weights, value).reshape(batch, heads, rows, value.shape[-1])


def _scores(query: torch.Tensor, key: torch.Tensor, factor: float, wide: bool) -> torch.Tensor:
    if wide:
        query, key = query.float(), key.float()
    if query.dtype is torch.float16 and (is_symbol(factor) or abs(factor) < 1.0):
        # The product alone may leave float16's range; a model that scales Q first relies on that it does not.
        return torch.matmul(query * factor, key.transpose(-2, -1))
    return torch.matmul(query, key.transpose(-2, -1)) * factor


def _masked(scores: torch.Tensor, mask: torch.Tensor, mask_replaces: bool) -> torch.Tensor:
    if mask.dtype is torch.bool:
        return torch.where(mask, scores, -math.inf)
    if not mask_replaces:
        return scores + mask
    return torch.where(absorbs(mask), mask.to(scores.dtype), scores + mask)


def absorbs(mask: torch.Tensor) -> torch.Tensor:
    """Where adding a score of the mask's dtype changes nothing."""
    return mask <= LOWEST_SHARE * torch.finfo(mask.dtype).min


def _softmax(scores: torch.Tensor, plain: bool) -> torch.Tensor:
    if plain:
        return torch.softmax(scores, -1, dtype=torch.float32 if scores.dtype != torch.float64 else None)
    wide = scores if scores.dtype == torch.float64 else scores.float()
    safe: torch.Tensor = torch.ops.aten._safe_softmax.default(wide, -1)
    return safe


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
        "bool mask_replaces=False, bool wide_scores=False, str mask='', Tensor[]? captures=None) -> Tensor"
    ),
    body=attention,
    providers=(
        Provider("blocks", _has_program, attention),
        Provider("decomposed", _decomposed_wins, decomposed),
        Provider("sdpa", lambda node, facts: Verdict.yes(), attention),
    ),
)
