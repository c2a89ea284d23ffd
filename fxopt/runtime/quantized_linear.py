"""``fxopt::packed_linear`` on a processor: which of four ways computes it, by the number of tokens M.

    integers   int8 weights and int8 activations: products of bytes (`quantized_linear.cpp`, AVX-512 VNNI),
               and `torch._int_mm` for many tokens on processors where that is faster
    codes      weights are widened in registers (`quantized_linear.cpp`), for few tokens
    panels     weights are widened into the first cache (`widened_products.h`), for many tokens
    dense      some rows of the weight at a time are widened, and multiplied by torch's own product: on
               processors where that is faster for many tokens, and for groups of odd sizes

None keeps a second copy of the weight. Which is faster depends on the machine: the first call of a kind
measures it, once per process, within a few milliseconds. Without AVX-512 and VNNI, or a C++
compiler, weights are widened by torch.
"""

from __future__ import annotations

import ctypes
import functools
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from fxopt.ir.ops.op import NAMESPACE, without_autocast
from fxopt.ir.ops.packed_linear import packed_linear, packed_linear_backward, round_tokens
from fxopt.ir.quantized_weight import QuantizedWeight
from fxopt.ir.weight_formats import FORMATS
from fxopt.runtime.native_code import NUMBERS, kernels_of
from fxopt.runtime.packed_product import Kind, Shortcut

_SOURCE = Path(__file__).with_suffix(".cpp")
_CODES = {torch.uint8: 0, torch.int8: 1, torch.float8_e4m3fn: 2}
# Columns that are widened together.
_BLOCK = 32
# Of the weight, widened at once: they stay in the processor's cache.
_DENSE_NUMBERS = 2**20
# From this many tokens on `torch._int_mm` is considered, which has matrix units (AMX) where a processor does.
_INT_MM_TOKENS = _MANY_TOKENS = 128
# Numbers of tokens at which ways are compared, and the weight (N, K) that they are compared with.
_PROBED, _PROBED_SHAPE = (4, 8, 16, 24, 32, 64), (256, 1024)

_TENSORS = ("x", "codes", "scales", "offsets", "bias", "table", "out")
_SIZES = ("tokens", "rows", "columns", "group", "groups", "row_bytes", "out_stride")
_KINDS = ("x_number", "scale_number", "offset_number", "bias_number", "code", "threads")


class _Product(ctypes.Structure):
    """`Product` of quantized_linear.cpp."""

    _fields_ = (
        *((name, ctypes.c_void_p) for name in _TENSORS),
        *((name, ctypes.c_int64) for name in _SIZES),
        *((name, ctypes.c_int32) for name in _KINDS),
    )


@functools.cache
def native() -> Any:
    """The compiled library, or None where it cannot be used; that is said once, in the log."""
    return kernels_of(_SOURCE, "quantized linears are computed by torch alone")


def register_processor() -> None:
    """Have `fxopt::packed_linear` computed here on CPUs. Idempotent; after `register_ops`."""
    _implementations()
    shortcut()


@functools.cache
def _implementations() -> torch.library.Library:
    library = torch.library.Library(NAMESPACE, "IMPL")
    library.impl("packed_linear", packed_linear_on_processor, "CPU")
    library.impl("packed_linear_backward", backward_on_processor, "CPU")
    return library


@functools.cache
def shortcut() -> Shortcut:
    """`fxopt::packed_product`, which has no gradients."""
    return Shortcut(packed_linear_on_processor)


@without_autocast
def packed_linear_on_processor(
    x: torch.Tensor,
    codes: torch.Tensor,
    scales: torch.Tensor,
    offsets: torch.Tensor | None,
    columns: torch.Tensor | None,
    bias: torch.Tensor | None,
    *,
    format: str,
    group_size: int,
    activation: str,
) -> torch.Tensor:
    """`packed_linear` by the fastest way."""
    weight = QuantizedWeight(FORMATS[format], x.shape[-1], group_size, codes, scales, offsets)
    given = x if columns is None else x.index_select(-1, columns)
    tokens = given.reshape(-1, x.shape[-1]).contiguous()
    if not _is_native(tokens, weight, bias):
        kinds = {"format": format, "group_size": group_size, "activation": activation}
        return packed_linear(x, codes, scales, offsets, columns, bias, **kinds)  # type: ignore[no-any-return]
    out = tokens.new_empty((tokens.shape[0], codes.shape[0]))
    way = route(weight, tokens, activation)
    way(tokens, weight, bias, out)
    if way in _FUNCTIONS:
        shortcut().allow((way, format, x.dtype), functools.partial(_kind, way, weight, x.dtype))
    return out.view((*x.shape[:-1], codes.shape[0]))


