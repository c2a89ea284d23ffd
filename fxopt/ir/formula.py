"""Formulas over (b, h, q, k) as text and back: conditions such as ``k <= q and c0[b, k]``, numbers such as
``50*tanh(s/50) + c1[h]*k``.

b, h, q, k are the indices of a score; ``c0, c1, ...`` are tensors, indexed with square brackets; ``n0, n1,
...`` are sizes that change from call to call; ``s`` is a score.
"""

from __future__ import annotations

import ast
import re
from collections.abc import Callable, Iterable
from typing import Any, TypeVar

import sympy
from sympy.core.function import AppliedUndef
from sympy.core.relational import Relational
from sympy.logic.boolalg import Boolean

from fxopt.ir.linear import Unsupported

T = TypeVar("T")

B, H, Q, K = AXES = sympy.symbols("b h q k", integer=True)
S = sympy.Symbol("s", real=True)

_CAPTURE = re.compile(r"c\d+")
_SIZE = re.compile(r"n\d+")
FUNCTIONS: dict[str, Any] = {"tanh": sympy.tanh, "abs": sympy.Abs}


def capture(name: str) -> Any:
    """The function of indices that stands for a tensor of integers or bools."""
    return sympy.Function(name, integer=True)


def real_capture(name: str) -> Any:
    """The function of indices that stands for a tensor of floating-point numbers."""
    return sympy.Function(name, real=True)


def size(name: str) -> sympy.Symbol:
    """A size that is not known while compiling. Sizes are not negative."""
    return sympy.Symbol(name, integer=True, nonnegative=True)


def numbered(letter: str, values: Iterable[T] | None) -> dict[str, T]:
    """Values by the names that formulas have for them: ``c0, c1, ...`` or ``n0, n1, ...``."""
    return {f"{letter}{place}": value for place, value in enumerate(values or ())}


def captures_of(formula: Any) -> tuple[str, ...]:
    """The names of captured tensors, those in the indices of others too."""
    return tuple(sorted({str(each.func) for each in formula.atoms(AppliedUndef)}, key=_numbered))


def sizes_of(formula: Any) -> tuple[str, ...]:
    """The names of sizes that are not known while compiling."""
    return tuple(sorted((str(each) for each in formula.free_symbols - {*AXES, S}), key=_numbered))


def _numbered(name: str) -> tuple[int, str]:
    digits = name[1:]
    return (int(digits) if digits.isdigit() else -1, name)


def exact(number: float) -> sympy.Expr:
    """A finite number of Python; an integer where it is whole."""
    return sympy.Integer(int(number)) if number.is_integer() else sympy.Float(number)


def integral(formula: Any) -> Any:
    """The same condition with integer factors: ``k >= q - 7`` for ``k/7 - q/7 >= -1``, as sympy has it."""
    return formula.replace(lambda part: isinstance(part, Relational), _without_fractions)


def _without_fractions(relation: Any) -> Any:
    difference = sympy.expand(relation.lhs - relation.rhs)
    factor = sympy.ilcm(
        1, *(each.q for each in difference.as_coefficients_dict().values() if each.is_Rational)
    )
    return relation if factor == 1 else relation.func(sympy.expand(difference * factor), 0)


# Text


def condition_text(formula: Boolean, *, nested: bool = False) -> str:
    """A condition in one line, the same for equal conditions."""
    if formula in (sympy.true, sympy.false):
        return str(bool(formula))
    if isinstance(formula, sympy.And | sympy.Or):
        word = " and " if isinstance(formula, sympy.And) else " or "
        joined = word.join(sorted(condition_text(arg, nested=True) for arg in formula.args))
        return f"({joined})" if nested else joined
    if isinstance(formula, sympy.Not):
        return f"not {condition_text(formula.args[0], nested=True)}"
    if isinstance(formula, Relational):
        return _relation(formula)
    raise Unsupported(f"the condition {formula}")


