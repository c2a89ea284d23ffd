"""Mask and score programs as Triton text, for kernels of attention.

A formula becomes the body of a device function of ``(b, h, q, k)``: `b` is one number, `h` and `q` are
columns of a tile of scores, ``(rows, 1)``, and `k` is its row, ``(1, keys)``; any of them may also be one
number. Every captured tensor is read where its indices say, so that what depends on the key alone is a vector
in a tile. Indices are those of entries that exist, but for keys behind the last one: reads that depend on `k`
are guarded by ``k < columns``.

All that a kernel needs besides its operands travels as a list of arguments, `captured_arguments`. In the text
of a template that list is the one name ``captured``, which `with_captured` replaces.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import sympy
import torch
from sympy.core.function import AppliedUndef
from sympy.logic.boolalg import Boolean

from fxopt.codegen.elementwise import TRITON_TYPES
from fxopt.codegen.kernel_file import Argument
from fxopt.ir.formula import AXES, B, K, S
from fxopt.ir.linear import Unsupported
from fxopt.ir.tile_values import grouped_terms

_RELATIONS = {sympy.Le: "<=", sympy.Lt: "<", sympy.Ge: ">=", sympy.Gt: ">", sympy.Eq: "==", sympy.Ne: "!="}

# Where `//` of Triton rounds to zero, that of a formula rounds down.
FLOOR_DIV = '''@triton.jit
def floor_div(a, b):
    """The largest integer that is not above a / b, for b > 0."""
    return tl.where(a >= 0, a // b, -((b - 1 - a) // b))
'''


@dataclass(frozen=True)
class Capture:
    """A captured tensor as a kernel reads it.

    Attributes:
        name: in formulas, ``"c0"``. strides: of each dimension what is known of it while compiling; None is
            an argument of the kernel.
    """

    name: str
    dtype: torch.dtype
    strides: tuple[int | None, ...]

    @staticmethod
    def of(name: str, tensor: torch.Tensor) -> Capture:
        """What a (fake) tensor says. Of its strides only 0 and 1 are fixed: others may change from call to
        call, and layers that differ in them share a kernel."""
        return Capture(name, tensor.dtype, tuple(map(_known_stride, tensor.shape, tensor.stride())))

    def arguments(self) -> Iterator[Argument]:
        yield Argument(f"{self.name}_ptr", f"*{short_type(self.dtype)}")
        for dim, stride in enumerate(self.strides):
            if stride is None:
                yield Argument(f"{self.name}_stride_{dim}", "i64", f"{self.name}.stride({dim})", False)


def short_type(dtype: torch.dtype) -> str:
    """``bf16`` for `torch.bfloat16`, ``i1`` for `torch.bool`: as Triton writes them in types of pointers."""
    name = TRITON_TYPES[dtype].removeprefix("tl.")
    return name.replace("bfloat", "bf").replace("float", "fp").replace("uint", "u").replace("int", "i")


def _known_stride(size: Any, stride: Any) -> int | None:
    if isinstance(size, int) and size == 1:
        return 0
    return stride if isinstance(stride, int) and stride in (0, 1) else None


def captured_arguments(captures: Sequence[Capture], sizes: Sequence[str]) -> tuple[Argument, ...]:
    """What the device functions of programs take besides indices, in order."""
    found = [argument for one in captures for argument in one.arguments()]
    return (*found, *(Argument(name, "i32", aligned=False) for name in sizes))


def with_captured(template: str, names: Sequence[str]) -> str:
    """The text of a template with a list of names in the place of each ``captured``."""
    listed = "".join(f", {name}" for name in names)
    return re.sub(r",\s*captured\b", listed, template)


class TritonText:
    """Formulas as Triton expressions.

    Args:
        captures: the tensors that formulas name.

    Raises:
        Unsupported: by each method, where a formula has what is not covered.
    """

    # How the language spells what Python has no operator for.
    where, absolute, tanh, real = "tl.where", "tl.abs", "tanh", ".to(tl.float32)"

    def __init__(self, captures: Sequence[Capture]) -> None:
        self.captures: Mapping[str, Capture] = {one.name: one for one in captures}

    def condition(self, formula: Boolean) -> str:
        """An int1 expression."""
        if formula in (sympy.true, sympy.false):
            return "k >= 0" if formula == sympy.true else "k < 0"
        if isinstance(formula, sympy.And | sympy.Or):
            word = " & " if isinstance(formula, sympy.And) else " | "
            return word.join(sorted(f"({self.condition(arg)})" for arg in formula.args))
        if isinstance(formula, sympy.Not):
            return f"({self.condition(formula.args[0])}) == 0"
        if type(formula) not in _RELATIONS:
            raise Unsupported(f"the condition {formula}")
        sides = (self.integer(formula.lhs), self.integer(formula.rhs))
        return f" {_RELATIONS[type(formula)]} ".join(sides)

    def integer(self, expression: Any) -> str:
        """An expression over indices, sizes and captured integers."""
        if expression.is_Integer or expression.is_Symbol:
            return str(expression)
        if isinstance(expression, AppliedUndef):
            return self._entry(expression)
        if isinstance(expression, sympy.floor):
            above, below = (self.integer(part) for part in expression.args[0].as_numer_denom())
            return self._quotient(above, below)
        if isinstance(expression, sympy.Abs):
            return f"{self.absolute}({self.integer(expression.args[0])})"
        if isinstance(expression, sympy.Add):
            return " + ".join(self._factor(arg) for arg in _ordered(expression))
        if isinstance(expression, sympy.Mul):
            return " * ".join(self._factor(arg) for arg in _ordered(expression))
        raise Unsupported(f"the integer {expression}")

    def _quotient(self, above: str, below: str) -> str:
        return f"floor_div({above}, {below})"

    def _factor(self, expression: Any) -> str:
        text = self.integer(expression)
        simple = expression.is_Symbol or isinstance(expression, AppliedUndef) or text.isdigit()
        return text if simple else f"({text})"

    def number(self, expression: Any) -> str:
        """A float32 expression over a score, indices, sizes and captured numbers."""
        if expression == S:
            return "s"
        if expression.is_number:
            return repr(float(expression))
        if expression.is_integer:
            return (
                f"({self.integer(expression)}){self.real}"
                if self._varies(expression)
                else (f"(k * 0 + {self.integer(expression)}){self.real}")
            )
        if isinstance(expression, AppliedUndef):
            return f"{self._entry(expression)}{self.real}"
        if isinstance(expression, sympy.tanh):
            return f"{self.tanh}({self.number(expression.args[0])})"
        if isinstance(expression, sympy.Abs):
            return f"{self.absolute}({self.number(expression.args[0])})"
        if isinstance(expression, sympy.Pow):
            return self._power(expression)
        if isinstance(expression, sympy.Add):
            return self._sum(expression)
        if isinstance(expression, sympy.Mul):
            return self._product(sympy.Mul.make_args(expression))
        raise Unsupported(f"the number {expression}")

    def _varies(self, expression: Any) -> bool:
        """It is a tensor in the kernel for sure; a size that is 1 is a constant there."""
        return bool(expression.free_symbols & set(AXES))

    def _power(self, expression: Any) -> str:
        base, exponent = expression.args
        if not exponent.is_Integer or not 1 <= abs(exponent) <= 4:
            raise Unsupported(f"the power {expression}")
        product = " * ".join([f"({self.number(base)})"] * abs(int(exponent)))
        return product if exponent > 0 else f"(1.0 / ({product}))"

    def _sum(self, expression: Any) -> str:
        parts = []
        for real, scales in grouped_terms(expression).items():
            wholes = [(scale, sympy.Add(*terms)) for scale, terms in scales.items()]
            factor = " + ".join(self._scaled(scale, whole) for scale, whole in wholes)
            if real == 1:
                parts.append(factor)
            elif all(whole == 1 and scale == 1 for scale, whole in wholes):
                parts.append(self.number(real))
            else:
                parts.append(self._product(sympy.Mul.make_args(real), f"({factor})"))
        return " + ".join(f"({part})" for part in parts)

    def _scaled(self, scale: Any, whole: Any) -> str:
        if whole.is_number:
            return repr(float(scale * whole))
        text = self.number(whole)
        return text if scale == 1 else f"{text} * {float(scale)!r}"

    def _product(self, factors: Sequence[Any], first: str = "") -> str:
        """What is not true selects 0, of NaN too."""
        others = [f"({self.number(each)})" for each in factors if not self.is_truth(each)]
        text = " * ".join([first, *others] if first else others) or "1.0"
        for truth in filter(self.is_truth, factors):
            text = f"{self.where}({self._entry(truth)} != 0, {text}, 0.0)"
        return text

    def is_truth(self, expression: Any) -> bool:
        """It is an entry of a captured tensor of bools."""
        if not isinstance(expression, AppliedUndef) or str(expression.func) not in self.captures:
            return False
        return self.captures[str(expression.func)].dtype is torch.bool

    def _entry(self, access: Any) -> str:
        """A read of a captured tensor."""
        capture = self.captures.get(str(access.func))
        if capture is None or len(capture.strides) != len(access.args):
            raise Unsupported(f"{access}, of a tensor that is not captured so")
        guard = ", mask=k < columns, other=0" if K in access.free_symbols else ""
        return f"tl.load({self.address(access)}{guard})"

    def address(self, access: Any) -> str:
        """Where an entry of a captured tensor is."""
        capture = self.captures[str(access.func)]
        steps = [f"{capture.name}_ptr"]
        for dim, (index, stride) in enumerate(zip(access.args, capture.strides, strict=True)):
            if stride == 0 or index == 0:
                continue
            place = self._factor(index)
            if stride == 1:
                steps.append(place)
            else:  # may reach beyond 32 bits
                steps.append(f"{self._wide(index, place)} * {capture.name}_stride_{dim}")
        return " + ".join(steps)

    def _wide(self, index: Any, place: str) -> str:
        """An index in 64 bits. A size of 1 is a constant in a kernel, without a dtype to convert."""
        if index.is_number:
            return place
        return f"{place}.to(tl.int64)" if self._varies(index) else f"(tl.full([], 0, tl.int64) + {place})"


def _ordered(expression: Any) -> list[Any]:
    """Arguments with indices first: the text starts with what is a tensor in the kernel."""
    return sorted(expression.args, key=lambda arg: (not arg.free_symbols & set(AXES), str(arg)))


def is_uniform(access: Any) -> bool:
    """An entry that is the same for all scores of a sequence: one number in a kernel, and known early."""
    return bool(access.free_symbols & set(AXES) <= {B})
