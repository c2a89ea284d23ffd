"""``fxopt::row_attention``: a few queries over keys and values of 8 bits, which are widened block by block.

What the provider "rows" of ``fxopt::quantized_attention`` is made of; the operands are that op's. A block is
widened into memory that stays in the processor's cache, and read there: by the CPU's flash kernel, whose
results for the blocks are put together by the logarithms of their sums; or by products, between which are all
scores, where they are not only scaled and excluded.

    half_scores     scores take part in float16, after their product
    the others      as ``fxopt::attention`` has them

Source: Dao et al., "FlashAttention", 2022, section 3.1.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import torch

from fxopt.ir.ops.attention_attributes import Attributes, computed_in
from fxopt.ir.ops.decode_attention import mask_per_group, sequences_first
from fxopt.ir.ops.decomposed_attention import attention_weights
from fxopt.ir.ops.masking import ZERO
from fxopt.ir.ops.op import define_op, without_autocast
from fxopt.ir.ops.tile_attention import per_group, per_head

aten = torch.ops.aten

SCHEMA = (
    "row_attention(Tensor query, Tensor key, Tensor key_scale, Tensor value, Tensor value_scale, "
    "Tensor? mask, *, bool half_scores, bool is_causal, float scale, str dead_rows, bool mask_replaces, "
    "str score, Tensor? sinks, Tensor[]? captures=None, SymInt[]? sizes=None) -> Tensor"
)

# Of keys, widened at once by each thread. Measured on one core, float32: with 2**16 1.2x to 1.4x the time.
BLOCK_NUMBERS = 2**17


@without_autocast
def row_attention(
    query: torch.Tensor,
    key: torch.Tensor,
    key_scale: torch.Tensor,
    value: torch.Tensor,
    value_scale: torch.Tensor,
    mask: torch.Tensor | None,
    *,
    half_scores: bool,
    is_causal: bool,
    scale: float,
    **others: Any,
) -> torch.Tensor:
    """The result (B, Hq, Sq, Dv), sequences before heads in memory."""
    heads, count, groups = query.shape[1], query.shape[2], key.shape[1]
    given = Attributes(**others)
    packed = per_group(query.to(computed_in(query.dtype)) * scale, groups)
    operands = (packed, key, key_scale, value, value_scale)
    if is_plain(mask, is_causal, given) and key.shape[-1] == value.shape[-1]:
        grouped = None
        if mask is not None:
            rows, mask = _seen((key, key_scale, value, value_scale), mask)
            operands = (packed, *rows)
            grouped = None if bool(mask.all()) else mask_per_group(mask, query.shape[:3], groups)
        out = _in_blocks(*operands, grouped)
    else:
        out = _by_scores(*operands, mask, heads, is_causal, half_scores, given)
    out = per_head(out, heads).to(query.dtype)
    return out if count == 1 else out.transpose(1, 2).contiguous().transpose(1, 2)


def is_plain(mask: torch.Tensor | None, is_causal: bool, given: Attributes) -> bool:
    """Scores are scaled, and keys excluded; rows without a key are zeros."""
    selects = mask is None or (mask.dtype is torch.bool and given.dead_rows == ZERO)
    return selects and not given.score and given.sinks is None and not is_causal


_Rows = tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]


def _seen(rows: _Rows, mask: torch.Tensor) -> tuple[_Rows, torch.Tensor]:
    """From the first key that a query sees to the last: a static cache has room for others."""
    keys = rows[0].shape[2]
    if mask.shape[-1] != keys:
        return rows, mask
    seen = mask.reshape(-1, keys).any(0).nonzero()
    # One key is left where none is seen.
    first, last = (int(seen[0]), int(seen[-1]) + 1) if len(seen) else (0, 1)
    key, key_scale, value, value_scale = (
        each[..., first:last, :] if each.shape[-2:-1] == (keys,) else each for each in rows
    )
    return (key, key_scale, value, value_scale), mask[..., first:last]


def _in_blocks(
    query: torch.Tensor,
    key: torch.Tensor,
    key_scale: torch.Tensor,
    value: torch.Tensor,
    value_scale: torch.Tensor,
    mask: torch.Tensor | None,
) -> torch.Tensor:
    """Args: query: scaled, with the rows of a group one below the other. mask: of these rows, bool."""
    size, keys = _block_size(key), key.shape[2]
    outs: list[torch.Tensor] = []
    sums: list[torch.Tensor] = []
    for start, rows, weighed in zip(
        range(0, keys, size), widened(key, key_scale, size, query.dtype),
        widened(value, value_scale, size, query.dtype), strict=True,
    ):  # fmt: skip
        added = live = None
        if mask is not None:
            live = mask[..., start : start + size] if mask.shape[-1] == keys else mask
            shape = (*query.shape[:3], rows.shape[2])
            added = torch.where(live, 0.0, -math.inf).to(query.dtype).expand(shape)
        out, total = aten._scaled_dot_product_flash_attention_for_cpu(
            query, rows, weighed, 0.0, False, attn_mask=added, scale=1.0
        )
        outs.append(out)
        sums.append(total if live is None else total.masked_fill(~live.any(-1), -math.inf))
    if len(outs) == 1:
        return outs[0]
    shares: torch.Tensor = aten._safe_softmax.default(torch.stack(sums), 0)
    return (torch.stack(outs) * shares.unsqueeze(-1)).sum(0)


def _by_scores(
    query: torch.Tensor,
    key: torch.Tensor,
    key_scale: torch.Tensor,
    value: torch.Tensor,
    value_scale: torch.Tensor,
    mask: torch.Tensor | None,
    heads: int,
    is_causal: bool,
    half: bool,
    given: Attributes,
) -> torch.Tensor:
    """Args: query: as `_in_blocks` has it. heads: Hq."""
    size, dtype = _block_size(key), query.dtype
    scores = query.new_empty(*query.shape[:3], key.shape[2])
    for part, rows in zip(scores.split(size, -1), widened(key, key_scale, size, dtype), strict=True):
        part.copy_(query @ rows.mT)
    scores = per_head(scores, heads)
    weights = attention_weights(scores.half() if half else scores, given, mask, is_causal).to(dtype)
    out = query.new_zeros(*query.shape[:3], value.shape[-1])
    parts = per_group(weights, key.shape[1]).split(size, -1)
    for part, rows in zip(parts, widened(value, value_scale, size, dtype), strict=True):
        out += part @ rows
    return out


def _block_size(key: torch.Tensor) -> int:
    batch, heads, _, depth = key.shape
    return max(16, BLOCK_NUMBERS * torch.get_num_threads() // max(1, batch * heads * depth))


def widened(rows: torch.Tensor, scale: torch.Tensor, size: int, dtype: torch.dtype) -> Iterator[torch.Tensor]:
    """Blocks of `size` rows of (B, H, S, D) with their scales, in `dtype`, each until the next one."""
    batch, heads, keys, depth = rows.shape
    size = min(size, keys)
    if rows.stride(1) < rows.stride(2):  # as the rows lie: twice as fast as in another order
        memory = torch.empty(size, batch, heads, depth, dtype=dtype).permute(1, 2, 0, 3)
    else:
        memory = torch.empty(batch, heads, size, depth, dtype=dtype)
    scale = scale.to(dtype)
    each = scale.dim() > 1 and scale.shape[-2] == keys
    scales = scale.split(size, -2) if each else (scale,) * -(-keys // size)
    for block, factor in zip(rows.split(size, 2), scales, strict=True):
        yield widen(block, factor, memory[:, :, : block.shape[2]])


def widen(rows: torch.Tensor, scale: torch.Tensor, out: torch.Tensor) -> torch.Tensor:
    """``rows * scale`` in `out`.

    torch converts float8 one by one, which takes eight times as long as this: sign, exponent and fraction go
    to their places in float16, whose exponents are 8 larger.
    """
    if rows.dtype is not torch.float8_e4m3fn or out.dtype is torch.float64:
        return out.copy_(rows).mul_(scale)
    codes = rows.view(torch.int8)
    if int((codes & _ALL_BUT_SIGN).amax()) == _ALL_BUT_SIGN:  # NaN, which float16 has elsewhere
        return out.copy_(rows).mul_(scale)
    halves = codes.to(torch.int16).bitwise_left_shift_(7).bitwise_and_(~_SECOND_BIT).view(torch.float16)
    return out.copy_(halves).mul_(scale * 2.0**8)


_ALL_BUT_SIGN, _SECOND_BIT = 0x7F, 0x4000


def _fake(
    query: torch.Tensor,
    key: torch.Tensor,
    key_scale: torch.Tensor,
    value: torch.Tensor,
    *_: Any,
    **__: Any,
) -> torch.Tensor:
    return sequences_first(query, value)


def register(library: torch.library.Library) -> None:
    """Make the op known to torch's dispatcher."""
    define_op(library, SCHEMA, row_attention, _fake)