def _relation(formula: Any) -> str:
    """``k <= q + 3`` for any order and sign of the terms."""
    left, right = formula.lhs, formula.rhs
    if right == 0 and isinstance(left, AppliedUndef) and isinstance(formula, sympy.Eq | sympy.Ne):
        return number_text(left) if isinstance(formula, sympy.Ne) else f"not {number_text(left)}"
    signs = {sympy.Le: "<=", sympy.Lt: "<", sympy.Ge: ">=", sympy.Gt: ">", sympy.Eq: "==", sympy.Ne: "!="}
    mirrored = {"<=": ">=", "<": ">", ">=": "<=", ">": "<", "==": "==", "!=": "!="}
    sign = signs[formula.func]
    difference, whole = sympy.expand(left - right).as_numer_denom()
    if whole != 1 and whole.is_positive:  # sympy makes k/7 - q/7 >= -1 of floor(k/7 - q/7) >= -1
        left, right = difference, sympy.Integer(0)
    difference = sympy.expand(left - right)
    factor = difference.coeff(K)
    if factor in (1, -1) and not difference.has(AppliedUndef) and not difference.has(sympy.floor):
        return f"k {sign if factor == 1 else mirrored[sign]} {number_text(K - difference / factor)}"
    sides = [number_text(left), number_text(right)]
    if sign in ("==", "!="):  # no order of their own
        sides.sort(key=lambda side: (side.lstrip("-").isdigit(), side))
    return f" {sign} ".join(sides)


def number_text(expression: Any) -> str:
    """A number in one line; captured tensors are indexed with square brackets."""
    expression = sympy.expand(expression)
    if isinstance(expression, AppliedUndef):
        # A tensor without dimensions has one entry, `c0[()]`.
        return f"{expression.func}[{', '.join(map(number_text, expression.args)) or '()'}]"
    if isinstance(expression, sympy.Add):
        terms = sorted(expression.args, key=_place_in_sum)
        return " + ".join(number_text(term) for term in terms).replace("+ -", "- ")
    if isinstance(expression, sympy.Mul):
        return _product(expression)
    if isinstance(expression, sympy.floor):
        numerator, denominator = expression.args[0].as_numer_denom()
        return f"({number_text(numerator)})//{number_text(denominator)}"
    for name, function in FUNCTIONS.items():
        if isinstance(expression, function):
            return f"{name}({number_text(expression.args[0])})"
    if expression.is_Float:
        return repr(float(expression))
    if expression.is_Rational and not expression.is_Integer:
        return f"{expression.p}/{expression.q}"
    if expression.is_Integer or expression.is_Symbol:
        return str(expression)
    raise Unsupported(f"the number {expression}")


def _place_in_sum(term: Any) -> tuple[bool, bool, bool, bool, str]:
    """The score first, sizes and numbers last, what is subtracted after what is added."""
    fixed = not term.has(AppliedUndef, S, *AXES)
    return (term.is_number, fixed, not term.has(S), term.could_extract_minus_sign(), str(term))


def _product(expression: Any) -> str:
    factor, rest = expression.as_coeff_Mul()
    over, under = (factor.p, factor.q) if factor.is_Rational else (factor, 1)
    parts = [number_text(part) for part in sympy.Mul.make_args(rest)]
    if over == -1:
        parts[0] = "-" + parts[0]
    elif over != 1:
        parts.insert(0, number_text(sympy.sympify(over)))
    return "*".join(parts) + (f"/{under}" if under != 1 else "")


# Parsing


def parsed_tree(text: str, what: str) -> ast.expr:
    """The syntax tree of a formula. ValueError, with what it should have been, when there is none."""
    try:
        return ast.parse(text, mode="eval").body
    except SyntaxError as error:
        raise ValueError(f"{text!r} is no {what}: {error.msg}") from error


