"""Rotary embedding, append and attention in a kernel's file: `fxopt.kernels.append_attention`."""

from __future__ import annotations

from dataclasses import dataclass

from fxopt.codegen.attention_functions import with_helpers
from fxopt.codegen.attention_program import captured_arguments, with_captured
from fxopt.codegen.decode_attention import (
    about,
    formula_functions,
    operands,
    parameters,
    result,
    scratch,
    sizes,
    split_constants,
    split_grid,
    template,
    total_launch,
    widen_function,
)
from fxopt.codegen.decode_problem import SMALLEST_TILE, Problem, Tiling, Widths, tiling_of
from fxopt.codegen.decode_reference import append_reference_text, example_text
from fxopt.codegen.kernel_file import Argument, KernelFile, Launch
from fxopt.codegen.tile_sizes import power_of_two
from fxopt.ir.linear import Unsupported
from fxopt.ir.ops.masking import MEAN, NONE
from fxopt.ir.target import Target

NAME = "append_attention"
# Rows that are rotated are held several times: as they were, their partners, and both angles. So tiles have
# fewer of them, half as many of rows in two parts, and programs more warps where rows are wider than this.
MOST_ROWS, FEWEST_ROWS, WIDE = 64, 16, 128
_OPERANDS = ("query", "k_new", "v_new", "cos", "sin", "key", "value")


@dataclass(frozen=True)
class AppendProblem(Problem):
    """The operands of an attention that appends first.

    Tensors, by name: query (B, Hq, Sq, D); k_new (B, Hkv, Sq, D) and v_new (B, Hkv, Sq, Dv); cos and sin, or
    none of them, (B or 1, Sq, R) with R <= D; key and value, the caches, (B, Hkv, rows, D) and
    (B, Hkv, rows, Dv); length, an int64 tensor that begins with the number of rows in front of the new ones,
    or none, where these are the last ones; span and sinks as `Problem` has them.

    Attributes:
        interleaved: pairs of the rotary embedding are neighbours. ring: the key at the position p is in the
            row p % rows.
    """

    interleaved: bool = False
    ring: bool = False


def append_kernel(problem: AppendProblem, target: Target | None) -> KernelFile:
    """The kernel of a problem; it writes to `key` and `value`.

    Raises:
        Unsupported: a formula has what kernels do not cover, or rows without a live key give the mean of
            a ring.
    """
    if problem.ring and problem.dead_rows in (MEAN, NONE):
        raise Unsupported("rows without a live key that give the mean of a ring")
    tiling = tiling_of(problem, target, _most_rows(int(problem.query.shape[3])))
    names = [one.name for one in captured_arguments(problem.captured, problem.size_names)]
    functions = "\n\n".join((widen_function(problem, target), *formula_functions(problem)))
    text = f"{functions}\n\n{template('decode_attention')}\n\n\n{template('append_attention')}"
    given = parameters(problem)
    return KernelFile(
        name=NAME,
        parameters=given,
        jit=with_helpers(with_captured(text, names)),
        launches=(_append_launch(problem, tiling), total_launch(problem, tiling)),
        outputs=(result(problem),),
        reference=append_reference_text(
            problem, [one.name for one in given], problem.interleaved, problem.ring
        ),
        example_inputs=example_text(problem, [one.name for one in given]),
        sizes=tuple(sizes(problem)),
        mutates=("key", "value"),
        scratch=scratch(problem, tiling),
        about=about(problem, tiling, "rotary embedding, append to a cache and attention over it, in parts"),
    )


def _most_rows(width: int) -> int:
    """Of a tile."""
    if width > WIDE:
        return FEWEST_ROWS
    return MOST_ROWS // 2 if Widths.of(width).parts[1] else MOST_ROWS


def _append_launch(problem: AppendProblem, tiling: Tiling) -> Launch:
    """The new rows, and the sums of all parts."""
    arguments, absent = operands(problem, _OPERANDS)
    for name in ("length", "span"):
        if problem.has(name):
            arguments.append(Argument(f"{name}_ptr", "*i64", name))
        else:
            absent.append((f"{name}_ptr", 0))
    arguments += [Argument("partial_ptr", "*fp32"), Argument("sums_ptr", "*fp32")]
    arguments.append(Argument("columns", "i32", aligned=False))
    arguments += captured_arguments(problem.captured, problem.size_names)
    constants = {
        **split_constants(problem, tiling),
        "ROTARY": int(problem.tensors["cos"].shape[2]) if problem.has("cos") else 0,
        "INTERLEAVED": problem.interleaved,
        "RING": problem.ring,
        "LENGTH": problem.has("length"),
        "SPAN": problem.has("span"),
        "BLOCK_NEW": max(SMALLEST_TILE, power_of_two(problem.queries)),
    }
    return Launch(
        "_append_attention_kernel",
        tuple(arguments),
        split_grid(problem, tiling),
        (*absent, *constants.items()),
        8 if sum(tiling.k.blocks) > WIDE else tiling.warps,
        tiling.stages,
    )
