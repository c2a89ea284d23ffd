"""``fxopt::append_attention``: rotary embedding, append to a cache, and attention over it, as one op.

    query                   (B, Hq, Sq, D)
    k_new, v_new            (B, Hkv, Sq, D) and (B, Hkv, Sq, Dv): one new row for each query
    key, value              the caches, (B, Hkv, rows, D) and (B, Hkv, rows, Dv); written
    cos, sin                (B or 1, Sq, R) with R <= D: the first R columns of queries and new keys are
                            rotated by these angles before all else; None where they are as they should be
    length                  int64 of one dimension, whose first entry says in which row the first of the new
                            ones is written, the others behind it; None: in the last rows
    interleaved             pairs of the embedding are neighbours, not halves apart
    key_scale, value_scale  of caches of 8 bits (`fxopt.ir.row_codes`), (B, Hkv, rows, 1) in float32; written.
                            New rows are rounded to 8 bits, and attended to as they are stored
    the others              as ``fxopt::attention`` has them, over all rows of the caches

A row that would be behind the end of the cache is an error in the body, as it is in eager; the kernel does
not write it.

Source: Su et al., "RoFormer", 2021, eq. 34.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import fx

from fxopt.ir.contract import Verdict
from fxopt.ir.facts import val
from fxopt.ir.graph_facts import Facts
from fxopt.ir.ops.attention import attention
from fxopt.ir.ops.attention_attributes import SCHEMA, Attributes
from fxopt.ir.ops.cached_attention import cached_attention, kernel_operands
from fxopt.ir.ops.decode_attention import sequences_first
from fxopt.ir.ops.op import Provider, SemanticOp, define_op
from fxopt.ir.ops.quantized_attention import quantized_attention
from fxopt.ir.row_codes import quantized, write_rows

_OPERANDS = (
    "Tensor query, Tensor k_new, Tensor v_new, Tensor(a!) key, Tensor(b!) value, Tensor? cos, Tensor? sin, "
    "Tensor? length, "
)
_SCALES = "Tensor(c!)? key_scale=None, Tensor(d!)? value_scale=None"
KERNEL_SCHEMA = (
    f"cached_append_attention({_OPERANDS}*, {_SCALES}, bool interleaved=False, Tensor? span=None, "
    "Tensor? sinks=None, float scale, str dead_rows, str mask='True', str score='', "
    "Tensor[]? captures=None, SymInt[]? sizes=None) -> Tensor"
)
Tensor = torch.Tensor


def rotated(x: Tensor, cos: Tensor, sin: Tensor, interleaved: bool) -> Tensor:
    """(B, H, Sq, D) with its first columns turned by angles (B or 1, Sq, R), in x's dtype."""
    width = cos.shape[-1]
    part, rest = x[..., :width], x[..., width:]
    if interleaved:
        turned = torch.stack([-part[..., 1::2], part[..., ::2]], -1).flatten(-2)
    else:
        first, second = part.chunk(2, -1)
        turned = torch.cat([-second, first], -1)
    part = part * cos[:, None] + turned * sin[:, None]
    return torch.cat([part.to(x.dtype), rest], -1)


def _appended(
    query: Tensor,
    new: tuple[Tensor, Tensor],
    caches: tuple[Tensor, Tensor],
    scales: tuple[Tensor | None, Tensor | None],
    angles: tuple[Tensor | None, Tensor | None],
    length: Tensor | None,
    interleaved: bool,
) -> Tensor:
    """The queries, rotated; new rows are written."""
    cos, sin = angles
    k_new, v_new = new
    if cos is not None and sin is not None:
        query, k_new = (rotated(each, cos, sin, interleaved) for each in (query, k_new))
    count = query.shape[2]
    places = torch.arange(count, device=query.device)
    places = places + (caches[0].shape[2] - count if length is None else length[:1])
    for cache, scale, states in zip(caches, scales, (k_new, v_new), strict=True):
        rows = states
        if scale is not None:
            rows, new_scale = quantized(states, cache.dtype)
            scale.index_copy_(2, places, new_scale)
        write_rows(cache, places, rows)
    return query


def append_attention(
    query: Tensor,
    k_new: Tensor,
    v_new: Tensor,
    key: Tensor,
    value: Tensor,
    cos: Tensor | None,
    sin: Tensor | None,
    length: Tensor | None,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    interleaved: bool = False,
    key_scale: Tensor | None = None,
    value_scale: Tensor | None = None,
    **attributes: Any,
) -> Tensor:
    """The result (B, Hq, Sq, Dv) of the attention; `key` and `value` are written, and scales. See above.

    Raises:
        IndexError: a new row would be behind the end of the cache.
    """
    scales = (key_scale, value_scale)
    query = _appended(query, (k_new, v_new), (key, value), scales, (cos, sin), length, interleaved)
    how = (attn_mask, dropout_p, is_causal)
    if key_scale is None or value_scale is None:
        return attention(query, key, value, *how, **attributes)
    return quantized_attention(query, key, key_scale, value, value_scale, *how, **attributes)


def _in_cache(
    query: Tensor,
    k_new: Tensor,
    v_new: Tensor,
    key: Tensor,
    value: Tensor,
    cos: Tensor | None,
    sin: Tensor | None,
    length: Tensor | None,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    interleaved: bool = False,
    key_scale: Tensor | None = None,
    value_scale: Tensor | None = None,
    **attributes: Any,
) -> Tensor:
    """`append_attention` by the op for a kernel."""
    query, others = kernel_operands(query, key, attn_mask, is_causal, Attributes(**attributes))
    operands = (query, k_new, v_new, key, value, cos, sin, length)
    others |= {"interleaved": interleaved, "key_scale": key_scale, "value_scale": value_scale}
    out: Tensor = torch.ops.fxopt.cached_append_attention(*operands, **others)
    return out


def _runs(node: fx.Node, facts: Facts) -> Verdict:
    """The pass that makes the op has asked for all else."""
    device = val(node.args[0]).device.type
    if facts.kernels is None or device not in facts.kernels.devices:
        return Verdict.no(f"no kernels are made for {device}")
    return Verdict.yes("new keys are rotated, written and attended to by one kernel")


def cached_append_attention(
    query: Tensor,
    k_new: Tensor,
    v_new: Tensor,
    key: Tensor,
    value: Tensor,
    cos: Tensor | None,
    sin: Tensor | None,
    length: Tensor | None,
    *,
    key_scale: Tensor | None = None,
    value_scale: Tensor | None = None,
    interleaved: bool = False,
    **others: Any,
) -> Tensor:
    """What the kernel computes, by torch: the same with `others` as ``fxopt::cached_attention`` has them."""
    scales = (key_scale, value_scale)
    query = _appended(query, (k_new, v_new), (key, value), scales, (cos, sin), length, interleaved)
    out: Tensor = cached_attention(query, key, value, key_scale=key_scale, value_scale=value_scale, **others)
    return out


def _fake(
    query: Tensor, k_new: Tensor, v_new: Tensor, key: Tensor, value: Tensor, *_: Any, **__: Any
) -> Tensor:
    return sequences_first(query, value)


APPEND_ATTENTION = SemanticOp(
    name="append_attention",
    schema=f"({_OPERANDS}{SCHEMA}, bool interleaved=False, {_SCALES}) -> Tensor",
    body=append_attention,
    providers=(Provider("cached", _runs, _in_cache),),
)


def register(library: torch.library.Library) -> None:
    """Make the op for a kernel known to torch's dispatcher."""
    define_op(library, KERNEL_SCHEMA, cached_append_attention, _fake)