_RELATIONS: dict[type, Any] = {
    ast.LtE: sympy.Le, ast.Lt: sympy.Lt, ast.GtE: sympy.Ge, ast.Gt: sympy.Gt,
    ast.Eq: sympy.Eq, ast.NotEq: sympy.Ne,
}  # fmt: skip


def parsed_condition(tree: ast.expr) -> Boolean:
    """The condition that `condition_text` printed. ValueError names what was not understood."""
    match tree:
        case ast.Constant(value=bool(value)):
            return sympy.true if value else sympy.false
        case ast.BoolOp(op=op, values=values):
            parts = [parsed_condition(value) for value in values]
            return sympy.And(*parts) if isinstance(op, ast.And) else sympy.Or(*parts)
        case ast.UnaryOp(op=ast.Not(), operand=operand):
            return sympy.Not(parsed_condition(operand))
        case ast.Compare(left=left, ops=[op], comparators=[right]) if type(op) in _RELATIONS:
            relation: Boolean = _RELATIONS[type(op)](parsed_integer(left), parsed_integer(right))
            return relation
        case ast.Subscript():
            return sympy.Ne(parsed_integer(tree), 0)
    raise ValueError(f"{ast.unparse(tree)!r} is no condition of a mask program")


def parsed_integer(tree: ast.expr) -> sympy.Expr:
    """An integer of indices, sizes and captured integers."""
    match tree:
        case ast.Constant(value=int(value)):
            return sympy.Integer(value)
        case ast.BinOp(left=left, op=ast.FloorDiv(), right=right):
            return sympy.floor(parsed_integer(left) / parsed_integer(right))
        case ast.Subscript():
            return _access(tree, capture)
    return _arithmetic(tree, parsed_integer)


def parsed_number(tree: ast.expr) -> sympy.Expr:
    """A number of scores, indices, sizes and captured numbers."""
    match tree:
        case ast.Constant(value=int(value)):
            return sympy.Integer(value)
        case ast.Constant(value=float(value)):
            return sympy.Float(value)
        case ast.Name(id="s"):
            return S
        case ast.BinOp(left=left, op=ast.Div(), right=right):
            return parsed_number(left) / parsed_number(right)
        case ast.BinOp(op=ast.FloorDiv()):
            return parsed_integer(tree)
        case ast.Call(func=ast.Name(id=name), args=[argument]) if name in FUNCTIONS:
            return FUNCTIONS[name](parsed_number(argument))
        case ast.Subscript():
            return _access(tree, real_capture)
    return _arithmetic(tree, parsed_number)


def _arithmetic(tree: ast.expr, parse: Callable[[ast.expr], sympy.Expr]) -> sympy.Expr:
    match tree:
        case ast.Name(id=name):
            axis = next((axis for axis in AXES if axis.name == name), None)
            if axis is None and not _SIZE.fullmatch(name):
                raise ValueError(f"{name!r} is neither b, h, q, k nor a size n0, n1, ...")
            return size(name) if axis is None else axis
        case ast.UnaryOp(op=ast.USub(), operand=operand):
            return -parse(operand)
        case ast.BinOp(left=left, op=ast.Add(), right=right):
            return parse(left) + parse(right)
        case ast.BinOp(left=left, op=ast.Sub(), right=right):
            return parse(left) - parse(right)
        case ast.BinOp(left=left, op=ast.Mult(), right=right):
            return parse(left) * parse(right)
    raise ValueError(f"{ast.unparse(tree)!r} is no number of a mask program")


def _access(tree: ast.Subscript, make: Callable[[str], Any]) -> sympy.Expr:
    match tree:
        case ast.Subscript(value=ast.Name(id=name), slice=index) if _CAPTURE.fullmatch(name):
            indices = index.elts if isinstance(index, ast.Tuple) else [index]
            access: sympy.Expr = make(name)(*(parsed_integer(each) for each in indices))
            return access
    raise ValueError(f"{ast.unparse(tree)!r} is no number of a mask program: captures are c0, c1, ...")
