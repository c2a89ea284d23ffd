"""``fxopt::quantized_attention``: ``fxopt::attention`` whose keys and values are rows of 8 bits with scales.

    key, value              (B, Hkv, Skv, D) and (B, Hkv, Skv, Dv), of int8, uint8 or float8
    key_scale, value_scale  floating, broadcastable to the rows: a number for each row, each channel, or fewer
    the others              as ``fxopt::attention`` has them

    K = (key * key_scale), V = (value * value_scale), both rounded to the dtype of the query

Any run of rows can be computed by itself: nothing of the size of K or V has to be made.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import fx

from fxopt.ir.contract import Verdict
from fxopt.ir.cost import hint
from fxopt.ir.facts import argument, val
from fxopt.ir.graph_facts import Facts
from fxopt.ir.ops.attention import attention
from fxopt.ir.ops.attention_attributes import SCHEMA, Attributes, without_symbol
from fxopt.ir.ops.attention_providers import DECODE_ROWS, GROWN
from fxopt.ir.ops.cached_attention import cached_rows_pay, rows_in_cache
from fxopt.ir.ops.masking import MEAN, NONE
from fxopt.ir.ops.op import Provider, SemanticOp

# What rows may be stored as.
ROW_DTYPES = (torch.int8, torch.uint8, torch.float8_e4m3fn, torch.float8_e5m2)

# Measured on one core, float32, decoding steps of two layers: against keys and values that the host computes,
# with 2**16 numbers in the keys of all heads 0.95x, with 2**19 1.2x to 1.3x, with 2**22 4.4x.
ROW_NUMBERS = 2**17
# In bfloat16, where the rows are widened in registers (AVX-512): with 2**14 numbers 1.2x, with 2**16 1.9x to
# 2.4x; in float32 0.6x and 0.8x to 0.9x.
HALF_NUMBERS = 2**14


def quantized_attention(
    query: torch.Tensor,
    key: torch.Tensor,
    key_scale: torch.Tensor,
    value: torch.Tensor,
    value_scale: torch.Tensor,
    attn_mask: torch.Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    **attributes: Any,
) -> torch.Tensor:
    """Attention over keys and values that are computed first; the arguments are explained above.

    Returns:
        (B, Hq, Sq, Dv), of query's dtype.
    """
    key, value = (
        (rows.to(scale.dtype) * scale).to(query.dtype)
        for rows, scale in ((key, key_scale), (value, value_scale))
    )
    return attention(query, key, value, attn_mask, dropout_p, is_causal, **attributes)


def rows_pay(node: fx.Node, facts: Facts) -> Verdict:
    """Whether reading rows of 8 bits beats computing keys and values once, for an attention `node`."""
    query = val(node.args[0])
    rows = query.shape[-2]
    if not isinstance(rows, int) or rows > DECODE_ROWS:
        return Verdict.no(f"{rows} queries share keys and values that are computed once")
    if query.device.type != "cpu":
        return Verdict.no(f"on {query.device.type} keys and values are computed for a fused kernel")
    if facts.differentiates(node):
        return Verdict.no("it has no gradient")
    dropout = argument(node, "dropout_p")
    if isinstance(dropout, fx.Node) or dropout:
        return Verdict.no("it has no dropout")
    numbers, least = _numbers(val(node.args[1])), ROW_NUMBERS
    if query.dtype.itemsize == 2 and torch.backends.cpu.get_cpu_capability() == "AVX512":
        least = min(least, HALF_NUMBERS)
    if numbers < least:
        return Verdict.no(f"{numbers} numbers in the keys of all heads, pays from {least}")
    return Verdict.yes(f"{rows} queries read rows of 8 bits")


def kernel_pays(node: fx.Node, facts: Facts) -> Verdict:
    """Whether a kernel is to read rows of 8 bits, for an attention `node`."""
    query = val(node.args[0])
    rows, device = query.shape[-2], query.device.type
    if facts.kernels is None or device not in facts.kernels.devices:
        return Verdict.no(f"no kernels are made for {device}")
    if not isinstance(rows, int) or rows > DECODE_ROWS or facts.differentiates(node):
        return Verdict.no("kernels are for few queries, without gradients")
    return Verdict.yes(f"{rows} queries read rows of 8 bits, in a kernel")


def _numbers(key: torch.Tensor) -> int:
    """In all keys; those of a growing cache are taken to be `GROWN`."""
    columns = key.shape[2] if isinstance(key.shape[2], int) else GROWN
    return hint(key.shape[0]) * hint(key.shape[1]) * columns * hint(key.shape[3])


def in_rows(
    query: torch.Tensor,
    key: torch.Tensor,
    key_scale: torch.Tensor,
    value: torch.Tensor,
    value_scale: torch.Tensor,
    attn_mask: torch.Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    **attributes: Any,
) -> torch.Tensor:
    """`quantized_attention` without keys and values in memory."""
    given = Attributes(**attributes)
    query, scale = without_symbol(query, given.factor(query))
    # There the lowest number stands for masked, which absorbs a score of float16, not one of float32.
    half = query.dtype is torch.float16 and given.dead_rows in (MEAN, NONE) and attn_mask is not None
    options: dict[str, Any] = {"is_causal": is_causal, "scale": float(scale), "dead_rows": given.dead_rows}
    options |= {"mask_replaces": given.mask_replaces, "score": given.score, "sinks": given.sinks}
    options |= {"captures": given.captures, "sizes": given.sizes} if given.score else {}
    out: torch.Tensor = torch.ops.fxopt.row_attention(
        query, key, key_scale, value, value_scale, attn_mask, half_scores=half, **options
    )
    return out


QUANTIZED_ATTENTION = SemanticOp(
    name="quantized_attention",
    schema=(
        f"(Tensor query, Tensor key, Tensor key_scale, Tensor value, Tensor value_scale, {SCHEMA}) -> Tensor"
    ),
    body=quantized_attention,
    providers=(
        Provider("cached", cached_rows_pay, rows_in_cache),
        Provider("rows", rows_pay, in_rows),
    ),
)
