"""``fxopt::decode_attention``: a few queries over a long cache, of which only the live part is read.

What the provider "decode" of ``fxopt::attention`` is made of. A static cache has room for keys that are not
there yet, and a mask that excludes them; which ones is known when the op runs.

    query, key, value   (B, Hq, Sq, D), (B, Hkv, Skv, D), (B, Hkv, Skv, D); Hq is a multiple of Hkv
    live                bool, broadcastable to (B, Hq, Sq, Skv), Skv in its last dimension: who takes part
    span                (2,) int64: before the first and from the second key on, no query sees any
    scale, dead_rows    as ``fxopt::attention`` has them
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch.nn.functional import scaled_dot_product_attention

from fxopt.ir.formula import numbered
from fxopt.ir.ops.attention_attributes import Attributes, computed_in, without_symbol
from fxopt.ir.ops.masking import MEAN, NAN
from fxopt.ir.ops.op import NAMESPACE, without_autocast
from fxopt.ir.ops.tile_attention import per_group, per_head
from fxopt.ir.program import MaskProgram
from fxopt.ir.tile_values import TileValues

SCHEMA = (
    "decode_attention(Tensor query, Tensor key, Tensor value, Tensor live, Tensor span, *, "
    "float scale, str dead_rows) -> Tensor"
)


def in_decode(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attn_mask: torch.Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    **attributes: Any,
) -> torch.Tensor:
    """`fxopt::attention` by its mask's formula; the arguments are those of the op."""
    given = Attributes(**attributes)
    query, scale = without_symbol(query, given.factor(query))
    columns = key.shape[-2]
    ranges = tuple((0, size) for size in (*query.shape[:3], columns))
    values = TileValues(ranges, numbered("c", given.captures), numbered("n", given.sizes), query.device)
    live = values.condition(MaskProgram.parse(given.mask).live)
    live = live.expand(*live.shape[:3], columns)
    out: torch.Tensor = torch.ops.fxopt.decode_attention(
        query, key, value, live, span_of(live), scale=float(scale), dead_rows=given.dead_rows
    )
    return out


def grouped(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attn_mask: torch.Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    **attributes: Any,
) -> torch.Tensor:
    """`fxopt::attention` without a mask: each key is read once for all query heads that share it.

    torch's own way with groups on the CPU reads the keys again for each of them.
    """
    scale = Attributes(**attributes).factor(query)
    rows = per_group(query, key.shape[1])
    return per_head(scaled_dot_product_attention(rows, key, value, scale=scale), query.shape[1])


def span_of(live: torch.Tensor) -> torch.Tensor:
    """The first key that a query sees, and the one behind the last; the latter is 0 when there is none."""
    seen = live.flatten(0, 2).any(0)
    places = torch.arange(seen.shape[0], device=live.device)
    first = torch.where(seen, places, seen.shape[0]).amin()
    return torch.stack([first, torch.where(seen, places + 1, 0).amax()])


@without_autocast
def decode_attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    live: torch.Tensor,
    span: torch.Tensor,
    *,
    scale: float,
    dead_rows: str,
) -> torch.Tensor:
    """The result (B, Hq, Sq, D), sequences before heads in memory."""
    batch, heads, rows, _ = query.shape
    groups = key.shape[1]
    first, last = span.tolist()
    mask = live[..., first:last].expand(-1, -1, rows, -1)
    all_live = first < last and bool(mask.all())
    if first < last:
        out = scaled_dot_product_attention(
            per_group(query, groups), key[:, :, first:last], value[:, :, first:last],
            None if all_live else _per_group(mask, heads, groups), scale=scale,
        )  # fmt: skip
        out = per_head(out, heads)
    else:
        out = query.new_zeros(batch, heads, rows, value.shape[-1])
    if not all_live and dead_rows in (MEAN, NAN):
        out = _fill_dead(out, mask.any(-1, keepdim=True), value, dead_rows)
    return out.transpose(1, 2).contiguous().transpose(1, 2)


def _fill_dead(out: torch.Tensor, alive: torch.Tensor, value: torch.Tensor, dead_rows: str) -> torch.Tensor:
    if bool(alive.all()):
        return out
    if dead_rows == NAN:
        return torch.where(alive, out, math.nan)
    mean = value.mean(-2, keepdim=True, dtype=computed_in(value.dtype)).to(out.dtype)
    return torch.where(alive, out, mean.repeat_interleave(out.shape[1] // value.shape[1], 1))


def _per_group(mask: torch.Tensor, heads: int, groups: int) -> torch.Tensor:
    """(B, Hq, Sq, N) as queries of a group stand one below the other."""
    batch, one, rows, width = mask.shape
    if one == 1:
        mask = mask.expand(batch, heads // groups, rows, width)
    return mask.reshape(batch, min(one, groups), heads // groups * rows, width)


def _fake(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, *_: Any, **__: Any) -> torch.Tensor:
    batch, heads, rows, width = *query.shape[:3], value.shape[-1]
    return query.new_empty(batch, rows, heads, width).transpose(1, 2)


def register(library: torch.library.Library) -> None:
    """Make the op known to torch's dispatcher."""
    library.define(SCHEMA)
    library.impl("decode_attention", decode_attention, "CompositeExplicitAutograd")
    torch.library.register_fake(f"{NAMESPACE}::decode_attention", _fake, lib=library)
