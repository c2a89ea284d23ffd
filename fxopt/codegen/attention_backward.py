"""The backward of attention as a file: D, dQ, dK and dV, and what scores share."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any

import torch

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
from fxopt.codegen.attention_learned import (
    GIVEN,
    ROWS,
    SUMS,
    Learned,
    given_operands,
    learned_entries,
    matrix_launch,
    number_launch,
    number_of,
    parts_of_table,
    table_launches,
)
from fxopt.codegen.attention_program import short_type, with_captured
from fxopt.codegen.attention_reference import backward_reference
from fxopt.codegen.attention_spec import Spec
from fxopt.codegen.attention_tiles import (
    Tiles,
    beside,
    key_tiles,
    padded_width,
    query_tiles,
    score_tiles,
)
from fxopt.codegen.kernel_file import About, Argument, KernelFile, Launch, Output, Parameter
from fxopt.ir.target import Target


def backward_kernel(
    spec: Spec,
    learned: Sequence[int],
    target: Target | None,
    example: str,
    about: About | None = None,
    *,
    tiles: tuple[Tiles, Tiles, Tiles] | None = None,
) -> KernelFile:
    """(grad, out, sums, query, key, value, captures, sinks, seed, sizes) -> gradients of query, key, value,
    sinks if there are any, and of the captures at the places `learned`.

    Args:
        tiles: for dQ, for dK and dV, and for gradients of matrices and tables: others than `attention_tiles`
            chooses.

    Raises:
        Unsupported: a formula, or a gradient, that kernels do not cover.
    """
    entries = learned_entries(spec, learned)
    number = number_of(entries)
    apart = [each for each in entries if each is not number]
    queries, keys, scores = tiles or _tiles(spec, target)
    extra = extra_arguments(spec)
    names = [one.name for one in extra]
    parts = (
        backward_functions(spec, {each.place: (each.access, each.entry) for each in entries}),
        *map(template, _TEMPLATES),
        *([template("attention_tables")] if apart else []),
    )
    return KernelFile(
        name="attention_backward",
        parameters=(Parameter("grad"), Parameter("out"), Parameter("sums"), *parameters(spec)),
        jit=with_captured(with_helpers("\n\n\n".join(parts)), names),
        launches=(
            *_launches(spec, entries, queries, keys, extra),
            *_apart(spec, apart, scores, extra, target),
        ),
        outputs=tuple(_outputs(spec, entries)),
        reference=backward_reference(spec, learned),
        example_inputs=example,
        sizes=SIZES,
        scratch=(*_scratch(number), *(parts_of_table(each, target) for each in apart if not each.is_matrix)),
        about=about_of(about or About(), spec, f"dQ: {queries.why}", f"dK, dV: {keys.why}"),
        modelled=False,
    )


def with_other_tiles(
    kernel: KernelFile, spec: Spec, learned: Sequence[int], target: Target | None, about: About
) -> KernelFile:
    """The backward `kernel`, with what is `beside` the tiles of each launch as alternatives."""
    chosen = _tiles(spec, target)
    others = itertools.zip_longest(*map(beside, chosen))
    forms = []
    for row in others:
        queries, keys, scores = (other or own for other, own in zip(row, chosen, strict=True))
        tiles = queries, keys, scores
        forms.append(backward_kernel(spec, learned, target, kernel.example_inputs, about, tiles=tiles))
    return replace(kernel, alternatives=tuple(forms))


def _tiles(spec: Spec, target: Target | None) -> tuple[Tiles, Tiles, Tiles]:
    return query_tiles(spec, target), key_tiles(spec, target), score_tiles(spec, target)


_TEMPLATES = ("attention_forward", "attention_backward", "attention_delta", "attention_sums")


def _apart(
    spec: Spec,
    learned: Sequence[Learned],
    tiles: Tiles,
    extra: tuple[Argument, ...],
    target: Target | None,
) -> Iterator[Launch]:
    """The launches for what is not summed where dQ is."""
    for each in learned:
        if each.is_matrix:
            yield matrix_launch(spec, each, tiles, extra)
        else:
            yield from table_launches(spec, each, tiles, extra, target)


def _outputs(spec: Spec, learned: Sequence[Learned]) -> list[Output]:
    found = [
        heads_last("dq", "heads", "rows", spec.width, "query.dtype"),
        heads_last("dk", "groups", "columns", spec.width, "key.dtype"),
        heads_last("dv", "groups", "columns", spec.width_v, "value.dtype"),
    ]
    if spec.sinks is not None:
        found.append(Output("of_sinks", ("heads",), "sinks.dtype"))
    return [*found, *(each.output for each in learned)]


def _scratch(number: Learned | None) -> list[Output]:
    rows = ("batch", "heads", "rows")
    found = [Output("delta", rows, "torch.float32")]
    return found if number is None else [*found, Output("numbers", rows, "torch.float32")]


def _launches(
    spec: Spec, learned: Sequence[Learned], queries: Tiles, keys: Tiles, extra: tuple[Argument, ...]
) -> list[Launch]:
    number = number_of(learned)
    # The weights of a row with a sink do not sum up to one.
    again = spec.sinks is None and (spec.dtype is torch.float32 or bool(learned))
    delta = _delta_again(spec, queries, extra) if again else _delta(spec)
    found = [delta, _queries(spec, number, queries, extra), _keys(spec, keys, extra)]
    if spec.sinks is not None:
        found.append(_sinks(spec))
    if number is not None:
        found.append(number_launch(spec, number))
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
    arguments = (*given_operands(spec), *counts("batch", "groups", "rows", "columns"), *extra)
    constants = tuple(one for one in _constants(spec, tiles, spec.columns) if one[0] != "OF_SCORES")
    grid = ("triton.cdiv(rows * GROUP, BLOCK_M) * groups * batch",)
    return Launch(
        "_attention_delta_again_kernel", arguments, grid, constants, tiles.num_warps, tiles.num_stages
    )


def _queries(spec: Spec, number: Learned | None, tiles: Tiles, extra: tuple[Argument, ...]) -> Launch:
    made = ("dq", "dq")
    arguments = (
        *_operands(spec, *GIVEN, made),
        *SUMS,
        Argument("numbers_ptr", "*fp32", "delta" if number is None else "numbers"),
        *(each for pair in (*GIVEN, made) for each in strides(*pair)),
        *counts("batch", "groups", "rows", "columns"),
        *extra,
    )
    constants = (
        *_constants(spec, tiles, spec.columns),
        ("LEARNED", -1 if number is None else number.place),
        ("LEARNED_DEAD", -1 if number is None or number.stopped else number.place),
    )
    grid = ("triton.cdiv(rows * GROUP, BLOCK_M) * groups * batch",)
    return Launch("_attention_dq_kernel", arguments, grid, constants, tiles.num_warps, tiles.num_stages)


def _keys(spec: Spec, tiles: Tiles, extra: tuple[Argument, ...]) -> Launch:
    made = (("dk", "dk"), ("dv", "dv"))
    arguments = (
        *_operands(spec, *GIVEN, *made),
        *SUMS,
        *(each for pair in (*GIVEN, *made) for each in strides(*pair)),
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
        *SUMS,
        Argument("sinks_ptr", kind),
        Argument("of_sinks_ptr", kind),
        *counts("batch", "heads", "rows"),
    )
    return Launch(
        "_attention_sinks_kernel", arguments, ("heads",), (("FACTOR", spec.factor), ("BLOCK_M", ROWS))
    )
