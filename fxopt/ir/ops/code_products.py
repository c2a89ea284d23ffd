"""What a product with a quantized weight is made of, as ops that kernels know (`fxopt.ir.ops.widen_codes`).

    dequantized   codes -> numbers, the right operand of a product
    wide_product  a product in float32 of narrower operands, or in int32 of int8: scales come behind it
    round_e4m3    the left operand of a product of numbers in e4m3, rounded and still wide

They stand behind autograd alone, for kernels; what no kernel takes is computed by plain torch.
"""

from __future__ import annotations

from typing import Any

import torch

from fxopt.ir.ops.op import NAMESPACE, define_op
from fxopt.ir.ops.widen_codes import dequantized, round_e4m3, wide_product

WIDENING = CODES, PRODUCT, ROUNDED = "dequantized", "wide_product", "round_e4m3"
_OF_CODES = "(Tensor codes, Tensor? scales, Tensor? offsets, Tensor? values, int columns, int group_size"
_LEAST_INT_MM = 17  # rows that `torch._int_mm` wants on a GPU; columns and depth in multiples of 8


def is_op(target: object, name: str) -> bool:
    """Whether a node with this target calls the op of this name."""
    return isinstance(target, torch._ops.OpOverload) and target._schema.name == f"{NAMESPACE}::{name}"


def _fast_product(left: torch.Tensor, right: torch.Tensor) -> torch.Tensor:
    """`wide_product` by the library where it has it."""
    on_gpu = left.device.type == "cuda"
    if on_gpu and left.dtype in (torch.float16, torch.bfloat16):
        return torch.mm(left, right, out_dtype=torch.float32)
    if left.dtype is not torch.int8:
        return wide_product(left, right)
    if not on_gpu:
        return torch._int_mm(left, right)
    aligned = left.shape[1] % 8 == 0 and right.shape[1] % 8 == 0
    if not aligned:
        return wide_product(left, right)
    rows = left.shape[0]
    missing = max(0, _LEAST_INT_MM - rows)
    return torch._int_mm(torch.nn.functional.pad(left, (0, 0, 0, missing)), right)[:rows]


def _fake_codes(codes: torch.Tensor, *rest: Any) -> torch.Tensor:
    return codes.new_empty((codes.shape[0], rest[3]), dtype=rest[-1])


def _fake_product(left: torch.Tensor, right: torch.Tensor) -> torch.Tensor:
    dtype = torch.int32 if left.dtype is torch.int8 else torch.float32
    return left.new_empty((left.shape[0], right.shape[1]), dtype=dtype)


def register(library: torch.library.Library) -> None:
    """Make the ops known to torch's dispatcher."""
    define_op(library, f"{CODES}{_OF_CODES}, int bits, ScalarType dtype) -> Tensor", dequantized, _fake_codes)
    define_op(library, f"{PRODUCT}(Tensor left, Tensor right) -> Tensor", _fast_product, _fake_product)
    define_op(library, f"{ROUNDED}(Tensor x) -> Tensor", round_e4m3, torch.empty_like)