def _is_native(tokens: torch.Tensor, weight: QuantizedWeight, bias: torch.Tensor | None) -> bool:
    numbers = [each.dtype for each in (tokens, weight.scales, weight.offsets, bias) if each is not None]
    aligned = weight.format.bits == 8 or _in_blocks(weight)
    contiguous = all(each.is_contiguous() for each in weight.tensors.values())
    if not aligned or not contiguous or not NUMBERS.keys() >= set(numbers):
        return False
    return weight.shape[0] > 0 and weight.shape[1] > 0 and native() is not None


Way = Callable[[torch.Tensor, QuantizedWeight, torch.Tensor | None, torch.Tensor], None]


def route(weight: QuantizedWeight, tokens: torch.Tensor, activation: str) -> Way:
    """How a product with tokens (M, K) is computed."""
    count = tokens.shape[0]
    if count == 0:
        return lambda *_: None
    if not activation:
        return _of_wide_tokens(weight, tokens.dtype, count)
    whole = weight.scales.shape[1] == 1 and weight.offsets is None
    if activation == "int8" and weight.format.name == "int8" and whole:
        return many_integers if count >= _INT_MM_TOKENS and int_mm_is_faster() else integers
    return functools.partial(_rounded_first, activation)


def _of_wide_tokens(weight: QuantizedWeight, dtype: torch.dtype, count: int) -> Way:
    name = weight.format.name
    if count < many_from(name, dtype):
        return codes_in_registers
    return panels if panels_are_faster(name, dtype) and _in_blocks(weight) else dense


def _in_blocks(weight: QuantizedWeight) -> bool:
    """Its groups begin where blocks of columns do that are widened at once."""
    return weight.group_size % _BLOCK == 0 or weight.scales.shape[1] == 1


def integers(x: torch.Tensor, weight: QuantizedWeight, bias: Any, out: torch.Tensor) -> None:
    """Products of bytes."""
    _call(_FUNCTIONS[integers], x, weight, bias, out)


def many_integers(x: torch.Tensor, weight: QuantizedWeight, bias: Any, out: torch.Tensor) -> None:
    """Products of bytes by torch, for many tokens."""
    codes, scale = round_tokens(x.float(), "int8")
    wide = torch._int_mm(codes, weight.codes.t()).float().mul_(scale).mul_(weight.scales.float().t())
    out.copy_(wide if bias is None else wide.add_(bias))


def codes_in_registers(x: torch.Tensor, weight: QuantizedWeight, bias: Any, out: torch.Tensor) -> None:
    """Weights are widened where they are multiplied."""
    _call(_FUNCTIONS[codes_in_registers], x, weight, bias, out)


def panels(x: torch.Tensor, weight: QuantizedWeight, bias: Any, out: torch.Tensor) -> None:
    """Weights are widened into the first cache, 64 features at a time."""
    _call(_FUNCTIONS[panels], x, weight, bias, out)


def dense(x: torch.Tensor, weight: QuantizedWeight, bias: Any, out: torch.Tensor) -> None:
    """Rows of the weight are widened in turn, for torch's product."""
    # That of float16 takes ten times as long as that of float32.
    given = x.float() if x.dtype is torch.float16 else x
    for start, rows in widened_rows(weight, given.dtype):
        stop = start + rows.shape[0]
        part = None if bias is None else bias[start:stop].to(given.dtype)
        out[:, start:stop] = torch.nn.functional.linear(given, rows, part)


def _rounded_first(
    activation: str, x: torch.Tensor, weight: QuantizedWeight, bias: Any, out: torch.Tensor
) -> None:
    """The product in float32 with tokens that are rounded to 8 bits."""
    codes, scale = round_tokens(x.float(), activation)
    given = codes.float().mul_(scale)
    wide = out if out.dtype is given.dtype else torch.empty_like(out, dtype=given.dtype)
    _of_wide_tokens(weight, given.dtype, given.shape[0])(given, weight, bias, wide)
    if wide is not out:
        out.copy_(wide)


