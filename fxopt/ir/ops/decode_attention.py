"""``fxopt::decode_attention``: a few queries over a long cache, of which only the live part is read.

What the provider "decode" of ``fxopt::attention`` is made of. A static cache has room for keys that are not
there yet, and a mask that excludes them; which ones is known when the op runs.

    query, key, value   (B, Hq, Sq, D), (B, Hkv, Skv, D), (B, Hkv, Skv, Dv); Hq is a multiple of Hkv
    mask                broadcastable to (B, Hq, Sq, Skv), Skv in its last dimension: bool, who takes part, or
                        numbers that are added to the scores
    span                (3,) int64, see `span_of`
    the others          as ``fxopt::attention`` has them

A score far below the largest one of its row has the weight 0, in every dtype. So keys whose scores get the
lowest number, or -inf, are left out like those of a bool mask where each row has another key. In a row
without one the scores may still matter, and every key is read.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch.nn.functional import scaled_dot_product_attention

from fxopt.ir.formula import numbered
from fxopt.ir.ops.attention_attributes import Attributes, computed_in, without_symbol
from fxopt.ir.ops.decomposed_attention import absorbs, decomposed
from fxopt.ir.ops.masking import MEAN, NAN, NONE
from fxopt.ir.ops.op import define_op, without_autocast
from fxopt.ir.ops.tile_attention import per_group, per_head
from fxopt.ir.program import MaskProgram
from fxopt.ir.tile_values import TileValues

SCHEMA = (
    "decode_attention(Tensor query, Tensor key, Tensor value, Tensor mask, Tensor span, *, float scale, "
    "str dead_rows, bool dense, bool mask_replaces=False, bool wide_scores=False, str score='', "
    "Tensor? sinks=None, Tensor? query_rest=None, Tensor? key_rest=None, Tensor[]? captures=None, "
    "SymInt[]? sizes=None) -> Tensor"
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
    """`fxopt::attention` with a mask; the arguments are those of the op."""
    given = Attributes(**attributes)
    if attn_mask is None:
        raise ValueError("nothing tells which keys are live")
    factor, rest = given.factor(query), given.query_rest
    query, scale = without_symbol(query, factor)
    if rest is not None:
        rest, _ = without_symbol(rest, factor)
    dense = _is_dense(given, query, value, attn_mask)
    if attn_mask.is_floating_point() and given.mask and not given.bias and not dense:
        mask = _live(given, query, key)
    else:
        mask = attn_mask[(None,) * (4 - attn_mask.dim())]
    mask = mask.expand(*mask.shape[:3], key.shape[-2])
    options: dict[str, Any] = {"scale": float(scale), "dead_rows": given.dead_rows, "dense": dense}
    if dense:
        options |= {"mask_replaces": given.mask_replaces, "wide_scores": given.wide_scores}
        options |= {"score": given.score, "sinks": given.sinks}
        options |= {"query_rest": rest, "key_rest": given.key_rest}
        options |= {"captures": given.captures, "sizes": given.sizes} if given.score else {}
    span = span_of(mask, dense or mask.is_floating_point())
    out: torch.Tensor = torch.ops.fxopt.decode_attention(query, key, value, mask, span, **options)
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
    return _packed(query, key, value, None, Attributes(**attributes).factor(query))


def _is_dense(given: Attributes, query: torch.Tensor, value: torch.Tensor, mask: torch.Tensor) -> bool:
    """The CPU's kernel has not the answer."""
    if given.score or given.sinks is not None or given.query_rest is not None:
        return True
    if query.shape[-1] != value.shape[-1]:
        return True
    unlike = given.dead_rows == NAN or (given.dead_rows == NONE and query.dtype is torch.float16)
    return unlike and mask.is_floating_point()


def _live(given: Attributes, query: torch.Tensor, key: torch.Tensor) -> torch.Tensor:
    """The mask by its formula."""
    ranges = tuple((0, size) for size in (*query.shape[:3], key.shape[-2]))
    values = TileValues(ranges, numbered("c", given.captures), numbered("n", given.sizes), query.device)
    return values.condition(MaskProgram.parse(given.mask).live)


def span_of(mask: torch.Tensor, whole: bool) -> torch.Tensor:
    """The first key that a query sees, the one behind the last, and whether the mask changes nothing there.

    The second is 0 when there is none. All keys with `whole`, if a row has none.
    """
    first, last = _ends(mask)
    free = mask == 0 if mask.is_floating_point() else mask
    rows = mask.numel() // mask.shape[-1]
    unmasked = free.sum() == rows * (last - first)
    if whole:
        first, last = _unless_dead(mask, first, last)
    return torch.stack([first, last, unmasked.to(torch.int64)])


