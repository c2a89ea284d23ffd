"""Kernels of attention as files: the templates of `fxopt.kernels`, specialised by a mask and a score."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from fxopt.codegen.attention_functions import extra_arguments, forward_functions, with_helpers
from fxopt.codegen.attention_program import with_captured
from fxopt.codegen.attention_reference import forward_reference, operand_names
from fxopt.codegen.attention_spec import Spec, parts_of
from fxopt.codegen.attention_tiles import Tiles, beside, forward_tiles, padded_width
from fxopt.codegen.kernel_file import About, Argument, KernelFile, Launch, Output, Parameter
from fxopt.ir.target import Target

_MARK = "# --- All below is copied into kernels' files as it stands."

SIZES = (
    ("batch", "query.shape[0]"),
    ("heads", "query.shape[1]"),
    ("groups", "key.shape[1]"),
    ("rows", "query.shape[2]"),
    ("columns", "key.shape[2]"),
)


@functools.cache
def template(name: str) -> str:
    """The functions of a template of `fxopt.kernels`."""
    path = Path(__file__).parent.parent / "kernels" / f"{name}.py"
    return path.read_text().split(_MARK, 1)[1].strip("\n")


def forward_kernel(
    spec: Spec,
    target: Target | None,
    example: str,
    about: About | None = None,
    *,
    tiles: Tiles | None = None,
    described: bool = False,
) -> KernelFile:
    """The forward: (query, key, value, captures, sinks, seed, sizes) -> (out, sums).

    Args:
        example: text of `example_inputs`.
        tiles: others than `attention_tiles` chooses.
        described: load keys and values through tensor descriptors, which is for operands that
            `fxopt.codegen.attention_descriptors.takes_descriptors` accepts.

    Raises:
        Unsupported: a formula has what Triton's text does not cover.
    """
    tiles = tiles or forward_tiles(spec, target)
    extra = extra_arguments(spec)
    text = f"{forward_functions(spec)}\n\n{template('attention_forward')}"
    return KernelFile(
        name="attention_forward",
        parameters=parameters(spec),
        jit=with_captured(with_helpers(text), [one.name for one in extra]),
        launches=(_launch(spec, tiles, extra, described),),
        outputs=(
            heads_last("out", "heads", "rows", spec.width_v, "query.dtype"),
            Output("sums", ("2", "batch", "heads", "rows"), "torch.float32"),
        ),
        reference=forward_reference(spec),
        example_inputs=example,
        sizes=SIZES,
        about=about_of(about or About(), spec, tiles.why),
        modelled=False,
    )


def with_other_tiles(kernel: KernelFile, spec: Spec, target: Target | None, about: About) -> KernelFile:
    """The forward `kernel`, with what is `beside` its tiles as alternatives."""
    forms = [
        forward_kernel(spec, target, kernel.example_inputs, about, tiles=tiles)
        for tiles in beside(forward_tiles(spec, target))
    ]
    return replace(kernel, alternatives=(*kernel.alternatives, *forms))


def _launch(spec: Spec, tiles: Tiles, extra: Sequence[Argument], described: bool) -> Launch:
    operands = (("q", "query"), ("k", "key"), ("v", "value"), ("out", "out"))
    arguments = (
        *(Argument(f"{short}_ptr", f"*{spec.triton_type}", name) for short, name in operands),
        Argument("sums_ptr", "*fp32"),
        *(each for pair in operands for each in strides(*pair)),
        *counts("batch", "groups", "rows", "columns"),
        *extra,
    )
    constants = (
        *shape_constants(spec),
        ("BLOCK_M", tiles.rows),
        ("BLOCK_N", tiles.columns),
        *walk_constants(spec, spec.columns),
        ("DEAD_ROWS", spec.dead_code),
        ("DESCRIBED", described),
    )
    return Launch(
        "_attention_forward_kernel",
        arguments,
        ("triton.cdiv(rows * GROUP, BLOCK_M) * groups * batch",),
        constants,
        num_warps=tiles.num_warps,
        num_stages=tiles.num_stages,
    )


def about_of(about: About, spec: Spec, *why: str) -> About:
    """What the head of the file says of the programs."""
    said = (f"mask: {spec.mask}", f"score: {spec.score}", f"rows without a live key: {spec.dead_rows}")
    return replace(about, configuration=(*said, *why, *about.configuration))


def parameters(spec: Spec) -> tuple[Parameter, ...]:
    """Of `launch`."""
    return tuple(Parameter(name, "int" if name in spec.sizes else "Tensor") for name in operand_names(spec))


def strides(short: str, name: str) -> tuple[Argument, ...]:
    """Of sequences, heads and rows; that within a row is 1."""
    return tuple(
        Argument(f"{short}_stride_{axis}", "i64", f"{name}.stride({dim})", aligned=False)
        for dim, axis in enumerate("bhs")
    )


def counts(*names: str) -> tuple[Argument, ...]:
    return tuple(Argument(name, "i32", aligned=False) for name in names)


def shape_constants(spec: Spec) -> tuple[tuple[str, int | float], ...]:
    """What all kernels over tiles of scores have in common."""
    return (
        ("SCALE", spec.multiplier),
        ("FACTOR", spec.factor),
        ("GROUP", spec.group),
        ("WIDTH", spec.width),
        ("WIDTH_V", spec.width_v),
        ("BLOCK_D", padded_width(spec.width)),
        ("BLOCK_DV", padded_width(spec.width_v)),
    )


def walk_constants(spec: Spec, spans: Sequence[Any]) -> tuple[tuple[str, int | bool], ...]:
    """How the loop over the other axis goes."""
    return (("PIECES", len(spans)), ("PARTS", parts_of(tuple(spans))), ("CROP", spec.crops))


def heads_last(name: str, heads: str, rows: str, width: int, dtype: str) -> Output:
    """(B, H, S, D) laid out as (B, S, H, D)."""
    steps = (f"{rows} * {heads} * {width}", str(width), f"{heads} * {width}", "1")
    return Output(name, ("batch", heads, rows, str(width)), dtype, steps)
