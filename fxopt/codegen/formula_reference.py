"""Mask and score programs as plain torch over index tensors ``b, h, q, k``, for references of kernels."""

from __future__ import annotations

from typing import Any

import sympy
from sympy.core.function import AppliedUndef

from fxopt.ir.linear import Unsupported

_RELATIONS = {sympy.Le: "<=", sympy.Lt: "<", sympy.Ge: ">=", sympy.Gt: ">", sympy.Eq: "==", sympy.Ne: "!="}


def condition_text(formula: Any) -> str:
    """A bool expression. Raises Unsupported."""
    if formula in (sympy.true, sympy.false):
        return "k >= 0" if formula == sympy.true else "k < 0"
    if isinstance(formula, sympy.And | sympy.Or):
        word = " & " if isinstance(formula, sympy.And) else " | "
        return word.join(sorted(f"({condition_text(arg)})" for arg in formula.args))
    if isinstance(formula, sympy.Not):
        return f"~({condition_text(formula.args[0])})"
    if type(formula) not in _RELATIONS:
        raise Unsupported(f"the condition {formula}")
    sides = (number_text(formula.lhs), number_text(formula.rhs))
    return f" {_RELATIONS[type(formula)]} ".join(sides)


def number_text(expression: Any) -> str:
    """An integer or a number. Raises Unsupported."""
    if expression.is_Integer or expression.is_Symbol:
        return str(expression)
    if expression.is_number:
        return repr(float(expression))
    if isinstance(expression, AppliedUndef):
        return f"{expression.func}[{', '.join(map(number_text, expression.args)) or '()'}]"
    if isinstance(expression, sympy.floor):
        above, below = (number_text(part) for part in expression.args[0].as_numer_denom())
        return f"torch.div({above}, {below}, rounding_mode='floor')"
    if isinstance(expression, sympy.tanh):
        return f"torch.tanh({number_text(expression.args[0])})"
    if isinstance(expression, sympy.Abs):
        return f"abs({number_text(expression.args[0])})"
    if isinstance(expression, sympy.Add):
        return " + ".join(f"({number_text(arg)})" for arg in expression.args)
    if isinstance(expression, sympy.Mul):
        return " * ".join(f"({number_text(arg)})" for arg in expression.args)
    if isinstance(expression, sympy.Pow):
        return f"({number_text(expression.args[0])})**({number_text(expression.args[1])})"
    raise Unsupported(f"the number {expression}")
