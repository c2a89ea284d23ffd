"""``fxopt::row_attention`` on a processor: rows of 8 bits are read once, as they are stored.

`quantized_rows.cpp` widens them in registers (AVX-512). What it does not compute, and what there is no C++
compiler for, is computed by torch: `fxopt.ir.ops.row_attention`.
"""

from __future__ import annotations

import ctypes
import functools
from pathlib import Path
from typing import Any

import torch

from fxopt.ir.ops.attention_attributes import Attributes, computed_in
from fxopt.ir.ops.decode_attention import mask_per_group
from fxopt.ir.ops.op import NAMESPACE, without_autocast
from fxopt.ir.ops.row_attention import is_plain, row_attention
from fxopt.ir.ops.tile_attention import per_group, per_head
from fxopt.runtime.native_code import kernels_of

_SOURCE = Path(__file__).with_suffix(".cpp")
_CODES = {torch.int8: 1, torch.float8_e4m3fn: 2}
_Strides = ctypes.c_int64 * 3


class _Rows(ctypes.Structure):
    """`Rows` of quantized_rows.cpp."""

    _fields_ = (
        ("codes", ctypes.c_void_p),
        ("scales", ctypes.c_void_p),
        ("code_strides", _Strides),
        ("scale_strides", _Strides),
        ("width", ctypes.c_int64),
        ("code", ctypes.c_int64),
    )


class _Attention(ctypes.Structure):
    """`Attention` of quantized_rows.cpp."""

    _fields_ = (
        *((name, ctypes.c_void_p) for name in ("query", "mask", "out")),
        ("key", _Rows),
        ("value", _Rows),
        ("mask_strides", _Strides),
        *((name, ctypes.c_int64) for name in ("batch", "groups", "rows", "keys", "threads")),
    )


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


@without_autocast
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
    batch, heads, count, _ = query.shape
    groups, keys = key.shape[1:3]
    packed = (per_group(query.float(), groups) * scale).contiguous()
    out = packed.new_empty(*packed.shape[:3], value.shape[-1])
    seen = None if mask is None else _by_row(mask, query, groups, keys)
    given = _Attention(
        packed.data_ptr(), None if seen is None else seen.data_ptr(), out.data_ptr(),
        *(_rows(*each) for each in rows), _Strides(*((0, 0, 0) if seen is None else seen.stride()[:3])),
        batch, groups, packed.shape[2], keys, torch.get_num_threads(),
    )  # fmt: skip
    native().fxopt_attend_rows(ctypes.byref(given))
    found = per_head(out, heads).to(query.dtype)
    return found if count == 1 else found.transpose(1, 2).contiguous().transpose(1, 2)


def _is_native(query: torch.Tensor, *rows: tuple[torch.Tensor, torch.Tensor]) -> bool:
    if computed_in(query.dtype) is not torch.float32 or 0 in query.shape:
        return False
    return all(_reads(*each) for each in rows) and native() is not None


def _reads(codes: torch.Tensor, scale: torch.Tensor) -> bool:
    """Entries of a row are neighbours, and it has a scale."""
    of_rows = scale.dtype is torch.float32 and scale.dim() == 4 and scale.shape[2:] == (codes.shape[2], 1)
    return of_rows and codes.dtype in _CODES and codes.shape[2] > 0 and codes.stride(-1) == 1


def _rows(codes: torch.Tensor, scale: torch.Tensor) -> _Rows:
    scales = scale.expand(*codes.shape[:3], 1)
    strides = _Strides(*codes.stride()[:3]), _Strides(*scales.stride()[:3])
    return _Rows(codes.data_ptr(), scale.data_ptr(), *strides, codes.shape[-1], _CODES[codes.dtype])


def _by_row(mask: torch.Tensor, query: torch.Tensor, groups: int, keys: int) -> torch.Tensor:
    """(B, Hkv, rows of a group, Skv), of which keys are neighbours."""
    grouped = mask_per_group(mask[(None,) * (4 - mask.dim())], tuple(query.shape[:3]), groups)
    if grouped.shape[-1] != keys or grouped.stride(-1) != 1:
        grouped = grouped.expand(*grouped.shape[:3], keys).contiguous()
    batch, heads, count, _ = query.shape
    return grouped.expand(batch, groups, heads // groups * count, keys)
