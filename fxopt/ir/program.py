"""What attention does to its scores, as formulas: which keys a query sees, and how a score is changed.

``k <= q and c0[b, k]`` says: query q of sequence b sees key k when k is not later and the captured tensor c0
is true at [b, k]. ``50*tanh(s/50) + c1[h]*k`` says what becomes of the score s. The formula is the meaning; a
tensor of Sq x Skv entries is only one way to compute it.
"""

from __future__ import annotations

import functools
from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import sympy
import torch
from sympy.core.function import AppliedUndef
from sympy.logic.boolalg import Boolean

from fxopt.ir.formula import (
    S,
    captures_of,
    condition_text,
    number_text,
    parsed_condition,
    parsed_number,
    parsed_tree,
    sizes_of,
)
from fxopt.ir.tile_values import TileValues


class Program(ABC):
    """A formula and its text. Two programs are equal when their texts are."""

    @property
    @abstractmethod
    def formula(self) -> sympy.Basic:
        """What the program says."""

    @property
    @abstractmethod
    def text(self) -> str:
        """The formula in one line."""

    @property
    def captures(self) -> tuple[str, ...]:
        """The names of captured tensors."""
        return captures_of(self.formula)

    @property
    def sizes(self) -> tuple[str, ...]:
        """The names of sizes that are not known while compiling."""
        return sizes_of(self.formula)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Program) and type(self) is type(other) and self.text == other.text

    def __hash__(self) -> int:
        return hash(self.text)

    def __str__(self) -> str:
        return self.text


@dataclass(frozen=True, eq=False)
class MaskProgram(Program):
    """Where a key takes part: a formula over b, h, q, k, captures ``c0, ...`` and sizes ``n0, ...``."""

    live: Boolean

    @property
    def formula(self) -> sympy.Basic:
        return self.live

    @functools.cached_property
    def text(self) -> str:
        return condition_text(self.live)

    @staticmethod
    @functools.lru_cache(maxsize=256)
    def parse(text: str) -> MaskProgram:
        """The program that `str` printed.

        Raises:
            ValueError: it is no such text; the message says what was not understood.
        """
        return MaskProgram(parsed_condition(parsed_tree(text, "mask program")))

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
        return TileValues(ranges, captures, sizes, device).condition(self.live)


@dataclass(frozen=True, eq=False)
class ScoreProgram(Program):
    """What becomes of a score s: a formula over s, b, h, q, k, captures and sizes."""

    result: sympy.Expr

    @property
    def formula(self) -> sympy.Basic:
        return self.result

    @functools.cached_property
    def text(self) -> str:
        return number_text(self.result)

    @staticmethod
    @functools.lru_cache(maxsize=256)
    def parse(text: str) -> ScoreProgram:
        """The program that `str` printed; of an empty text, the one that changes nothing.

        Raises:
            ValueError: it is no such text; the message says what was not understood.
        """
        return ScoreProgram(parsed_number(parsed_tree(text, "score program")) if text else S)

    @functools.cached_property
    def is_identity(self) -> bool:
        """The score stays what it is."""
        return bool(self.result == S)

    @functools.cached_property
    def bias(self) -> sympy.Expr | None:
        """What is added to a score that is changed in no other way; None where it is."""
        rest = sympy.expand(self.result - S)
        return None if rest.has(S) else rest

    @functools.cached_property
    def slope(self) -> sympy.Expr:
        """The derivative with respect to s."""
        return sympy.diff(self.result, S)

    def sensitivities(self) -> dict[sympy.Expr, sympy.Expr]:
        """The derivative with respect to each captured entry that is not an index itself."""
        accesses = sorted(self.result.atoms(AppliedUndef), key=str)
        outer = [each for each in accesses if not each.is_integer]
        held = {each: sympy.Symbol(f"entry{place}", real=True) for place, each in enumerate(outer)}
        back = {symbol: each for each, symbol in held.items()}
        result = self.result.xreplace(held)
        return {each: sympy.diff(result, symbol).xreplace(back) for each, symbol in held.items()}
