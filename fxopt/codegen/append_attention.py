"""Rotary embedding, append and attention in a kernel's file: `fxopt.kernels.append_attention`."""

from __future__ import annotations

import functools
from dataclasses import dataclass, replace

import torch

from fxopt.codegen.attention_functions import with_helpers
from fxopt.codegen.attention_program import captured_arguments, with_captured
from fxopt.codegen.decode_attention import (
    CONVERTS_FLOAT8,
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
    with_others,
)
from fxopt.codegen.decode_problem import MOST_KEYS, SMALLEST_TILE, Problem, Tiling, Widths, tiling_of
from fxopt.codegen.decode_reference import append_reference_text, example_text
from fxopt.codegen.kernel_file import Argument, KernelFile, Launch
from fxopt.codegen.tile_sizes import power_of_two
from fxopt.ir.linear import Unsupported
from fxopt.ir.ops.masking import MEAN, NONE
from fxopt.ir.row_codes import largest_of
from fxopt.ir.target import Target

NAME = "append_attention"
# Rows that are rotated are held several times: as they were, their partners, and both angles. So tiles have
# fewer of them, half as many of rows in two parts, and programs more warps where rows are wider than this.
# Those of 8 bits are widened in registers besides: tiles have the fewest rows, and fewer keys.
MOST_ROWS, FEWEST_ROWS, WIDE = 64, 16, 128
_OPERANDS = ("query", "k_new", "v_new", "cos", "sin", "key", "value", "key_scale", "value_scale")
CACHES = ("key", "value", "key_scale", "value_scale")

_ROUND = '''@triton.jit
def narrow(x, scale):
    """{doc}"""
    x = tl.div_rn(x, scale)
    x = tl.where(x > {largest}, {largest}, tl.where(x < -{largest}, -{largest}, x))
    {body}
'''
_INT8 = ("Numbers divided by the scales of their rows, as int8.", "return rint(x).to(tl.int8)")
_E4M3 = (
    "Numbers divided by the scales of their rows, as float8_e4m3fn.",
    "return nearest_e4m3(x).to(tl.float8e4nv)",
)
_E4M3_BITS = (
    "Numbers divided by the scales of their rows, as bytes of float8_e4m3fn: bits of a float16 that is 256 "
    "times\n    smaller.",
    "bits = (nearest_e4m3(x) * 0.00390625).to(tl.float16).to(tl.uint16, bitcast=True)\n"
    "    code = ((bits >> 8) & 0x80) | ((bits >> 7) & 0x7F)\n"
    "    return tl.where(x == x, code, 0x7F).to(tl.uint8)",
)


@dataclass(frozen=True)
class AppendProblem(Problem):
    """The operands of an attention that appends first.

    Tensors, by name: query (B, Hq, Sq, D); k_new (B, Hkv, Sq, D) and v_new (B, Hkv, Sq, Dv); cos and sin, or
    none of them, (B or 1, Sq, R) with R <= D; key and value, the caches, (B, Hkv, rows, D) and
    (B, Hkv, rows, Dv), and key_scale and value_scale, (B, Hkv, rows, 1) in float32, if they are of int8 or
    float8_e4m3fn; length, an int64 tensor that begins with the number of rows in front of the new ones,
    or none, where these are the last ones; span and sinks as `Problem` has them.

    Attributes:
        interleaved: pairs of the rotary embedding are neighbours. ring: the key at the position p is in the
            row p % rows.
    """

    interleaved: bool = False
    ring: bool = False


def append_kernel(problem: AppendProblem, target: Target | None) -> KernelFile:
    """The kernel of a problem; it writes to `key` and `value`, and their scales.

    Raises:
        Unsupported: a formula has what kernels do not cover, or rows without a live key give the mean of
            a ring.
    """
    converts = target is not None and target.arch >= CONVERTS_FLOAT8
    problem = replace(problem, native=converts and problem.tensors["key"].dtype is torch.float8_e4m3fn)
    if problem.ring and problem.dead_rows in (MEAN, NONE):
        raise Unsupported("rows without a live key that give the mean of a ring")
    tiling = tiling_of(problem, target, _most_rows(problem), _most_keys(problem))
    tiling = replace(tiling, warps=_warps(problem, tiling))
    if problem.has("key_scale"):
        tiling = replace(tiling, k=_with_wide_rest(tiling.k), v=_with_wide_rest(tiling.v))
    return with_others(functools.partial(_kernel, problem, target), tiling)


def _kernel(problem: AppendProblem, target: Target | None, tiling: Tiling) -> KernelFile:
    names = [one.name for one in captured_arguments(problem.captured, problem.size_names)]
    functions = [widen_function(problem, target), *formula_functions(problem)]
    if problem.has("key_scale"):
        functions.append(_narrow_function(problem))
    text = "\n\n".join(functions)
    text = f"{text}\n\n{template('decode_attention')}\n\n\n{template('append_attention')}"
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
        mutates=tuple(name for name in problem.tensors if name in CACHES),
        scratch=scratch(problem, tiling),
        modelled=False,
        about=about(problem, tiling, "rotary embedding, append to a cache and attention over it, in parts"),
    )


def _narrow_function(problem: AppendProblem) -> str:
    """How new numbers are rounded to what is stored."""
    stored = problem.tensors["key"].dtype
    doc, body = _INT8
    if stored is torch.float8_e4m3fn:
        doc, body = _E4M3 if problem.native else _E4M3_BITS
    return _ROUND.format(doc=doc, body=body, largest=largest_of(stored))


def _most_rows(problem: AppendProblem) -> int:
    """Of a tile."""
    if int(problem.query.shape[3]) > WIDE or problem.has("key_scale"):
        return FEWEST_ROWS
    return MOST_ROWS // 2 if Widths.of(int(problem.query.shape[3])).parts[1] else MOST_ROWS


def _most_keys(problem: AppendProblem) -> int:
    """Of a step."""
    if not problem.has("key_scale"):
        return MOST_KEYS
    widths = [Widths.of(int(problem.tensors[name].shape[3])) for name in ("key", "value")]
    return MOST_KEYS // 2 if all(each.blocks[0] >= WIDE for each in widths) else MOST_KEYS // 4


def _with_wide_rest(widths: Widths) -> Widths:
    """A rest of 16 columns, rounded to 8 bits, takes more registers than one of 32 (255 for 138)."""
    first, rest = widths.blocks
    return replace(widths, blocks=(first, max(2 * SMALLEST_TILE, rest))) if rest else widths


def _warps(problem: AppendProblem, tiling: Tiling) -> int:
    if sum(tiling.k.blocks) > WIDE or problem.has("key_scale") and tiling.k.blocks[0] == WIDE:
        return 8
    return tiling.warps


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
        "QUANTIZED": problem.has("key_scale"),
        "LARGEST": largest_of(problem.tensors["key"].dtype) if problem.has("key_scale") else 0.0,
        "LENGTH": problem.has("length"),
        "SPAN": problem.has("span"),
        "BLOCK_NEW": max(SMALLEST_TILE, power_of_two(problem.queries)),
    }
    return Launch(
        "_append_attention_kernel",
        tuple(arguments),
        split_grid(problem, tiling),
        (*absent, *constants.items()),
        tiling.warps,
        tiling.stages,
    )
