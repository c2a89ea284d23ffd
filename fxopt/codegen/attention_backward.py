"""The backward of attention as a file: D, dQ, dK and dV, and what scores share."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from sympy.core.function import AppliedUndef

from fxopt.codegen.attention_functions import backward_functions, extra_arguments, with_helpers
from fxopt.codegen.attention_kernel import (
    SIZES,
    about_of,
    counts,
    heads_last,
    parameters,
    shape_constants,
    strides,
    template,
    walk_constants,
)
from fxopt.codegen.attention_program import short_type, with_captured
from fxopt.codegen.attention_reference import backward_reference
from fxopt.codegen.attention_spec import Spec
from fxopt.codegen.attention_tiles import Tiles, key_tiles, padded_width, query_tiles
from fxopt.codegen.kernel_file import About, Argument, KernelFile, Launch, Output, Parameter
from fxopt.ir.formula import B, H
from fxopt.ir.linear import Unsupported
from fxopt.ir.target import Target

ROWS = 128  # of a program that reads every row once


@dataclass(frozen=True)
class Number:
    """A captured number by sequence or head whose gradient is wanted: the entry, its place in captures."""

    access: Any
    place: int

    @property
    def by(self) -> tuple[bool, bool]:
        """Whether it differs from sequence to sequence, and from head to head."""
        return B in self.access.args, H in self.access.args


def learned_number(spec: Spec, learned: Sequence[int]) -> Number | None:
    """What of the captures `learned` a kernel sums by row.

    Raises:
        Unsupported: a gradient that has no kernel; the message says which.
    """
    if len(learned) > 1:
        raise Unsupported(f"gradients of {len(learned)} captured tensors in one kernel")
    for place in learned:
        accesses = [each for each in spec.score.result.atoms(AppliedUndef) if str(each.func) == f"c{place}"]
        if len(accesses) != 1:
            raise Unsupported(f"the gradient of c{place}, which is read in {len(accesses)} places")
        if not all(index in (B, H) or index == 0 for index in accesses[0].args):
            raise Unsupported(f"the gradient of {accesses[0]}, which is not a number of each head")
        return Number(accesses[0], place)
    return None


def backward_kernel(
    spec: Spec, learned: Sequence[int], target: Target | None, example: str, about: About | None = None
) -> KernelFile:
    """(grad, out, sums, query, key, value, captures, sinks, seed, sizes) -> gradients of query, key, value,
    sinks if there are any, and of the captures at the places `learned`.

    Raises:
        Unsupported: a formula, or a gradient, that kernels do not cover.
    """
    number = learned_number(spec, learned)
    queries, keys = query_tiles(spec, target), key_tiles(spec, target)
    extra = extra_arguments(spec)
    names = [one.name for one in extra]
    parts = (
        backward_functions(spec, None if number is None else number.access),
        *map(template, ("attention_forward", "attention_backward", "attention_delta", "attention_sums")),
    )
    return KernelFile(
        name="attention_backward",
        parameters=(Parameter("grad"), Parameter("out"), Parameter("sums"), *parameters(spec)),
        jit=with_captured(with_helpers("\n\n\n".join(parts)), names),
        launches=tuple(_launches(spec, number, queries, keys, extra)),
        outputs=tuple(_outputs(spec, number)),
        reference=backward_reference(spec, learned),
        example_inputs=example,
        sizes=SIZES,
        scratch=tuple(_scratch(number)),
        about=about_of(about or About(), spec, f"dQ: {queries.why}", f"dK, dV: {keys.why}"),
    )


def _outputs(spec: Spec, number: Number | None) -> list[Output]:
    found = [
        heads_last("dq", "heads", "rows", spec.width, "query.dtype"),
        heads_last("dk", "groups", "columns", spec.width, "key.dtype"),
        heads_last("dv", "groups", "columns", spec.width_v, "value.dtype"),
    ]
    if spec.sinks is not None:
        found.append(Output("of_sinks", ("heads",), "sinks.dtype"))
    if number is not None:
        name = f"c{number.place}"
        shape = tuple(f"{name}.shape[{dim}]" for dim in range(len(number.access.args)))
        found.append(Output("of_numbers", shape, f"{name}.dtype"))
    return found


def _scratch(number: Number | None) -> list[Output]:
    rows = ("batch", "heads", "rows")
    found = [Output("delta", rows, "torch.float32")]
    return found if number is None else [*found, Output("numbers", rows, "torch.float32")]


def _launches(
    spec: Spec, number: Number | None, queries: Tiles, keys: Tiles, extra: tuple[Argument, ...]
) -> list[Launch]:
    # The weights of a row with a sink do not sum up to one.
    again = spec.sinks is None and (spec.dtype is torch.float32 or number is not None)
    delta = _delta_again(spec, queries, extra) if again else _delta(spec)
    found = [delta, _queries(spec, number, queries, extra), _keys(spec, keys, extra)]
    if spec.sinks is not None:
        found.append(_sinks(spec))
    if number is not None:
        found.append(_numbers(spec, number))
    return found


def _operands(spec: Spec, *names: tuple[str, str]) -> list[Argument]:
    return [Argument(f"{short}_ptr", f"*{spec.triton_type}", name) for short, name in names]


def _delta(spec: Spec) -> Launch:
    pairs = (("grad", "grad"), ("out", "out"))
    arguments = (
        *_operands(spec, *pairs),
        Argument("delta_ptr", "*fp32"),
        *(each for pair in pairs for each in strides(*pair)),
        *counts("heads", "rows"),
    )
    constants = (("WIDTH_V", spec.width_v), ("BLOCK_DV", padded_width(spec.width_v)), ("BLOCK_M", 32))
    return Launch(
        "_attention_delta_kernel", arguments, ("triton.cdiv(rows, BLOCK_M) * heads * batch",), constants
    )


def _delta_again(spec: Spec, tiles: Tiles, extra: tuple[Argument, ...]) -> Launch:
    arguments = (
        *_operands(spec, *_GIVEN),
        *_SUMS,
        *(each for pair in _GIVEN for each in strides(*pair)),
        *counts("batch", "groups", "rows", "columns"),
        *extra,
    )
    constants = tuple(one for one in _constants(spec, tiles, spec.columns) if one[0] != "OF_SCORES")
    grid = ("triton.cdiv(rows * GROUP, BLOCK_M) * groups * batch",)
    return Launch(
        "_attention_delta_again_kernel", arguments, grid, constants, tiles.num_warps, tiles.num_stages
    )


_GIVEN = (("grad", "grad"), ("q", "query"), ("k", "key"), ("v", "value"))
_SUMS = (Argument("sums_ptr", "*fp32"), Argument("delta_ptr", "*fp32"))


def _queries(spec: Spec, number: Number | None, tiles: Tiles, extra: tuple[Argument, ...]) -> Launch:
    made = ("dq", "dq")
    arguments = (
        *_operands(spec, *_GIVEN, made),
        *_SUMS,
        Argument("numbers_ptr", "*fp32", "delta" if number is None else "numbers"),
        *(each for pair in (*_GIVEN, made) for each in strides(*pair)),
        *counts("batch", "groups", "rows", "columns"),
        *extra,
    )
    stopped = number is not None and number.place in spec.stopped
    constants = (
        *_constants(spec, tiles, spec.columns),
        ("LEARNED", number is not None),
        ("LEARNED_DEAD", number is not None and not stopped),
    )
    grid = ("triton.cdiv(rows * GROUP, BLOCK_M) * groups * batch",)
    return Launch("_attention_dq_kernel", arguments, grid, constants, tiles.num_warps, tiles.num_stages)


def _keys(spec: Spec, tiles: Tiles, extra: tuple[Argument, ...]) -> Launch:
    made = (("dk", "dk"), ("dv", "dv"))
    arguments = (
        *_operands(spec, *_GIVEN, *made),
        *_SUMS,
        *(each for pair in (*_GIVEN, *made) for each in strides(*pair)),
        *counts("batch", "groups", "rows", "columns"),
        *extra,
    )
    grid = ("triton.cdiv(columns, BLOCK_N) * groups * batch",)
    constants = _constants(spec, tiles, spec.rows)
    return Launch("_attention_dkdv_kernel", arguments, grid, constants, tiles.num_warps, tiles.num_stages)


def _constants(spec: Spec, tiles: Tiles, spans: Sequence[Any]) -> tuple[tuple[str, int | float | bool], ...]:
    return (
        *shape_constants(spec),
        ("OF_SCORES", spec.scale),
        ("BLOCK_M", tiles.rows),
        ("BLOCK_N", tiles.columns),
        *walk_constants(spec, spans),
        ("DEAD_ROWS", spec.dead_code),
        ("STOPS", spec.stops),
    )


def _sinks(spec: Spec) -> Launch:
    assert spec.sinks is not None
    kind = f"*{short_type(spec.sinks)}"
    arguments = (
        *_SUMS,
        Argument("sinks_ptr", kind),
        Argument("of_sinks_ptr", kind),
        *counts("batch", "heads", "rows"),
    )
    return Launch(
        "_attention_sinks_kernel", arguments, ("heads",), (("FACTOR", spec.factor), ("BLOCK_M", ROWS))
    )


def _numbers(spec: Spec, number: Number) -> Launch:
    by_b, by_h = number.by
    dims = {axis: dim for dim, axis in enumerate(number.access.args)}
    steps = [f"of_numbers.stride({dims[axis]})" if axis in dims else "0" for axis in (B, H)]
    arguments = (
        Argument("numbers_ptr", "*fp32"),
        Argument("of_numbers_ptr", f"*{short_type(spec.capture(f'c{number.place}').dtype)}"),
        *counts("batch", "heads", "rows"),
        Argument("stride_b", "i64", steps[0], False),
        Argument("stride_h", "i64", steps[1], False),
    )
    grid = f"({'batch' if by_b else '1'}) * ({'heads' if by_h else '1'})"
    constants = (("BY_B", by_b), ("BY_H", by_h), ("BLOCK_M", ROWS))
    return Launch("_attention_numbers_kernel", arguments, (grid,), constants)
