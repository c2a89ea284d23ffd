"""bfloat16 in Triton's interpreter: arithmetic on values instead of on bit patterns.

The interpreter (`TRITON_INTERPRET=1`) holds a bfloat16 as the 16-bit integer of its bits and then computes
on that integer: `x * y`, comparisons, `tl.dot`, casts from integers and sums give nonsense without a warning,
and casts from float32 cut off where the hardware rounds. Seen in Triton 3.6 to 3.9; other dtypes are right.

`exact_bfloat16` owns the remedy: while it is active every operation on bfloat16 is done in float32 and
rounded once to the nearest, ties to even, which is what a GPU's result is. Sums and other reductions of
bfloat16 go element by element through the kernel's combining function, so a kernel that forgot to widen its
accumulator is seen to be inexact. What stays impossible is refused by the interpreter itself: atomics on
bfloat16.
"""

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

# --- All below is copied into kernels' files as it stands.
import numpy as np  # noqa: E402
import triton.language as tl  # noqa: E402
from triton.runtime import interpreter  # noqa: E402


def widened(handle: Any) -> Any:
    """The operand with its values in float32, if it is a bfloat16."""
    if handle.dtype.scalar != tl.bfloat16:
        return handle
    values = (handle.data.astype(np.uint32) << np.uint32(16)).view(np.float32)
    return interpreter.TensorHandle(values, tl.float32)


def narrowed(values: Any) -> Any:
    """A bfloat16 operand of values, rounded to the nearest, ties to even."""
    with np.errstate(over="ignore"):
        bits = np.asarray(values, dtype=np.float32).view(np.uint32)
    half = np.uint32(0x7FFF) + ((bits >> np.uint32(16)) & np.uint32(1))
    rounded = np.where(np.isnan(values), np.uint32(0x7FC00000), bits + half) >> np.uint32(16)
    return interpreter.TensorHandle(rounded.astype(np.uint16), tl.bfloat16)


class Bfloat16Builder(interpreter.InterpreterBuilder):
    """The interpreter's operations, with those on bfloat16 done on values."""

    def on_values(self, op: Callable[..., Any], *operands: Any) -> Any:
        result = op(*(widened(operand).data for operand in operands))
        if result.dtype == np.bool_:
            return interpreter.TensorHandle(result, tl.int1)
        return narrowed(result)

    def unary_op(self, arg: Any, op: Callable[..., Any]) -> Any:
        return self.on_values(op, arg) if is_bfloat16(arg) else super().unary_op(arg, op)

    def binary_op(self, lhs: Any, rhs: Any, op: Callable[..., Any]) -> Any:
        if is_bfloat16(lhs, rhs):
            return self.on_values(op, lhs, rhs)
        return super().binary_op(lhs, rhs, op)

    def ternary_op(self, lhs: Any, rhs: Any, other: Any, op: Callable[..., Any]) -> Any:
        if op is not np.where and is_bfloat16(lhs, rhs, other):
            return self.on_values(op, lhs, rhs, other)
        return super().ternary_op(lhs, rhs, other, op)

    def create_fma(self, x: Any, y: Any, z: Any) -> Any:
        if not is_bfloat16(x, y, z):
            return super().create_fma(x, y, z)
        return self.on_values(lambda a, b, c: a.astype(np.float64) * b + c, x, y, z)

    def create_dot(self, a: Any, b: Any, d: Any, *precision: Any) -> Any:
        return super().create_dot(widened(a), widened(b), d, *precision)

    def get_bf16(self, value: float) -> Any:
        return narrowed(np.array([value], dtype=np.float32))

    def cast_impl(self, src: Any, dst_type: Any) -> Any:
        # The dtype of a comparison's handle is that of what was compared, its values are truth values.
        if src.dtype.scalar == dst_type.scalar == tl.bfloat16:
            return src
        if dst_type.scalar == tl.bfloat16:
            return narrowed(widened(src).data)
        return super().cast_impl(widened(src), dst_type)

    def create_fp_to_fp(self, src: Any, dst_type: Any, rounding_mode: Any) -> Any:
        nearest = rounding_mode is None or "RTNE" in str(rounding_mode)
        wide = src.dtype.scalar in (tl.float16, tl.float32, tl.float64)
        if dst_type.scalar == tl.bfloat16 and wide and nearest:
            return narrowed(src.data)
        if src.dtype.scalar == tl.bfloat16 and dst_type.scalar in (tl.float16, tl.float32, tl.float64):
            return super().cast_impl(widened(src), dst_type)
        return super().create_fp_to_fp(src, dst_type, rounding_mode)


def is_bfloat16(*handles: Any) -> bool:
    return any(handle.dtype.scalar == tl.bfloat16 for handle in handles)


def stepwise(kind: Any, generic: str) -> Callable[..., Any]:
    """`kind.apply_impl` that takes bfloat16 through the combining function, element by element."""
    plain = kind.apply_impl

    def apply_impl(self: Any, input: Any) -> Any:
        if any(tensor.dtype.scalar == tl.bfloat16 for tensor in input):
            return getattr(self, generic)(input)
        return plain(self, input)

    return apply_impl


@contextlib.contextmanager
def exact_bfloat16() -> Iterator[None]:
    """Kernels that the interpreter runs meanwhile compute with bfloat16 as a GPU does."""
    builder, reduce, scan = interpreter.interpreter_builder, interpreter.ReduceOps, interpreter.ScanOps
    kept = builder.__class__, reduce.apply_impl, scan.apply_impl
    builder.__class__ = Bfloat16Builder
    reduce.apply_impl, scan.apply_impl = stepwise(reduce, "generic_reduce"), stepwise(scan, "generic_scan")
    try:
        yield
    finally:
        builder.__class__, reduce.apply_impl, scan.apply_impl = kept
