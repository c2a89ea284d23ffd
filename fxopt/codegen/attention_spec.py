"""What decides on the text of a kernel of attention, besides its tiles."""

from __future__ import annotations

import functools
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import sympy
import torch
from sympy.core.function import AppliedUndef

from fxopt.codegen.attention_bounds import Span, spans
from fxopt.codegen.attention_program import Capture, is_uniform, short_type
from fxopt.ir.formula import K, Q
from fxopt.ir.ops.masking import MEAN, NAN
from fxopt.ir.program import MaskProgram, ScoreProgram
from fxopt.ir.sizes import size_of

LOG2E = math.log2(math.e)
MOST_ROWS = 128  # of a tile
MANY_CAPTURES = 3  # that a score reads


@dataclass(frozen=True)
class Spec:
    """One attention, for all sizes.

    Attributes:
        dtype: of query, key and value. group: query heads of a key head. width: of query and key. width_v: of
            value. captures, sizes: what the programs name, in the order of arguments. sinks: their dtype.
        alignment: a power of two that divides all strides of operands but the last. far: offsets within a
            tile of rows may need more than 31 bits.
        dead_rows, stops, stopped, dropout_p: as `fxopt.ir.ops.block_attention` has them.
    """

    dtype: torch.dtype
    group: int
    width: int
    width_v: int
    mask: MaskProgram
    score: ScoreProgram
    scale: float
    captures: tuple[Capture, ...] = ()
    sizes: tuple[str, ...] = ()
    sinks: torch.dtype | None = None
    dead_rows: str = "zero"
    stops: bool = False
    stopped: tuple[int, ...] = ()
    dropout_p: float = 0.0
    alignment: int = 1
    far: bool = False

    @property
    def triton_type(self) -> str:
        """``bf16``: as Triton writes it in the type of a pointer."""
        return short_type(self.dtype)

    @property
    def folds(self) -> bool:
        """The scale is part of the factor of exp2, and scores are what the product gives."""
        return self.score.is_identity and self.scale > 0 and not self.subtracts_first

    @property
    def subtracts_first(self) -> bool:
        """log2(e) is multiplied behind the subtraction of the largest score, which costs an operation.

        A captured number may be as large as float32 has them, and in float32 the product of a score is
        rounded by more than its difference to the largest one can lose.
        """
        captured = any(self.capture(name).dtype.is_floating_point for name in self.score.captures)
        return captured or self.dtype is torch.float32

    @property
    def multiplier(self) -> float:
        """Of the product of Q and K, before the score program."""
        return 1.0 if self.folds else self.scale

    @property
    def factor(self) -> float:
        """Of scores before exp2; 0 where log2(e) is to be multiplied behind the subtraction."""
        if self.folds:
            return self.scale * LOG2E
        return 0.0 if self.subtracts_first else LOG2E

    def capture(self, name: str) -> Capture:
        return next(one for one in self.captures if one.name == name)

    @functools.cached_property
    def columns(self) -> tuple[Span, ...]:
        """The keys that a block of queries may see."""
        return spans(self.mask.live, K)

    @functools.cached_property
    def rows(self) -> tuple[Span, ...]:
        """The queries that may see a block of keys."""
        return spans(self.mask.live, Q)

    @property
    def crops(self) -> bool:
        """Vectors that are captured (padding, documents) decide on keys: where none is live is looked up."""
        accesses = [each for each in self.mask.live.atoms(AppliedUndef) if not is_uniform(each)]
        return bool(accesses) and not _of_pairs(accesses)

    @property
    def reads_pairs(self) -> bool:
        """A captured tensor is read by query and key: each score of a tile has an address."""
        return _of_pairs(self.mask.live.atoms(AppliedUndef) | self.score.result.atoms(AppliedUndef))

    @property
    def is_heavy(self) -> bool:
        """A score takes many registers besides its own: random numbers, or a formula of many terms."""
        return self.dropout_p > 0.0 or len(self.score.captures) >= MANY_CAPTURES

    @property
    def may_be_dead(self) -> bool:
        """A row may have no live key, and give something else than 0."""
        certain = self.mask.live == sympy.true or self.sinks is not None
        return not certain and self.dead_rows in (MEAN, NAN)

    @property
    def dead_code(self) -> int:
        """`DEAD_ROWS` of the templates."""
        if not self.may_be_dead:
            return 0
        return 1 if self.dead_rows == MEAN else 2


def _of_pairs(accesses: Iterable[Any]) -> bool:
    return any({Q, K} <= each.free_symbols for each in accesses)


def alignment(tensors: Sequence[torch.Tensor]) -> int:
    """The power of two up to 16 that is known to divide all strides but the last."""
    known = 16
    for tensor in tensors:
        for size, stride in zip(tensor.shape[:3], tensor.stride()[:3], strict=True):
            if isinstance(size, int) and size == 1:
                continue
            terms = sympy.Add.make_args(sympy.expand(size_of(stride)))
            for term in terms:
                known = math.gcd(known, int(term.as_coeff_Mul()[0]))
    return known


def are_far(tensors: Sequence[torch.Tensor]) -> bool:
    """Whether the rows of a tile may lie further apart than 31 bits say."""
    strides = [tensor.stride(2) for tensor in tensors]
    return not all(isinstance(stride, int) and stride < 2**31 // MOST_ROWS for stride in strides)


def parts_of(found: tuple[Span, ...]) -> int:
    """`PARTS` of the templates: which of the loops over partly, wholly and partly seen tiles have any."""
    if not any(each.has_full for each in found):
        return 1
    leading = any(each.lows or each.full_lows or not each.has_full for each in found)
    return 6 + int(leading)
