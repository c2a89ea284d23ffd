"""Gradients of captured tensors: which kernel sums which, and its launches.

A number of each head or sequence is summed by row where dQ is; a matrix, and a table, has launches of its own
(`fxopt.kernels.attention_tables`).
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import sympy
import torch
from sympy.core.function import AppliedUndef

from fxopt.codegen.attention_kernel import counts, shape_constants, strides
from fxopt.codegen.attention_program import short_type
from fxopt.codegen.attention_spec import Spec
from fxopt.codegen.attention_tiles import Tiles
from fxopt.codegen.kernel_file import Argument, Launch, Output
from fxopt.codegen.tile_sizes import sms_of
from fxopt.ir.formula import B, H, K, Q
from fxopt.ir.linear import Unsupported
from fxopt.ir.sizes import same_size
from fxopt.ir.target import Target

ROWS = 128  # of a program that reads every row once
ENTRIES = 256  # of a table, that a program sums up
# Programs that share an SM, and lines of a table (heads) times blocks of entries: parts of the queries are so
# many that together they fill the target.
PROGRAMS_PER_SM, LINES = 2, 16

GIVEN = (("grad", "grad"), ("q", "query"), ("k", "key"), ("v", "value"))
SUMS = (Argument("sums_ptr", "*fp32"), Argument("delta_ptr", "*fp32"))


@dataclass(frozen=True)
class Learned:
    """The entry of a captured tensor that scores read.

    Attributes:
        access: as the formula has it. place: of the tensor among the captured. axes: the axis b or h that a
            dimension has for its index. rest: the other dimensions, without those of one entry.
        stopped: rows without a live key give it no gradient.
    """

    access: Any
    place: int
    axes: dict[Any, int]
    rest: tuple[int, ...]
    stopped: bool

    @property
    def by(self) -> tuple[bool, bool]:
        """Whether it differs from sequence to sequence, and from head to head."""
        return B in self.axes, H in self.axes

    @property
    def is_number(self) -> bool:
        """One of each head or sequence, or of all."""
        return not self.rest

    @property
    def is_matrix(self) -> bool:
        """An entry of its own for each query and key."""
        return {self.access.args[dim] for dim in self.rest} == {Q, K} and len(self.rest) == 2

    @property
    def name(self) -> str:
        return f"c{self.place}"

    @property
    def entry(self) -> Any:
        """The index of a table, as a formula."""
        return self.access.args[self.rest[0]] if self.rest else sympy.Integer(0)

    @property
    def entries(self) -> str:
        """How many a table has, as an expression."""
        return f"{self.name}.shape[{self.rest[0]}]" if self.rest else "1"

    @property
    def output(self) -> Output:
        shape = tuple(f"{self.name}.shape[{dim}]" for dim in range(len(self.access.args)))
        return Output(f"of_{self.name}", shape, f"{self.name}.dtype")

    def stride(self, axis: Any) -> str:
        """Of the gradient, along b or h."""
        return f"of_{self.name}.stride({self.axes[axis]})" if axis in self.axes else "0"


def learned_entries(spec: Spec, places: Sequence[int]) -> tuple[Learned, ...]:
    """What scores read of the captured tensors at `places`.

    Raises:
        Unsupported: a gradient that has no kernel; the message says which.
    """
    return tuple(_learned(spec, place) for place in places)


def _learned(spec: Spec, place: int) -> Learned:
    accesses = [each for each in spec.score.result.atoms(AppliedUndef) if str(each.func) == f"c{place}"]
    if len(accesses) != 1:
        raise Unsupported(f"the gradient of c{place}, which is read in {len(accesses)} places")
    (access,), capture = accesses, spec.capture(f"c{place}")
    axes: dict[Any, int] = {}
    rest = []
    for dim, (index, stride) in enumerate(zip(access.args, capture.strides, strict=True)):
        if index in (B, H) and index not in axes:
            axes[index] = dim
        elif index != 0 or stride != 0:
            rest.append(dim)
    found = Learned(access, place, axes, tuple(rest), place in spec.stopped)
    if spec.stops and spec.dead_code and not found.stopped:
        raise Unsupported(f"the gradient of {access}, which rows have whose scores are replaced")
    if len(rest) > 1 and not found.is_matrix:
        raise Unsupported(f"the gradient of {access}, which has {len(rest)} indices that are formulas")
    return found


def check_extents(
    spec: Spec, places: Sequence[int], query: torch.Tensor, key: torch.Tensor, captures: Sequence[Any]
) -> None:
    """That kernels visit all entries along b, h, q and k, so that none of a gradient stays unwritten.

    Raises:
        Unsupported: a captured tensor may have more than there are sequences, heads, queries or keys.
    """
    extents = dict(zip((B, H, Q, K), (*query.shape[:3], key.shape[2]), strict=True))
    for each in learned_entries(spec, places):
        for index, size in zip(each.access.args, captures[each.place].shape, strict=True):
            if index in extents and not same_size(size, extents[index]):
                raise Unsupported(f"the gradient of {each.access}, which has {size} entries along {index}")


def number_of(learned: Sequence[Learned]) -> Learned | None:
    """The one that is summed by row where dQ is: one sum is what a program has registers for."""
    return next((each for each in learned if each.is_number), None)


def splits_of(target: Target | None) -> int:
    """Parts of the queries."""
    return max(1, PROGRAMS_PER_SM * sms_of(target) // LINES)


def parts_of_table(each: Learned, target: Target | None) -> Output:
    """The scratch of a table: its gradient by each part of the queries."""
    lines = [size for size, varies in zip(("batch", "heads"), each.by, strict=True) if varies]
    shape = (str(splits_of(target)), *lines, each.entries)
    return Output(f"parts_{each.name}", shape, "torch.float32")


def number_launch(spec: Spec, number: Learned) -> Launch:
    """The sum of what the rows have given."""
    by_b, by_h = number.by
    arguments = (
        Argument("numbers_ptr", "*fp32"),
        Argument("of_numbers_ptr", _type(spec, number), f"of_{number.name}"),
        *counts("batch", "heads", "rows"),
        Argument("stride_b", "i64", number.stride(B), False),
        Argument("stride_h", "i64", number.stride(H), False),
    )
    constants = (("BY_B", by_b), ("BY_H", by_h), ("BLOCK_M", ROWS))
    return Launch("_attention_numbers_kernel", arguments, (_lines(number),), constants)


def matrix_launch(spec: Spec, each: Learned, tiles: Tiles, extra: Sequence[Argument]) -> Launch:
    """A program for each tile of queries and keys."""
    dims = {each.access.args[dim]: dim for dim in each.rest}
    steps = [each.stride(B), each.stride(H), *(f"of_{each.name}.stride({dims[axis]})" for axis in (Q, K))]
    arguments = (
        *given_operands(spec),
        Argument("of_ptr", _type(spec, each), f"of_{each.name}"),
        *_of_strides(zip("bhqk", steps, strict=True)),
        *counts("batch", "groups", "rows", "columns"),
        *extra,
    )
    grid = f"triton.cdiv(rows, BLOCK_M) * triton.cdiv(columns, BLOCK_N) * {_lines(each)}"
    return _launch("_attention_matrix_kernel", spec, each, tiles, arguments, grid)


def table_launches(
    spec: Spec, each: Learned, tiles: Tiles, extra: Sequence[Argument], target: Target | None
) -> tuple[Launch, Launch]:
    """The parts of a table, and their sum."""
    entries = Argument("entries", "i32", each.entries, False)
    parts = Argument("parts_ptr", "*fp32", f"parts_{each.name}")
    arguments = (*given_operands(spec), parts, entries, *counts("batch", "groups", "rows", "columns"), *extra)
    blocks = f"triton.cdiv({each.entries}, BLOCK_T) * {_lines(each)}"
    shared = {axis for axis in (B, H) if axis not in each.axes}
    alike = not shared & each.entry.free_symbols
    cut = {"SPLITS": splits_of(target), "BLOCK_T": ENTRIES}
    first = _launch(
        "_attention_table_kernel", spec, each, tiles, arguments, f"SPLITS * {blocks}", TOGETHER=alike, **cut
    )
    whole = f"of_{each.name}.stride({each.rest[0]})" if each.rest else "0"
    steps = zip(("b", "h", "entry"), (each.stride(B), each.stride(H), whole), strict=True)
    of_parts = (
        parts,
        Argument("of_ptr", _type(spec, each), f"of_{each.name}"),
        *_of_strides(steps),
        entries,
        *counts("groups"),
    )
    by = dict(zip(("BY_B", "BY_H"), each.by, strict=True))
    constants = tuple({"GROUP": spec.group, **by, **cut}.items())
    return first, Launch("_attention_table_total_kernel", of_parts, (blocks,), constants)


def _of_strides(steps: Iterable[tuple[str, str]]) -> tuple[Argument, ...]:
    """Of a gradient, by the name of the axis."""
    return tuple(Argument(f"of_stride_{axis}", "i64", step, False) for axis, step in steps)


def given_operands(spec: Spec) -> tuple[Argument, ...]:
    """What scores and weights are computed from once more."""
    pointers = (Argument(f"{short}_ptr", f"*{spec.triton_type}", name) for short, name in GIVEN)
    return (*pointers, *SUMS, *(one for pair in GIVEN for one in strides(*pair)))


def _type(spec: Spec, each: Learned) -> str:
    return f"*{short_type(spec.capture(each.name).dtype)}"


def _lines(each: Learned) -> str:
    """Numbers, tables or matrices that the captured tensor holds."""
    by_b, by_h = each.by
    return f"({'batch' if by_b else '1'}) * ({'heads' if by_h else '1'})"


def _launch(
    name: str, spec: Spec, each: Learned, tiles: Tiles, arguments: Sequence[Argument], grid: str, **more: int
) -> Launch:
    constants: dict[str, int | float | bool] = {
        **dict(shape_constants(spec)),
        "BLOCK_M": tiles.rows,
        "BLOCK_N": tiles.columns,
        "PIECES": len(spec.columns),
        "DEAD_ROWS": spec.dead_code,
        **dict(zip(("BY_B", "BY_H"), each.by, strict=True)),
        "LEARNED": each.place,
        "LEARNED_DEAD": -1 if each.stopped else each.place,
        **more,
    }
    return Launch(
        name, tuple(arguments), (grid,), tuple(constants.items()), tiles.num_warps, tiles.num_stages
    )
