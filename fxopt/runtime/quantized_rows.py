"""``fxopt::row_attention`` on a processor: rows of 8 bits are read once, as they are stored.

`quantized_rows.cpp` widens them in registers (AVX-512). What it does not compute, and what there is no C++
compiler for, is computed by torch: `fxopt.ir.ops.row_attention`.
"""

from __future__ import annotations

import functools
import struct
from pathlib import Path
from typing import Any

import torch

from fxopt.ir.ops.attention_attributes import Attributes
from fxopt.ir.ops.decode_attention import sequences_first
from fxopt.ir.ops.op import NAMESPACE
from fxopt.ir.ops.row_attention import is_plain, row_attention
from fxopt.runtime.native_code import NUMBERS, kernels_of

_SOURCE = Path(__file__).with_suffix(".cpp")
_CODES = {torch.int8: 1, torch.float8_e4m3fn: 2}
# `Attention` of quantized_rows.cpp: addresses and numbers of 64 bits. To fill a structure of ctypes takes
# several times as long.
_FORM = struct.Struct("@39qd")


@functools.cache
def native() -> Any:
    """The compiled library, or None where it cannot be used; that is said once, in the log."""
    return kernels_of(_SOURCE, "rows of 8 bits are read by torch alone")


@functools.cache
def register_rows() -> torch.library.Library:
    """Have `fxopt::row_attention` computed here on CPUs. Idempotent; after `register_ops`."""
    library = torch.library.Library(NAMESPACE, "IMPL")
    library.impl("row_attention", row_attention_on_processor, "CPU")
    return library


def row_attention_on_processor(
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
    """`row_attention` by the fastest way."""
    rows = (key, key_scale), (value, value_scale)
    if not is_plain(mask, is_causal, Attributes(**others)) or not _is_native(query, *rows):
        how = {"half_scores": half_scores, "is_causal": is_causal, "scale": scale, **others}
        whole: torch.Tensor = row_attention(query, key, key_scale, value, value_scale, mask, **how)
        return whole
    # The library takes a few microseconds for a short context, as each operation of torch does.
    batch, heads, count, _ = query.shape
    groups, keys = key.shape[1:3]
    query = query if query.stride(-1) == 1 else query.contiguous()
    seen = None if mask is None else _of_keys(mask, (batch, heads, count, keys))
    out = sequences_first(query, value)
    given = _FORM.pack(
        query.data_ptr(), 0 if seen is None else seen.data_ptr(), out.data_ptr(),
        *_numbers(*rows[0]), *_numbers(*rows[1]),
        *query.stride()[:3], *((0, 0, 0) if seen is None else seen.stride()[:3]), *out.stride()[:3],
        batch, groups, heads // groups, count, keys, torch.get_num_threads(), NUMBERS[query.dtype], scale,
    )  # fmt: skip
    native().fxopt_attend_rows(given)
    return out


def _is_native(query: torch.Tensor, *rows: tuple[torch.Tensor, torch.Tensor]) -> bool:
    if query.dtype not in NUMBERS or 0 in query.shape:
        return False
    return all(_reads(*each) for each in rows) and native() is not None


def _reads(codes: torch.Tensor, scale: torch.Tensor) -> bool:
    """Entries of a row are neighbours, and it has a scale."""
    of_rows = scale.dtype is torch.float32 and scale.dim() == 4 and scale.shape[2:] == (codes.shape[2], 1)
    return of_rows and codes.dtype in _CODES and codes.shape[2] > 0 and codes.stride(-1) == 1


def _numbers(codes: torch.Tensor, scale: torch.Tensor) -> tuple[int, ...]:
    """`Rows` of quantized_rows.cpp."""
    scale = scale if scale.shape[:3] == codes.shape[:3] else scale.expand(*codes.shape[:3], 1)
    strides = *codes.stride()[:3], *scale.stride()[:3]
    return codes.data_ptr(), scale.data_ptr(), *strides, codes.shape[-1], _CODES[codes.dtype]


def _of_keys(mask: torch.Tensor, shape: tuple[int, ...]) -> torch.Tensor:
    """Of (B, Hq, Sq, Skv), whose keys are neighbours."""
    if mask.shape[-1] != shape[-1] or mask.stride(-1) != 1:
        mask = mask.expand(*mask.shape[:-1], shape[-1]).contiguous()
    return mask.expand(shape)