def widened_rows(weight: QuantizedWeight, dtype: torch.dtype) -> Any:
    """Yields (first row, dense rows of the weight in `dtype`); the memory is used again for the next."""
    rows, columns = weight.shape
    step = max(16, _DENSE_NUMBERS // columns)
    memory = torch.empty((min(step, rows), columns), dtype=dtype)
    for start in range(0, rows, step):
        part = weight.rows(start, min(start + step, rows))
        here = memory[: part.shape[0]]
        _call("fxopt_dequantize", here, part, None, here)
        yield start, here


@without_autocast
def backward_on_processor(
    grad: torch.Tensor,
    codes: torch.Tensor,
    scales: torch.Tensor,
    offsets: torch.Tensor | None,
    columns: torch.Tensor | None,
    *,
    format: str,
    group_size: int,
    in_features: int,
) -> torch.Tensor:
    """`packed_linear_backward`, some rows of the weight at a time."""
    weight = QuantizedWeight(FORMATS[format], in_features, group_size, codes, scales, offsets)
    rows = grad.reshape(-1, grad.shape[-1])
    if not _is_native(rows, weight, None):
        kinds = {"format": format, "group_size": group_size, "in_features": in_features}
        return packed_linear_backward(grad, codes, scales, offsets, columns, **kinds)  # type: ignore[no-any-return]
    total = rows.new_zeros((rows.shape[0], in_features), dtype=torch.float32)
    for start, wide in widened_rows(weight, torch.float32):
        total += rows[:, start : start + wide.shape[0]].float() @ wide
    if columns is not None:
        total = torch.empty_like(total).index_copy_(1, columns, total)
    return total.to(grad.dtype).view(*grad.shape[:-1], in_features)


_FUNCTIONS: dict[Way, str] = {
    integers: "fxopt_int8_dynamic",
    codes_in_registers: "fxopt_weight_only",
    panels: "fxopt_widened_products",
}


def _kind(way: Way, weight: QuantizedWeight, dtype: torch.dtype) -> Kind:
    """What `route` computes in this way, for all numbers of tokens."""
    form = weight.format
    least, most = 1, 2**62
    if way is integers:
        most = _INT_MM_TOKENS - 1 if int_mm_is_faster() else most
    elif way is codes_in_registers:
        most = many_from(form.name, dtype) - 1
    else:
        least = many_from(form.name, dtype)
    return Kind(
        form.name.encode(),
        b"int8" if way is integers else b"",
        form.table.data_ptr() if form.values else None,
        ctypes.cast(getattr(native(), _FUNCTIONS[way]), ctypes.c_void_p),
        least,
        most,
        NUMBERS[dtype],
        _CODES[form.storage],
        form.bits,
        way is integers,
        way is panels or form.bits == 4,
    )


def _call(
    name: str, x: torch.Tensor, weight: QuantizedWeight, bias: torch.Tensor | None, out: torch.Tensor
) -> None:
    """Call a function of the library; `x` may be any tensor of the dtype of `out` where it is not read."""
    table = weight.format.table if weight.format.values else None
    tensors = (x, weight.codes, weight.scales, weight.offsets, bias, table, out)
    numbers = (x, weight.scales, weight.offsets, bias)
    given = _Product(
        *(None if each is None else each.data_ptr() for each in tensors),
        x.shape[0],
        *weight.shape,
        weight.group_size,
        weight.scales.shape[1],
        weight.codes.shape[1],
        out.stride(0),
        *(0 if each is None else NUMBERS[each.dtype] for each in numbers),
        _CODES[weight.codes.dtype],
        torch.get_num_threads(),
    )
    getattr(native(), name)(ctypes.byref(given))


@functools.cache
def int_mm_is_faster() -> bool:
    """Whether `torch._int_mm` is faster for many tokens than products of bytes here: measured once."""
    weight, x, out = _probe("int8", torch.float32, _INT_MM_TOKENS)
    return _seconds(many_integers, x, weight, out) < _seconds(integers, x, weight, out)


@functools.cache
def panels_are_faster(format: str, dtype: torch.dtype) -> bool:
    """Whether, for many tokens, `panels` are faster than `dense` here: measured once."""
    weight, x, out = _probe(format, dtype, _MANY_TOKENS)
    return _seconds(panels, x, weight, out) < _seconds(dense, x, weight, out)


@functools.cache
def many_from(format: str, dtype: torch.dtype) -> int:
    """The number of tokens from which on weights are not widened in registers: measured once."""
    many = panels if panels_are_faster(format, dtype) else dense
    for count in _PROBED:
        weight, x, out = _probe(format, dtype, count)
        if _seconds(many, x, weight, out) < _seconds(codes_in_registers, x, weight, out):
            return count
    return 2 * _PROBED[-1]


def _probe(format: str, dtype: torch.dtype, count: int) -> tuple[QuantizedWeight, torch.Tensor, torch.Tensor]:
    """A weight, that many tokens, and the memory of their product."""
    from fxopt.ir.quantize import quantize

    rows, columns = _PROBED_SHAPE
    weight = quantize(torch.linspace(-1, 1, rows * columns).view(rows, columns), format)
    x = torch.ones(count, columns, dtype=dtype)
    return weight, x, x.new_empty(count, rows)


def _seconds(way: Way, x: torch.Tensor, weight: QuantizedWeight, out: torch.Tensor) -> float:
    """The shortest of four runs."""
    taken = []
    for _ in range(4):
        start = time.perf_counter()
        way(x, weight, None, out)
        taken.append(time.perf_counter() - start)
    return min(taken)
