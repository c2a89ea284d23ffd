"""What a layer writes into a cache: rows as they are, or of 8 bits, with scales in a second cache."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from fxopt.ir import facts
from fxopt.ir.contract import Miss
from fxopt.ir.facts import argument, is_call, is_number
from fxopt.ir.row_codes import SMALLEST, WRITTEN, largest_of
from fxopt.ir.same_value import same_value

from .cache_writes import CacheWrite, write_before

aten = torch.ops.aten

_WANTED = "new rows rounded to 8 bits by the largest of each"


@dataclass(frozen=True)
class StoredRows:
    """New rows of a cache.

    Attributes:
        source: (B, H, new, D), as they are before they are rounded. scales: where they are.
    """

    rows: CacheWrite
    source: fx.Node
    scales: CacheWrite | None = None

    @property
    def writes(self) -> list[CacheWrite]:
        return [self.rows, *([] if self.scales is None else [self.scales])]

    def readers(self) -> list[fx.Node]:
        """Who reads the new rows, but for those who store them."""
        inner = {self.rows.write}.union(*(_steps(each.new, self.source) for each in self.writes))
        return [user for user in self.source.users if user not in inner]

    def same_rows(self, other: StoredRows) -> bool:
        """All go to the same rows."""
        return all(self.rows.same_rows(each) for each in (*self.writes[1:], *other.writes))


def rows_before(reader: fx.Node, read: Any, scale: Any) -> StoredRows | Miss:
    """The last write, before `reader`, into what it reads as `read`, and as `scale` where rows have some."""
    rows = write_before(reader, read)
    if isinstance(rows, Miss) or scale is None:
        return rows if isinstance(rows, Miss) else StoredRows(rows, rows.new)
    scales = write_before(reader, scale)
    if isinstance(scales, Miss):
        return Miss(f"{scales.wanted}, of scales", scales.saw)
    if facts.dtype(rows.cache) not in WRITTEN or facts.dtype(scales.cache) is not torch.float32:
        return Miss(f"{_WANTED}, with scales in float32", f"{rows.cache.name}, {scales.cache.name}")
    source = _rounded(rows.new, scales.new, facts.dtype(rows.cache))
    if source is None:
        return Miss(_WANTED, rows.new.format_node() or rows.new.name)
    return StoredRows(rows, source, scales)


def _steps(made: fx.Node, source: fx.Node) -> set[fx.Node]:
    """The calls that make one of the other."""
    found, pending = set[fx.Node](), [made]
    while pending:
        node = pending.pop()
        if node is not source and node not in found:
            found.add(node)
            pending += node.all_input_nodes
    return found


def _rounded(codes: Any, scales: Any, dtype: torch.dtype) -> fx.Node | None:
    """What was rounded, where it was as `fxopt.ir.row_codes.quantized` does."""
    if not facts.is_cast(codes) or facts.dtype(codes) is not dtype:
        return None
    number, largest = codes.args[0], largest_of(dtype)
    if not is_call(number, aten.clamp.default):
        return None
    ends = (argument(number, "min"), -largest), (argument(number, "max"), largest)
    if not all(is_number(*each) for each in ends):
        return None
    number = number.args[0]
    if not dtype.is_floating_point:
        if not is_call(number, aten.round.default):
            return None
        number = number.args[0]
    if not is_call(number, aten.div.Tensor) or not same_value(number.args[1], scales):
        return None
    wide = number.args[0]
    return facts.peel_widening(wide) if _is_wide(wide) and _is_scale(scales, wide, largest) else None


def _is_wide(node: Any) -> bool:
    return facts.is_tensor(node) and facts.dtype(node) is torch.float32


def _is_scale(scales: Any, wide: fx.Node, largest: float) -> bool:
    """``clamp_min(amax(|wide|, -1, keepdim) / largest, SMALLEST)``"""
    if not is_call(scales, aten.clamp_min.default) or not is_number(scales.args[1], SMALLEST):
        return False
    quotient = scales.args[0]
    if not is_call(quotient, aten.div.Tensor) or not is_number(quotient.args[1], largest):
        return False
    found: Any = quotient.args[0]
    if not is_call(found, aten.amax.default) or not argument(found, "keepdim"):
        return False
    dims = argument(found, "dim")
    if len(dims) != 1 or not facts.is_last_dim(wide, dims[0]):
        return False
    magnitude = found.args[0]
    return is_call(magnitude, aten.abs.default) and same_value(magnitude.args[0], wide)
