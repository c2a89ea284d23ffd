"""Which keys a query sees, as a formula over (b, h, q, k): printed, parsed, computed, and bounded.

``k <= q and c0[b, k]`` says: query q of sequence b sees key k when k is not later and the captured tensor c0
is true at [b, k]. Sizes that change from call to call are ``n0, n1, ...``. The formula is the meaning of an
attention mask; a tensor of Sq x Skv entries is only one way to compute it.
"""

from __future__ import annotations

import ast
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import sympy
import torch
from sympy.core.function import AppliedUndef
from sympy.logic.boolalg import Boolean

from fxopt.ir.linear import Unsupported

B, H, Q, K = AXES = sympy.symbols("b h q k", integer=True)

_CAPTURE = re.compile(r"c\d+")
_SIZE = re.compile(r"n\d+")


def capture(name: str) -> Any:
    """The function of indices that stands for a tensor of integers or bools."""
    return sympy.Function(name, integer=True)


def size(name: str) -> sympy.Symbol:
    """A size that is not known while compiling. Sizes are not negative."""
    return sympy.Symbol(name, integer=True, nonnegative=True)


@dataclass(frozen=True, eq=False)
class MaskProgram:
    """Where a key takes part: a formula over b, h, q, k, captures ``c0, ...`` and sizes ``n0, ...``.

    Two programs are equal when their texts are.
    """

    live: Boolean

    def __eq__(self, other: object) -> bool:
        return isinstance(other, MaskProgram) and str(self) == str(other)

    def __hash__(self) -> int:
        return hash(str(self))

    def __str__(self) -> str:
        return _text(self.live)

    @staticmethod
    def parse(text: str) -> MaskProgram:
        """The program that `str` printed.

        Raises:
            ValueError: it is no such text; the message says what was not understood.
        """
        try:
            tree = ast.parse(text, mode="eval").body
        except SyntaxError as error:
            raise ValueError(f"{text!r} is no mask program: {error.msg}") from error
        return MaskProgram(_parsed(tree))

    @property
    def captures(self) -> tuple[str, ...]:
        """The names of captured tensors."""
        return tuple(sorted({str(each.func) for each in self.live.atoms(AppliedUndef)}))

    @property
    def sizes(self) -> tuple[str, ...]:
        """The names of sizes that are not known while compiling."""
        return tuple(sorted(str(each) for each in self.live.free_symbols - set(AXES)))

    def conjuncts(self) -> tuple[Boolean, ...]:
        """The conditions that must all hold."""
        return self.live.args if isinstance(self.live, sympy.And) else (self.live,)

    def compute(
        self,
        outer: tuple[Any, Any],
        rows: tuple[Any, Any],
        columns: tuple[Any, Any],
        captures: Mapping[str, torch.Tensor],
        sizes: Mapping[str, Any],
        device: torch.device,
    ) -> torch.Tensor:
        """The mask of a block of queries and a block of keys.

        Args:
            outer: (B, H). rows, columns: the ranges [first, last) of q and of k.
            captures: int64 or bool tensors, by name. sizes: integers, by name.

        Returns:
            bool, broadcastable to (B, H, rows, columns).
        """
        ranges = ((0, outer[0]), (0, outer[1]), rows, columns)
        return _Block(ranges, captures, sizes, device).boolean(self.live)


def _text(formula: Boolean, *, nested: bool = False) -> str:
    if formula in (sympy.true, sympy.false):
        return str(bool(formula))
    if isinstance(formula, sympy.And | sympy.Or):
        word = " and " if isinstance(formula, sympy.And) else " or "
        joined = word.join(sorted(_text(arg, nested=True) for arg in formula.args))
        return f"({joined})" if nested else joined
    if isinstance(formula, sympy.Not):
        return f"not {_text(formula.args[0], nested=True)}"
    if isinstance(formula, sympy.core.relational.Relational):
        return _relation(formula)
    raise Unsupported(f"the condition {formula}")


