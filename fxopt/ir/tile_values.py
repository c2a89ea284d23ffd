"""Computes formulas over a tile of scores: a range of queries by a range of keys."""

from __future__ import annotations

import functools
import operator
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import sympy
import torch
from sympy.core.function import AppliedUndef
from sympy.logic.boolalg import Boolean

from fxopt.ir.formula import AXES, S

_COMPARE: dict[Any, Any] = {
    sympy.Le: torch.le, sympy.Lt: torch.lt, sympy.Ge: torch.ge, sympy.Gt: torch.gt,
    sympy.Eq: torch.eq, sympy.Ne: torch.ne,
}  # fmt: skip


@dataclass(frozen=True)
class TileValues:
    """Every value broadcasts to (B, H, rows, columns).

    Attributes:
        ranges: [first, last) of b, h, q and k. captures: tensors by name. sizes: integers by name.
        scores: what s is, where formulas name it. dtype: of captured floating-point numbers.
    """

    ranges: tuple[tuple[Any, Any], ...]
    captures: Mapping[str, torch.Tensor]
    sizes: Mapping[str, Any]
    device: torch.device
    scores: torch.Tensor | None = None
    dtype: torch.dtype = torch.float32

    def condition(self, formula: Boolean) -> torch.Tensor:
        """A bool tensor."""
        if formula in (sympy.true, sympy.false):
            return torch.full((1, 1, 1, 1), bool(formula), dtype=torch.bool, device=self.device)
        if isinstance(formula, sympy.And | sympy.Or):
            joined = operator.and_ if isinstance(formula, sympy.And) else operator.or_
            return functools.reduce(joined, (self.condition(arg) for arg in formula.args))
        if isinstance(formula, sympy.Not):
            return ~self.condition(formula.args[0])
        left, right = self.number(formula.lhs), self.number(formula.rhs)
        if not isinstance(left, torch.Tensor):
            left = torch.full((1, 1, 1, 1), left, device=self.device)
        result: torch.Tensor = _COMPARE[formula.func](left, right)
        return result

    def number(self, expression: Any) -> Any:
        """A Python or symbolic number, or a tensor of four dimensions."""
        if expression.is_Integer:
            return int(expression)
        if expression.is_number:
            return float(expression)
        if expression == S:
            return self.scores
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
        if isinstance(expression, sympy.tanh):
            return torch.tanh(parts[0])
        if isinstance(expression, sympy.Abs):
            return abs(parts[0])
        if isinstance(expression, sympy.Pow):
            return parts[0] ** parts[1]
        return functools.reduce(operator.add if isinstance(expression, sympy.Add) else operator.mul, parts)

    def places(self, access: Any) -> tuple[torch.Tensor, ...]:
        """The indices of a captured entry, for each score of the tile."""
        return tuple(self._index(index) for index in access.args)

    def _axis(self, axis: int) -> torch.Tensor:
        """The indices along one axis of the tile."""
        shape = [1, 1, 1, 1]
        shape[axis] = -1
        return torch.arange(*self.ranges[axis], device=self.device).view(shape)

    def _captured(self, access: Any) -> torch.Tensor:
        """The entries of a captured tensor: a view where it is indexed by axes in order, else a gather."""
        tensor = self.captures[str(access.func)]
        axes = in_order(access)
        found = tensor[self.places(access)] if axes is None else self._view(tensor, axes)
        return found.to(self.dtype) if found.is_floating_point() else found

    def _view(self, tensor: torch.Tensor, axes: list[int | None]) -> torch.Tensor:
        for dim in reversed(range(len(axes))):
            axis = axes[dim]
            if axis is None:
                tensor = tensor.select(dim, 0)
            else:
                first, last = self.ranges[axis]
                tensor = tensor.narrow(dim, first, last - first)
        for axis in range(4):
            if axis not in axes:
                tensor = tensor.unsqueeze(axis)
        return tensor

    def _index(self, index: Any) -> torch.Tensor:
        found = self.number(index)
        whole = (1, 1, 1, 1)
        return found if isinstance(found, torch.Tensor) else torch.full(whole, found, device=self.device)


def in_order(access: Any) -> list[int | None] | None:
    """The axis that each index of a captured entry is, None for the index 0; or None where others occur."""
    axes = [AXES.index(index) if index in AXES else None for index in access.args]
    named = [axis for axis in axes if axis is not None]
    plain = all(axis is not None or index == 0 for axis, index in zip(axes, access.args, strict=True))
    return axes if plain and named == sorted(set(named)) else None
