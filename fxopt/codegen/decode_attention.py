"""``fxopt::cached_attention`` as a kernel's file: `fxopt.kernels.decode_attention`, specialised."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import sympy
import torch

from fxopt.codegen.attention_bounds import EXTENT, FIRST, LAST, Span, spans
from fxopt.codegen.attention_functions import live_function, score_function, with_helpers
from fxopt.codegen.attention_program import TritonText, captured_arguments, with_captured
from fxopt.codegen.attention_spec import alignment
from fxopt.codegen.decode_problem import Problem, Tiling, tiling_of, tilings_beside
from fxopt.codegen.decode_reference import example_text, reference_text
from fxopt.codegen.kernel_file import About, Argument, KernelFile, Launch, Output, Parameter
from fxopt.codegen.kernels import POINTERS
from fxopt.codegen.price import multiplied
from fxopt.codegen.tile_sizes import power_of_two
from fxopt.ir.cost import hint
from fxopt.ir.formula import K
from fxopt.ir.ops.masking import MEAN, NAN, NONE
from fxopt.ir.target import Target

NAME = "decode_attention"
_KERNELS = Path(__file__).parent.parent / "kernels"
_MARK = "# --- All below is copied into kernels' files as it stands."
# From which architecture on instructions convert float8.
CONVERTS_FLOAT8 = 89
_POINTERS = POINTERS | {torch.float8_e4m3fn: "*u8", torch.float8_e5m2: "*u8"}
# Parts of the sums that one step of the second launch reads.
PARTS_A_STEP = 8

_WIDEN = '''@triton.jit
def widen(x, dtype: tl.constexpr):
    """{doc}"""
    {body}
    return x.to(dtype)
'''
_PLAIN = ("Stored numbers in the dtype of the computation.", "")
_E5M2 = (
    "float8_e5m2, by its bits: the upper half of a float16.",
    "x = (x.to(tl.uint16) << 8).to(tl.float16, bitcast=True)",
)
_E4M3 = ("float8_e4m3fn, by the instruction for it.", "x = x.to(tl.float8e4nv, bitcast=True)")
_E4M3_BITS = (
    "float8_e4m3fn, by its bits: in their places in a float16, whose exponents are 8 larger.",
    "bits = ((x.to(tl.uint16) & 0x80) << 8) | ((x.to(tl.uint16) & 0x7F) << 7)\n"
    "    wide = bits.to(tl.float16, bitcast=True).to(tl.float32) * 256.0\n"
    '    x = tl.where((x & 0x7F) == 0x7F, float("nan"), wide)',
)


def decode_kernel(problem: Problem, target: Target | None) -> KernelFile:
    """The kernel of a problem.

    Raises:
        Unsupported: a formula has what kernels do not cover.
    """
    tiling = tiling_of(problem, target)
    return with_others(functools.partial(_kernel, problem, target), tiling)


def with_others(kernel_of: Callable[[Tiling], KernelFile], tiling: Tiling) -> KernelFile:
    """The kernel of a tiling, with those beside it as alternatives."""
    others = tuple(kernel_of(one) for one in tilings_beside(tiling))
    return replace(kernel_of(tiling), alternatives=others)


def _kernel(problem: Problem, target: Target | None, tiling: Tiling) -> KernelFile:
    names = [one.name for one in captured_arguments(problem.captured, problem.size_names)]
    functions = "\n\n".join((widen_function(problem, target), *formula_functions(problem)))
    text = with_helpers(with_captured(f"{functions}\n\n{template(NAME)}", names))
    given = parameters(problem)
    return KernelFile(
        name=NAME,
        parameters=given,
        jit=text,
        launches=(_split_launch(problem, tiling), total_launch(problem, tiling)),
        outputs=(result(problem),),
        reference=reference_text(problem, [one.name for one in given]),
        example_inputs=example_text(problem, [one.name for one in given]),
        sizes=tuple(sizes(problem)),
        scratch=scratch(problem, tiling),
        modelled=False,
        about=about(problem, tiling, "attention of few queries over a cache, in parts"),
    )


def template(name: str) -> str:
    """The functions of a template."""
    return (_KERNELS / f"{name}.py").read_text().split(_MARK, 1)[1].strip("\n")


def parameters(problem: Problem) -> tuple[Parameter, ...]:
    """Of `launch`: the tensors, those of formulas, and their sizes."""
    captured = [one.name for one in problem.captured]
    tensors = [Parameter(name) for name in (*problem.tensors, *captured)]
    return (*tensors, *(Parameter(name, "int") for name in problem.size_names))


def sizes(problem: Problem) -> Iterator[tuple[str, str]]:
    yield "batch", "query.shape[0]"
    yield "columns", "key.shape[2]"


def result(problem: Problem) -> Output:
    """(B, Hq, Sq, Dv), sequences before heads in memory."""
    heads, queries = problem.group * problem.kv_heads, problem.queries
    width = int(problem.tensors["value"].shape[3])
    strides = (heads * queries * width, width, heads * width, 1)
    shape = ("batch", *map(str, (heads, queries, width)))
    return Output("out", shape, "query.dtype", tuple(map(str, strides)))


def scratch(problem: Problem, tiling: Tiling) -> tuple[Output, ...]:
    """The sums of all parts."""
    parts = (f"batch * {problem.kv_heads * tiling.splits}", str(problem.rows))
    width = str(int(problem.tensors["value"].shape[3]))
    return (
        Output("partial", (*parts, width), "torch.float32"),
        Output("sums", (*parts, "2"), "torch.float32"),
    )


def widen_function(problem: Problem, target: Target | None) -> str:
    """How stored numbers are converted."""
    stored = problem.tensors["key"].dtype
    doc, body = _PLAIN
    if problem.native:
        return _WIDEN.format(doc=doc, body=body).replace("    \n", "")
    if stored is torch.float8_e5m2:
        doc, body = _E5M2
    elif stored is torch.float8_e4m3fn:
        converts = target is not None and target.arch >= CONVERTS_FLOAT8
        doc, body = _E4M3 if converts else _E4M3_BITS
    return _WIDEN.format(doc=doc, body=body).replace("    \n", "")


def formula_functions(problem: Problem) -> tuple[str, ...]:
    """`is_live`, `scored` and `live_span` of the problem."""
    return (
        live_function(problem.live, problem.captured),
        score_function(problem.score.result, problem.captured),
        span_function(spans(problem.live, K), TritonText(problem.captured)),
    )


def span_function(found: Sequence[Span], text: TritonText) -> str:
    """``live_span(b, last, extent, captured)`` of the pieces of the keys that queries 0 to `last` may see."""
    lines = ["@triton.jit\ndef live_span(b, last, extent, captured):"]
    for place, span in enumerate(found):
        low = functools.reduce(lambda a, each: f"tl.maximum({a}, {_text(each, text)})", span.lows, "0")
        high = functools.reduce(lambda a, each: f"tl.minimum({a}, {_text(each, text)})", span.highs, "extent")
        for each in span.live_if:
            high = f"tl.where({_text(each, text)} > 0, {high}, 0)"
        lines += [f"    low{place}, high{place} = {low}, {high}"]
    if len(found) == 1:
        return "\n".join([*lines, "    return low0, high0"]) + "\n"
    some = "tl.where(high0 > low0, low0, extent)", "tl.where(high1 > low1, low1, extent)"
    lines.append(f"    return tl.minimum({', '.join(some)}), tl.maximum(high0, high1)")
    return "\n".join(lines) + "\n"


def _text(number: Any, text: TritonText) -> str:
    moved = sympy.expand(number).xreplace({FIRST: sympy.Integer(0)})
    return text.integer(moved.xreplace({LAST: sympy.Symbol("last"), EXTENT: sympy.Symbol("extent")}))


def pointer(problem: Problem, name: str) -> Argument:
    """Float8 is bytes for most kernels, which know what they stand for."""
    dtype = problem.tensors[name].dtype
    if problem.native and dtype is torch.float8_e4m3fn:
        return Argument(f"{name}_ptr", "*fp8e4nv", name)
    value = f"{name}.view(torch.uint8)" if _POINTERS[dtype] == "*u8" and dtype is not torch.uint8 else name
    return Argument(f"{name}_ptr", _POINTERS[dtype], value)


def strides(problem: Problem, name: str, short: str, letters: str) -> Iterator[Argument]:
    """Those of the first three dimensions; 0 along those that are broadcast."""
    for dim, letter in enumerate(letters):
        size = problem.tensors[name].shape[dim]
        broadcast = isinstance(size, int) and size == 1
        value = "0" if broadcast else f"{name}.stride({dim})"
        yield Argument(f"{short}_stride_{letter}", "i64", value, aligned=False)


_SHORT = {
    "query": ("q", "bhs"), "key": ("k", "bhk"), "value": ("v", "bhk"), "key_scale": ("k_scale", "bhk"),
    "value_scale": ("v_scale", "bhk"), "query_rest": ("q_rest", "bhs"), "key_rest": ("k_rest", "bhk"),
    "k_new": ("k_new", "bhs"), "v_new": ("v_new", "bhs"), "cos": ("cos", "bs"), "sin": ("sin", "bs"),
}  # fmt: skip
_OPERANDS = ("query", "key", "value", "key_scale", "value_scale", "query_rest", "key_rest")


def operands(problem: Problem, names: Sequence[str]) -> tuple[list[Argument], list[tuple[str, int]]]:
    """Pointers and strides of tensors, and 0 in the place of those that are not given."""
    arguments, absent = list[Argument](), list[tuple[str, int]]()
    for name in names:
        short, letters = _SHORT[name]
        if problem.has(name):
            found = pointer(problem, name)
            arguments.append(Argument(f"{short}_ptr", found.type, found.expression))
            arguments += strides(problem, name, short, letters)
        else:
            absent += [(f"{short}_ptr", 0), *((f"{short}_stride_{letter}", 0) for letter in letters)]
    return arguments, absent


def _split_launch(problem: Problem, tiling: Tiling) -> Launch:
    """The sums of all parts."""
    arguments, absent = operands(problem, _OPERANDS)
    if problem.k_tail(tiling):
        arguments, absent = _with_tail(arguments, absent, tiling.k.parts[0])
    if problem.has("span"):
        arguments.append(Argument("span_ptr", "*i64", "span"))
    else:
        absent.append(("span_ptr", 0))
    arguments += [Argument("partial_ptr", "*fp32"), Argument("sums_ptr", "*fp32")]
    arguments.append(Argument("columns", "i32", aligned=False))
    arguments += captured_arguments(problem.captured, problem.size_names)
    constants = {
        **split_constants(problem, tiling),
        "SPAN": problem.has("span"),
        "QUANTIZED": problem.has("key_scale"),
        "SHARED": problem.shared,
    }
    return Launch(
        "_decode_attention_kernel",
        tuple(arguments),
        split_grid(problem, tiling),
        (*absent, *constants.items()),
        tiling.warps,
        tiling.stages,
    )


def split_grid(problem: Problem, tiling: Tiling) -> tuple[str]:
    """A program for each part of the keys of each head, and each tile of the rows that share it."""
    return (f"batch * {problem.kv_heads * tiling.splits} * triton.cdiv({problem.rows}, BLOCK_M)",)


def split_constants(problem: Problem, tiling: Tiling) -> dict[str, int | float]:
    """What templates whose programs sum up parts have of a problem and of its tiles."""
    tensors = problem.tensors
    keys = [tensors[name] for name in ("key", "key_rest") if problem.has(name)]
    return {
        "SCALE": float(problem.scale),
        "KV_HEADS": problem.kv_heads,
        "GROUP": problem.group,
        "QUERIES": problem.queries,
        "K_ALIGN": alignment(keys),
        "V_ALIGN": alignment([tensors["value"]]),
        "V_WIDTH": int(tensors["value"].shape[3]),
        "UNIFORM": problem.is_uniform,
        "WIDTH_0": tiling.k.parts[0],
        "BLOCK_0": tiling.k.blocks[0],
        "WIDTH_1": tiling.k.parts[1],
        "BLOCK_1": tiling.k.blocks[1],
        "V_BLOCK_0": tiling.v.blocks[0],
        "V_BLOCK_1": max(1, tiling.v.blocks[1]),
        "SPLITS": tiling.splits,
        "BLOCK_M": tiling.rows,
        "BLOCK_N": tiling.keys,
    }


def _with_tail(
    arguments: list[Argument], absent: list[tuple[str, int]], first: int
) -> tuple[list[Argument], list[tuple[str, int]]]:
    """The columns from `first` on of Q and K in the place of the tensors with the rest of them."""
    known = {one.name: one for one in arguments}
    tail = []
    for short in ("q", "k"):
        for name, one in known.items():
            if name == f"{short}_ptr":
                tail.append(Argument(f"{short}_rest_ptr", one.type, f"{one.expression}[..., {first}:]"))
            elif name.startswith(f"{short}_stride_"):
                tail.append(Argument(f"{short}_rest{name[1:]}", "i64", one.expression, aligned=False))
    named = {one.name for one in tail}
    return [*arguments, *tail], [one for one in absent if one[0] not in named]


def total_launch(problem: Problem, tiling: Tiling) -> Launch:
    """The result from the sums of all parts."""
    arguments, absent = operands(problem, ["value", "value_scale"])
    if problem.has("sinks"):
        arguments.append(Argument("sinks_ptr", _POINTERS[problem.tensors["sinks"].dtype], "sinks"))
    else:
        absent.append(("sinks_ptr", 0))
    arguments += [Argument("partial_ptr", "*fp32"), Argument("sums_ptr", "*fp32")]
    arguments += [
        Argument("out_ptr", _POINTERS[problem.query.dtype]),
        Argument("columns", "i32", aligned=False),
    ]
    width = int(problem.tensors["value"].shape[3])
    constants = {
        "KV_HEADS": problem.kv_heads,
        "GROUP": problem.group,
        "QUERIES": problem.queries,
        "V_WIDTH": width,
        "BLOCK_V": power_of_two(width),
        "SPLITS": tiling.splits,
        "BLOCK_SPLITS": min(PARTS_A_STEP, power_of_two(tiling.splits)),
        "SINKS": problem.has("sinks"),
        "DEAD_MEAN": problem.dead_rows in (MEAN, NONE),
        "DEAD_NAN": problem.dead_rows == NAN,
        "QUANTIZED": problem.has("value_scale"),
    }
    return Launch(
        "_decode_attention_total_kernel",
        tuple(arguments),
        (f"batch * {problem.kv_heads * problem.rows}",),
        (*absent, *constants.items()),
        num_warps=4,
        num_stages=2,
    )


def about(problem: Problem, tiling: Tiling, summary: str) -> About:
    """The head of the file; bytes are those of all keys that the cache has room for."""
    seen = [hint(size) for size in problem.tensors["key"].shape]
    row = _bytes_of_key(problem)
    moved = f"{row * problem.kv_heads} * batch * columns"
    widths = sum(tiling.k.parts) + int(problem.tensors["value"].shape[3])
    flops = f"{2 * problem.rows * problem.kv_heads * widths} * batch * columns"
    numbers = (
        seen[0] * seen[2] * row * problem.kv_heads,
        seen[0] * seen[2] * 2 * problem.rows * seen[1] * widths,
    )
    formulas = [f"keys that take part: {problem.mask}", f"scores: {problem.score}"]
    return About(
        summary=f"{summary}; {'; '.join(formulas)}",
        replaces=("fxopt::cached_attention",),
        shapes=tuple(
            f"{name}: {_POINTERS[each.dtype][1:]}{list(each.shape)}, strides {list(each.stride())}"
            for name, each in problem.tensors.items()
        ),
        configuration=tiling.why,
        moved=moved,
        flops=flops,
        seen=numbers,
        multiplied=multiplied(numbers[1], problem.query.dtype),
    )


def _bytes_of_key(problem: Problem) -> int:
    """That are read of one key, of each head."""
    names = ["key", "key_rest", *([] if problem.shared else ["value"])]
    held = [problem.tensors[name] for name in names if problem.has(name)]
    found = sum(int(each.shape[3]) * each.element_size() for each in held)
    scales = [problem.tensors[name] for name in ("key_scale", "value_scale") if problem.has(name)]
    return found + sum(each.element_size() for each in scales)