def _relation(formula: Any) -> str:
    """``k <= q + 3`` for any order and sign of the terms."""
    left, right = formula.lhs, formula.rhs
    if right == 0 and isinstance(left, AppliedUndef) and isinstance(formula, sympy.Eq | sympy.Ne):
        return _number(left) if isinstance(formula, sympy.Ne) else f"not {_number(left)}"
    signs = {sympy.Le: "<=", sympy.Lt: "<", sympy.Ge: ">=", sympy.Gt: ">", sympy.Eq: "==", sympy.Ne: "!="}
    mirrored = {"<=": ">=", "<": ">", ">=": "<=", ">": "<", "==": "==", "!=": "!="}
    sign = signs[formula.func]
    difference = sympy.expand(left - right)
    factor = difference.coeff(K)
    if factor in (1, -1) and not difference.has(AppliedUndef):
        return f"k {sign if factor == 1 else mirrored[sign]} {_number(K - difference / factor)}"
    sides = [_number(left), _number(right)]
    if sign in ("==", "!="):  # no order of their own
        sides.sort(key=lambda side: (side.lstrip("-").isdigit(), side))
    return f" {sign} ".join(sides)


def _number(expression: Any) -> str:
    """An integer expression; captured tensors are indexed with square brackets."""
    expression = sympy.expand(expression)
    if isinstance(expression, AppliedUndef):
        return f"{expression.func}[{', '.join(_number(arg) for arg in expression.args)}]"
    if isinstance(expression, sympy.Add):
        terms = sorted(expression.args, key=lambda term: (term.is_Integer, str(term)))
        return " + ".join(_number(term) for term in terms).replace("+ -", "- ")
    if isinstance(expression, sympy.Mul):
        head, *rest = expression.args
        if head == -1:
            return "-" + "*".join(_number(factor) for factor in rest)
        return "*".join(_number(factor) for factor in expression.args)
    if isinstance(expression, sympy.floor):
        numerator, denominator = expression.args[0].as_numer_denom()
        return f"({_number(numerator)})//{_number(denominator)}"
    if expression.is_Integer or expression.is_Symbol:
        return str(expression)
    raise Unsupported(f"the number {expression}")


_RELATIONS: dict[type, Any] = {
    ast.LtE: sympy.Le, ast.Lt: sympy.Lt, ast.GtE: sympy.Ge, ast.Gt: sympy.Gt,
    ast.Eq: sympy.Eq, ast.NotEq: sympy.Ne,
}  # fmt: skip


def _parsed(tree: ast.expr) -> Boolean:
    match tree:
        case ast.Constant(value=bool(value)):
            return sympy.true if value else sympy.false
        case ast.BoolOp(op=op, values=values):
            parts = [_parsed(value) for value in values]
            return sympy.And(*parts) if isinstance(op, ast.And) else sympy.Or(*parts)
        case ast.UnaryOp(op=ast.Not(), operand=operand):
            return sympy.Not(_parsed(operand))
        case ast.Compare(left=left, ops=[op], comparators=[right]) if type(op) in _RELATIONS:
            relation: Boolean = _RELATIONS[type(op)](_parsed_number(left), _parsed_number(right))
            return relation
        case ast.Subscript():
            return sympy.Ne(_parsed_number(tree), 0)
    raise ValueError(f"{ast.unparse(tree)!r} is no condition of a mask program")


def _parsed_number(tree: ast.expr) -> sympy.Expr:
    match tree:
        case ast.Constant(value=int(value)):
            return sympy.Integer(value)
        case ast.Name(id=name):
            axis = next((axis for axis in AXES if axis.name == name), None)
            if axis is None and not _SIZE.fullmatch(name):
                raise ValueError(f"{name!r} is neither b, h, q, k nor a size n0, n1, ...")
            return size(name) if axis is None else axis
        case ast.UnaryOp(op=ast.USub(), operand=operand):
            return -_parsed_number(operand)
        case ast.BinOp(left=left, op=ast.Add(), right=right):
            return _parsed_number(left) + _parsed_number(right)
        case ast.BinOp(left=left, op=ast.Sub(), right=right):
            return _parsed_number(left) - _parsed_number(right)
        case ast.BinOp(left=left, op=ast.Mult(), right=right):
            return _parsed_number(left) * _parsed_number(right)
        case ast.BinOp(left=left, op=ast.FloorDiv(), right=right):
            return sympy.floor(_parsed_number(left) / _parsed_number(right))
        case ast.Subscript(value=ast.Name(id=name), slice=index) if _CAPTURE.fullmatch(name):
            indices = index.elts if isinstance(index, ast.Tuple) else [index]
            return capture(name)(*(_parsed_number(each) for each in indices))
    raise ValueError(f"{ast.unparse(tree)!r} is no number of a mask program")


