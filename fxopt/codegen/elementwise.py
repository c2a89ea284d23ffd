"""What each pointwise operator computes, as Triton text, in the dtype that eager computes in.

Values live in registers in float32 where their dtype is float16 or bfloat16, and are rounded to that dtype
after every operator, as eager rounds them.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx
from torch._prims_common import ELEMENTWISE_TYPE_PROMOTION_KIND as Kind
from torch._prims_common import elementwise_dtypes

from fxopt.ir.facts import is_tensor
from fxopt.ir.ops.code_products import CODES, ROUNDED, is_op
from fxopt.ir.ops.uniform import is_uniform

aten, prims = torch.ops.aten, torch.ops.prims

TRITON_TYPES = {
    torch.float64: "tl.float64",
    torch.float32: "tl.float32",
    torch.float16: "tl.float16",
    torch.bfloat16: "tl.bfloat16",
    torch.int64: "tl.int64",
    torch.int32: "tl.int32",
    torch.int16: "tl.int16",
    torch.int8: "tl.int8",
    torch.uint8: "tl.uint8",
    torch.bool: "tl.int1",
}
HALVES = (torch.float16, torch.bfloat16)


def register_type(dtype: torch.dtype) -> torch.dtype:
    """The dtype in which a value of `dtype` is kept in registers."""
    return torch.float32 if dtype in HALVES else dtype


@dataclass(frozen=True)
class Pointwise:
    """An operator's formula over its operands ``{0}``, ``{1}`` …, which come in the dtype of computation."""

    formula: str
    kind: Kind = Kind.DEFAULT
    floats_only: bool = False


_NAN = "propagate_nan=tl.PropagateNan.ALL"
_FLOAT = Kind.INT_TO_FLOAT
_BOOL = Kind.ALWAYS_BOOL

_FORMULAS: dict[Any, Pointwise] = {
    aten.add: Pointwise("{0} + {1}"),
    aten.sub: Pointwise("{0} - {1}"),
    aten.mul: Pointwise("{0} * {1}"),
    aten.div: Pointwise("tl.div_rn({0}, {1})", _FLOAT),
    aten.neg: Pointwise("-{0}"),
    aten.abs: Pointwise("tl.abs({0})"),
    aten.exp: Pointwise("tl.exp({0})", _FLOAT),
    aten.exp2: Pointwise("tl.exp2({0})", _FLOAT),
    aten.log: Pointwise("tl.log({0})", _FLOAT),
    aten.log2: Pointwise("tl.log2({0})", _FLOAT),
    aten.sqrt: Pointwise("tl.sqrt_rn({0})", _FLOAT),
    aten.rsqrt: Pointwise("tl.rsqrt({0})", _FLOAT),
    aten.reciprocal: Pointwise("tl.div_rn(tl.full([], 1, {0}.dtype), {0})", _FLOAT),
    aten.sin: Pointwise("tl.sin({0})", _FLOAT),
    aten.cos: Pointwise("tl.cos({0})", _FLOAT),
    aten.tanh: Pointwise("tanh({0})", _FLOAT),
    aten.erf: Pointwise("tl.erf({0})", _FLOAT),
    aten.sigmoid: Pointwise("tl.div_rn(tl.full([], 1, {0}.dtype), 1 + tl.exp(-{0}))", _FLOAT),
    aten.floor: Pointwise("tl.floor({0})", floats_only=True),
    aten.ceil: Pointwise("tl.ceil({0})", floats_only=True),
    aten.round: Pointwise("rint({0})", floats_only=True),
    aten.relu: Pointwise(f"tl.maximum({{0}}, 0, {_NAN})"),
    aten.maximum: Pointwise(f"tl.maximum({{0}}, {{1}}, {_NAN})"),
    aten.minimum: Pointwise(f"tl.minimum({{0}}, {{1}}, {_NAN})"),
    aten.eq: Pointwise("{0} == {1}", _BOOL),
    aten.ne: Pointwise("{0} != {1}", _BOOL),
    aten.lt: Pointwise("{0} < {1}", _BOOL),
    aten.le: Pointwise("{0} <= {1}", _BOOL),
    aten.gt: Pointwise("{0} > {1}", _BOOL),
    aten.ge: Pointwise("{0} >= {1}", _BOOL),
    aten.isnan: Pointwise("{0} != {0}", _BOOL, floats_only=True),
    aten.isinf: Pointwise("tl.abs({0}) == float('inf')", _BOOL, floats_only=True),
    aten.logical_and: Pointwise("({0} != 0) & ({1} != 0)", _BOOL),
    aten.logical_or: Pointwise("({0} != 0) | ({1} != 0)", _BOOL),
    aten.logical_not: Pointwise("{0} == 0", _BOOL),
    aten.bitwise_and: Pointwise("{0} & {1}"),
    aten.bitwise_or: Pointwise("{0} | {1}"),
    aten.bitwise_xor: Pointwise("{0} ^ {1}"),
    aten.bitwise_not: Pointwise("~{0}"),
}
# exponents whose power eager computes by other means than pow, with the same result
_POWERS = {
    2: "{0} * {0}",
    3: "{0} * {0} * {0}",
    1: "{0}",
    0.5: "tl.sqrt_rn({0})",
    -0.5: "tl.rsqrt({0})",
    -1: "tl.div_rn(tl.full([], 1, {0}.dtype), {0})",
}
_DEAR = (aten.sin, aten.cos, aten.exp, aten.log, aten.tanh, aten.erf, aten.sigmoid, aten.pow)
_CASTS = (prims.convert_element_type.default, aten._to_copy.default, aten.clone.default)
_CHOICES = (aten.where.self, aten.clamp.default, aten.clamp_min.default, aten.clamp_max.default)


