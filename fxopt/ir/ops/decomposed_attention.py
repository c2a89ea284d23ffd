"""``fxopt::attention`` with its scores in one tensor: for few scores, and where no kernel has the answer."""

from __future__ import annotations

import math
from typing import Any

import torch

from fxopt.ir.formula import numbered
from fxopt.ir.ops.attention_attributes import Attributes, computed_in
from fxopt.ir.ops.masking import LOWEST_SHARE, ZERO
from fxopt.ir.ops.op import is_symbol
from fxopt.ir.program import ScoreProgram
from fxopt.ir.tile_values import TileValues


def decomposed(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attn_mask: torch.Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    **attributes: Any,
) -> torch.Tensor:
    """`fxopt::attention`, all scores at once. Keys of a group are not repeated. Reads no formula of the mask.

    Args: as `fxopt::attention` has them.
    """
    given = Attributes(**attributes)
    batch, heads, rows, _ = query.shape
    grouped = given.enable_gqa and key.shape[1] != heads
    narrow = query.dtype
    if given.query_rest is not None and narrow is torch.bfloat16:
        # Two products would be rounded, and their sum.
        query, key, value = (each.to(computed_in(narrow)) for each in (query, key, value))
    scores = _scores(query, key, given)
    weights = attention_weights(scores, given, attn_mask, is_causal).to(value.dtype)
    if dropout_p > 0.0:
        weights = torch.dropout(weights, dropout_p, True)
    if not grouped:
        return torch.matmul(weights, value).to(narrow)
    weights = weights.reshape(batch, key.shape[1], -1, key.shape[-2])
    return torch.matmul(weights, value).reshape(batch, heads, rows, value.shape[-1]).to(narrow)


def _scores(query: torch.Tensor, key: torch.Tensor, given: Attributes) -> torch.Tensor:
    """The scaled product of Q and K, or the sum of those of their parts."""
    factor = given.factor(query)
    scores = _product_of_groups(query, key, factor, given)
    if given.query_rest is None or given.key_rest is None:
        return scores
    query, key = given.query_rest.to(query.dtype), given.key_rest.to(key.dtype)
    return scores + _product_of_groups(query, key, factor, given)


def _product_of_groups(
    query: torch.Tensor, key: torch.Tensor, factor: float, given: Attributes
) -> torch.Tensor:
    """(B, Hq, Sq, Skv)."""
    batch, heads, rows, depth = query.shape
    if not given.enable_gqa or key.shape[1] == heads:
        return scaled_product(query, key, factor, given.wide_scores)
    packed = query.reshape(batch, key.shape[1], -1, depth)
    return scaled_product(packed, key, factor, given.wide_scores).reshape(batch, heads, rows, -1)


def attention_weights(
    scores: torch.Tensor, given: Attributes, attn_mask: torch.Tensor | None, is_causal: bool
) -> torch.Tensor:
    """(B, Hq, Sq, Skv), in float32 at least, of scores that are scaled."""
    if given.score:
        scored = _scored(scores, given)
        # The lowest float16 number, as a mask, absorbs a score of float16, not one of float32.
        scores = scored.half() if scores.dtype is torch.float16 else scored
    scores = _masked(scores, attn_mask, is_causal, given.mask_replaces)
    if given.sinks is not None:
        return _with_sinks(scores, given.sinks)
    return _softmax(scores, given.dead_rows != ZERO or attn_mask is None)


def scaled_product(query: torch.Tensor, key: torch.Tensor, factor: float, wide: bool) -> torch.Tensor:
    """factor * Q K^T, in float32 when `wide`, else in the operands' dtype."""
    if wide:
        query, key = query.float(), key.float()
    if query.dtype is torch.float16 and (is_symbol(factor) or abs(factor) < 1.0):
        # The product alone may leave float16's range; a model that scales Q first relies on that it does not.
        return torch.matmul(query * factor, key.transpose(-2, -1))
    return torch.matmul(query, key.transpose(-2, -1)) * factor


def _scored(scores: torch.Tensor, given: Attributes) -> torch.Tensor:
    ranges = tuple((0, size) for size in scores.shape)
    named, numbers = numbered("c", given.captures), numbered("n", given.sizes)
    wide = scores.to(computed_in(scores.dtype))
    values = TileValues(ranges, named, numbers, scores.device, wide, wide.dtype)
    result: torch.Tensor = values.number(ScoreProgram.parse(given.score).result)
    return result


def _masked(
    scores: torch.Tensor, mask: torch.Tensor | None, is_causal: bool, mask_replaces: bool
) -> torch.Tensor:
    if is_causal:
        # Compared, not `tril` of ones: Inductor's code for that is 1.25 times slower, with backward.
        row, column = (torch.arange(size, device=scores.device) for size in scores.shape[-2:])
        return torch.where(column <= row[:, None], scores, -math.inf)
    if mask is None:
        return scores
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
        return torch.softmax(scores, -1, dtype=computed_in(scores.dtype))
    safe: torch.Tensor = torch.ops.aten._safe_softmax.default(scores.to(computed_in(scores.dtype)), -1)
    return safe


def _with_sinks(scores: torch.Tensor, sinks: torch.Tensor) -> torch.Tensor:
    """softmax over the scores and one more key, without that key's weight."""
    wide = scores.to(computed_in(scores.dtype))
    sink = sinks.to(wide.dtype).view(1, -1, 1, 1).expand(*wide.shape[:-1], 1)
    # One softmax, not a quotient of sums: the gradients of the latter have up to three times the error.
    return torch.softmax(torch.cat([wide, sink], -1), -1)[..., :-1]