@dataclass(frozen=True)
class _Block:
    """Computes formulas over one block; every value broadcasts to (B, H, rows, columns)."""

    ranges: tuple[tuple[Any, Any], ...]
    captures: Mapping[str, torch.Tensor]
    sizes: Mapping[str, Any]
    device: torch.device

    def boolean(self, formula: Boolean) -> torch.Tensor:
        if formula in (sympy.true, sympy.false):
            return torch.full((1, 1, 1, 1), bool(formula), dtype=torch.bool, device=self.device)
        if isinstance(formula, sympy.And | sympy.Or):
            parts = [self.boolean(arg) for arg in formula.args]
            total = parts[0]
            for part in parts[1:]:
                total = total & part if isinstance(formula, sympy.And) else total | part
            return total
        if isinstance(formula, sympy.Not):
            return ~self.boolean(formula.args[0])
        return self._relation(formula)

    def _relation(self, formula: Any) -> torch.Tensor:
        left, right = self.number(formula.lhs), self.number(formula.rhs)
        if not isinstance(left, torch.Tensor):
            left = torch.full((1, 1, 1, 1), left, device=self.device)
        result: torch.Tensor = _COMPARE[formula.func](left, right)
        return result

    def number(self, expression: Any) -> Any:
        """A Python or symbolic integer, or a tensor of four dimensions."""
        if expression.is_Integer:
            return int(expression)
        if expression in AXES:
            return self._axis(AXES.index(expression))
        if expression.is_Symbol:
            return self.sizes[str(expression)]
        if isinstance(expression, AppliedUndef):
            return self._captured(expression)
        if isinstance(expression, sympy.floor):
            numerator, denominator = expression.args[0].as_numer_denom()
            return self.number(numerator) // self.number(denominator)
        parts = [self.number(arg) for arg in expression.args]
        total = parts[0]
        for part in parts[1:]:
            total = total + part if isinstance(expression, sympy.Add) else total * part
        return total

    def _axis(self, axis: int) -> torch.Tensor:
        """The indices along one axis of the block."""
        shape = [1, 1, 1, 1]
        shape[axis] = -1
        return torch.arange(*self.ranges[axis], device=self.device).view(shape)

    def _captured(self, access: Any) -> torch.Tensor:
        """The entries of a captured tensor: a view where it is indexed by axes in order, else a gather."""
        tensor = self.captures[str(access.func)]
        places = [AXES.index(index) if index in AXES else None for index in access.args]
        plain = all(place is not None or index == 0 for place, index in zip(places, access.args, strict=True))
        named = [place for place in places if place is not None]
        if plain and named == sorted(set(named)):
            return self._view(tensor, places)
        return tensor[tuple(self._index(index) for index in access.args)]

    def _view(self, tensor: torch.Tensor, places: list[int | None]) -> torch.Tensor:
        kept = [place for place in places if place is not None]
        for dim in reversed(range(len(places))):
            place = places[dim]
            if place is None:
                tensor = tensor.select(dim, 0)
            elif place >= 2:
                first, last = self.ranges[place]
                tensor = tensor.narrow(dim, first, last - first)
        for axis in range(4):
            if axis not in kept:
                tensor = tensor.unsqueeze(axis)
        return tensor

    def _index(self, index: Any) -> torch.Tensor:
        found = self.number(index)
        return (
            found if isinstance(found, torch.Tensor) else torch.full((1, 1, 1, 1), found, device=self.device)
        )


_COMPARE: dict[Any, Any] = {
    sympy.Le: torch.le, sympy.Lt: torch.lt, sympy.Ge: torch.ge, sympy.Gt: torch.gt,
    sympy.Eq: torch.eq, sympy.Ne: torch.ne,
}  # fmt: skip