def formula_of(node: fx.Node) -> Pointwise | None:
    """The operator's formula, or None when it is no pointwise operator that can be emitted."""
    target = node.target
    if target in _CASTS:
        return Pointwise("{0}", Kind.NO_OPMATH)
    if target in _CHOICES:
        return _choice(node)
    if is_op(target, ROUNDED):
        return Pointwise("nearest_e4m3({0})", floats_only=True)
    if target is aten.pow.Tensor_Scalar:
        text = _POWERS.get(node.args[1])  # type: ignore[arg-type]
        return None if text is None else Pointwise(text, floats_only=True)
    packet = getattr(target, "overloadpacket", None)
    if packet not in _FORMULAS or getattr(target, "_overloadname", "") not in ("default", "Tensor", "Scalar"):
        return None
    return _with_alpha(node, _FORMULAS[packet])


def _choice(node: fx.Node) -> Pointwise:
    if node.target is aten.where.self:
        return Pointwise("tl.where({0}, {1}, {2})")
    low, high = _limits(node)
    text = "{0}"
    if low is not None:
        text = f"tl.maximum({text}, {literal(low)}, {_NAN})"
    if high is not None:
        text = f"tl.minimum({text}, {literal(high)}, {_NAN})"
    return Pointwise(text)


def _limits(node: fx.Node) -> tuple[Any, Any]:
    given = [*node.args[1:], None, None]
    if node.target is aten.clamp_max.default:
        return None, given[0]
    return given[0], node.kwargs.get("max", given[1])


def _with_alpha(node: fx.Node, found: Pointwise) -> Pointwise | None:
    alpha: Any = node.kwargs.get("alpha", 1)
    if alpha == 1:
        return found if not set(node.kwargs) - {"alpha"} else None
    if isinstance(alpha, fx.Node):
        return None
    return Pointwise(found.formula.replace("{1}", f"({literal(alpha)} * {{1}})"), found.kind)


def operations_of(node: fx.Node) -> int:
    """How many instructions the operator takes for an element, roughly."""
    if is_uniform(node.target):
        return 64  # the ten rounds of Philox
    if is_op(node.target, CODES):
        return 4
    return 8 if getattr(node.target, "overloadpacket", None) in _DEAR else 1


def operands_of(node: fx.Node) -> tuple[Any, ...]:
    """What the formula's places stand for: nodes and Python numbers."""
    if node.target in _CASTS or node.target in _CHOICES[1:] or node.target is aten.pow.Tensor_Scalar:
        return node.args[:1]
    return node.args


def supported(node: fx.Node, found: Pointwise) -> bool:
    """Whether the formula holds for this node's dtypes."""
    dtypes = [value.dtype for value in _values(node)] + [node.meta["val"].dtype]
    if any(dtype not in TRITON_TYPES for dtype in dtypes):
        return False
    if found.floats_only or found.kind is _FLOAT:
        return node.meta["val"].dtype is torch.bool or node.meta["val"].dtype.is_floating_point
    return True


def _values(node: fx.Node) -> list[torch.Tensor]:
    return [one.meta["val"] for one in operands_of(node) if is_tensor(one)]


def computation_type(node: fx.Node, found: Pointwise) -> torch.dtype:
    """The dtype in which eager computes this node."""
    if found.kind is Kind.NO_OPMATH:
        return register_type(_values(node)[0].dtype)
    values = [one.meta["val"] if isinstance(one, fx.Node) else one for one in operands_of(node)]
    if node.target is aten.where.self:
        values = values[1:]
    compute, _ = elementwise_dtypes(*values, type_promotion_kind=found.kind)
    return register_type(compute)


def _number(argument: Any, dtype: torch.dtype) -> Any:
    """A Python integer among floats is a float."""
    if isinstance(argument, int) and dtype.is_floating_point:
        return float(argument)
    return argument


def literal(value: float) -> str:
    """A Python number as Triton text."""
    if isinstance(value, float) and not math.isfinite(value):
        return "float('nan')" if math.isnan(value) else f"float('{value}')"
    return repr(value)


def cast(text: str, source: torch.dtype, wanted: torch.dtype) -> str:
    """`text` of dtype `source` in registers, converted to `wanted` in registers."""
    if source == wanted:
        return text
    if wanted is torch.bool:
        return f"({text} != 0)"
    return f"{text}.to({TRITON_TYPES[wanted]})"


def rounded(text: str, computed: torch.dtype, dtype: torch.dtype) -> str:
    """A result of `dtype` that was computed in `computed`, as registers hold it."""
    if dtype in HALVES:
        return f"({text}).to({TRITON_TYPES[dtype]}).to(tl.float32)"
    return text if computed == dtype else cast(f"({text})", computed, dtype)


def expression(
    node: fx.Node, found: Pointwise, operand: Callable[[Any, torch.dtype], str], arguments: Sequence[Any]
) -> str:
    """The text of a node's value; `operand` gives an operand's text in a dtype of registers."""
    computed = computation_type(node, found)
    wanted = [computed] * len(arguments)
    if node.target is aten.where.self:
        wanted[0] = torch.bool
    texts = [operand(_number(one, dtype), dtype) for one, dtype in zip(arguments, wanted, strict=True)]
    value = torch.bool if found.kind is _BOOL else computed
    return rounded(found.formula.format(*texts), value, node.meta["val"].dtype)