def ends_of(mask: torch.Tensor, whole: bool) -> torch.Tensor:
    """(2,): the first two numbers of `span_of`."""
    first, last = _ends(mask)
    return torch.stack(_unless_dead(mask, first, last) if whole else (first, last))


def _ends(mask: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    columns = mask.shape[-1]
    seen, places = _rows_of(mask).any(0), torch.arange(columns, device=mask.device)
    return torch.where(seen, places, columns).amin(), torch.where(seen, places + 1, 0).amax()


def _unless_dead(
    mask: torch.Tensor, first: torch.Tensor, last: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    dead = ~_rows_of(mask).any(1).all()
    return torch.where(dead, 0, first), torch.where(dead, mask.shape[-1], last)


def _rows_of(mask: torch.Tensor) -> torch.Tensor:
    """(rows, keys): who takes part."""
    live = ~_excludes(mask) if mask.is_floating_point() else mask
    return live.reshape(-1, mask.shape[-1])


def _excludes(mask: torch.Tensor) -> torch.Tensor:
    """Float16 has no number that is far below every score."""
    return mask == -math.inf if mask.dtype is torch.float16 else absorbs(mask)


@without_autocast
def decode_attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    mask: torch.Tensor,
    span: torch.Tensor,
    *,
    scale: float,
    dead_rows: str,
    dense: bool,
    key_rest: torch.Tensor | None = None,
    **others: Any,
) -> torch.Tensor:
    """The result (B, Hq, Sq, Dv), sequences before heads in memory."""
    first, last, unmasked = span.tolist()
    if first >= last:
        out = query.new_zeros(*query.shape[:3], value.shape[-1])
    else:
        live = None if unmasked else mask[..., first:last]
        operands = (query, key[:, :, first:last], value[:, :, first:last], live)
        if dense:
            others["key_rest"] = None if key_rest is None else key_rest[:, :, first:last]
            out = decomposed(*operands, scale=scale, dead_rows=dead_rows, enable_gqa=True, **others)
        else:
            out = _packed(*operands, scale)
    if not unmasked and mask.dtype is torch.bool and not dense and dead_rows in (MEAN, NAN):
        out = _fill_dead(out, mask.any(-1, keepdim=True), value, dead_rows)
    return out if out.shape[2] == 1 else out.transpose(1, 2).contiguous().transpose(1, 2)


def _packed(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, mask: torch.Tensor | None, scale: float
) -> torch.Tensor:
    """A key is read once for all heads of its group, whose queries stand one below the other."""
    heads, groups = query.shape[1], key.shape[1]
    if mask is not None:
        mask = mask_per_group(mask, query.shape[:3], groups)
    packed = scaled_dot_product_attention(per_group(query, groups), key, value, mask, scale=scale)
    return per_head(packed, heads)


def _fill_dead(out: torch.Tensor, alive: torch.Tensor, value: torch.Tensor, dead_rows: str) -> torch.Tensor:
    if bool(alive.all()):
        return out
    if dead_rows == NAN:
        return torch.where(alive, out, math.nan)
    mean = value.mean(-2, keepdim=True, dtype=computed_in(value.dtype)).to(out.dtype)
    return torch.where(alive, out, mean.repeat_interleave(out.shape[1] // value.shape[1], 1))


def mask_per_group(mask: torch.Tensor, outer: tuple[int, ...], groups: int) -> torch.Tensor:
    """(B, Hq, Sq, N) as queries of a group stand one below the other; `outer` is (B, Hq, Sq)."""
    _, heads, rows = outer
    one, width = mask.shape[1], mask.shape[-1]
    if heads == groups or (one == 1 and mask.shape[2] == 1):
        return mask
    mask = mask.expand(-1, heads // groups if one == 1 else -1, rows, -1)
    return mask.reshape(mask.shape[0], min(one, groups), heads // groups * rows, width)


def sequences_first(query: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
    """Memory for a result (B, Hq, Sq, Dv), sequences before heads."""
    batch, heads, rows, width = *query.shape[:3], value.shape[-1]
    return query.new_empty(batch, rows, heads, width).transpose(1, 2)


def _fake(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, *_: Any, **__: Any) -> torch.Tensor:
    return sequences_first(query, value)


def register(library: torch.library.Library) -> None:
    """Make the op known to torch's dispatcher."""
    define_op(library, SCHEMA, decode_attention, _fake, "CPU")
