"""The device functions by which a template of attention becomes the kernel of one mask and one score.

They are what `fxopt.kernels.example_functions` shows: each takes the indices of a tile and, behind them, all
that is captured.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import sympy
import torch
from sympy.core.function import AppliedUndef
from sympy.logic.boolalg import Boolean

from fxopt.codegen.attention_bounds import Span, bounds_function
from fxopt.codegen.attention_program import FLOOR_DIV, Capture, TritonText, captured_arguments, short_type
from fxopt.codegen.attention_spec import LOG2E, Spec
from fxopt.codegen.helpers import HELPERS
from fxopt.codegen.kernel_file import Argument
from fxopt.ir.ops.masking import LOWEST_SHARE

_INDICES = "b, h, q, k, columns"
RANDOM_BITS = 24  # of a number that decides whether a weight is dropped


def live_function(formula: Boolean, captures: Sequence[Capture]) -> str:
    """``is_live(b, h, q, k, columns, captured)``: where keys take part, int1.

    Raises:
        Unsupported: the formula has what is not covered.
    """
    return _function("is_live", _INDICES, TritonText(captures).condition(formula))


def score_function(result: sympy.Expr, captures: Sequence[Capture]) -> str:
    """``scored(s, b, h, q, k, columns, captured)``: what becomes of a scaled score, float32.

    Raises:
        Unsupported: the formula has what is not covered.
    """
    return _function("scored", f"s, {_INDICES}", TritonText(captures).number(result))


def _function(name: str, parameters: str, result: str) -> str:
    return _inline(f"{name}({parameters}, captured)", result)


def _inline(head: str, result: str) -> str:
    return f"@triton.jit\ndef {head}:\n    return {result}\n"


def _function_of_learned(name: str, parameters: str, results: Mapping[int, str]) -> str:
    """A function whose constant `LEARNED` says of which captured tensor."""
    lines = [f"@triton.jit\ndef {name}({parameters}, LEARNED: tl.constexpr, captured):", "    found = k * 0"]
    for place, result in results.items():
        lines += [f"    if LEARNED == {place}:", f"        found = {result}"]
    return "\n".join([*lines, "    return found\n"])


def forward_functions(spec: Spec) -> str:
    """All that the template of the forward calls."""
    return "\n\n".join(
        [
            live_function(spec.mask.live, spec.captures),
            score_function(spec.score.result, spec.captures),
            _bounds("columns_of", spec.columns, spec),
            *_start_of_rows(spec),
            _dropout(spec),
            *_strides(spec),
        ]
    )


def backward_functions(spec: Spec, learned: Mapping[int, tuple[Any, Any]]) -> str:
    """All that the templates of the backward call.

    Args:
        learned: the entry, and its index where it is one of a table, that is read of each captured tensor
            whose gradient is wanted; by the place of the tensor.
    """
    text = TritonText(spec.captures)
    growth = spec.score.sensitivities() if learned else {}
    sensitivities = {place: text.number(growth[access]) for place, (access, _) in learned.items()}
    entries = {place: text.integer(entry) for place, (_, entry) in learned.items()}
    return "\n\n".join(
        [
            live_function(spec.mask.live, spec.captures),
            score_function(spec.score.result, spec.captures),
            _slope(spec, text),
            _function_of_learned("learned", f"s, {_INDICES}", sensitivities),
            _function_of_learned("entry_of", _INDICES, entries),
            _stopped(spec),
            _bounds("columns_of", spec.columns, spec),
            _bounds("rows_of", spec.rows, spec),
            _dropout(spec),
            *_strides(spec),
        ]
    )


def extra_arguments(spec: Spec) -> tuple[Argument, ...]:
    """What stands for ``captured`` in the templates."""
    found = captured_arguments(spec.captures, spec.sizes)
    if spec.sinks is not None:
        found = (*found, Argument("sinks_ptr", f"*{short_type(spec.sinks)}"))
    return (*found, Argument("seed_ptr", "*i64")) if spec.dropout_p else found


def _slope(spec: Spec, text: TritonText) -> str:
    """The gradient behind the score program becomes that before it."""
    slope = spec.score.slope
    if slope == 1:
        result = "grad"
    else:
        result = f"grad * ({text.number(slope)})"
        selected = [each for each in slope.atoms(AppliedUndef) if text.is_truth(each)]
        if selected:  # no gradient, where the other scores of a row make it NaN too
            result = f"tl.where(({text.number(slope)}) == 0.0, 0.0, {result})"
    return _function("score_slope", f"grad, s, {_INDICES}", result)


def _stopped(spec: Spec) -> str:
    """A number that absorbs a score replaces it; that shows in rows of nothing else."""
    result = "grad"
    if spec.stops and spec.score.captures:
        lowest = LOWEST_SHARE * torch.finfo(torch.float32).min
        result = f"tl.where(s <= {lowest!r}, 0.0, grad)"
    return _function("stopped", f"grad, s, {_INDICES}", result)


def _start_of_rows(spec: Spec) -> tuple[str, str]:
    if spec.sinks is None:
        top, total = 'h.to(tl.float32) * 0 + float("-inf")', "h.to(tl.float32) * 0"
    else:
        top, total = "tl.load(sinks_ptr + h).to(tl.float32)", "h.to(tl.float32) * 0 + 1.0"
        top += f" * {LOG2E!r}" if spec.factor else ""
    return _function("initial_top", "h", top), _function("initial_total", "h", total)


def _dropout(spec: Spec) -> str:
    result = "weights"
    if spec.dropout_p:
        wide = "((b.to(tl.int64) * heads + h) * rows + q) * columns + k"
        drawn = f"uniform(tl.load(seed_ptr), {wide}, {RANDOM_BITS})"
        kept = 1.0 / (1.0 - spec.dropout_p) if spec.dropout_p < 1.0 else 0.0
        result = f"tl.where({drawn} >= {spec.dropout_p!r}, weights * {kept!r}, 0.0)"
    return _function("dropped", "weights, b, h, q, k, heads, rows, columns", result)


def _strides(spec: Spec) -> tuple[str, str]:
    """What divides strides is a factor of them, which the compiler sees. Within a tile 32 bits are enough for
    most, numbers of which a thread holds several."""
    known = spec.alignment
    stride = f"stride // {known} * {known}" if known > 1 else "stride"
    step = "row.to(tl.int64) * stride" if spec.far else "(row * stride).to(tl.int32)"
    return _inline("aligned(stride)", stride), _inline("within_tile(row, stride)", step)


def _bounds(name: str, found: Sequence[Span], spec: Spec) -> str:
    return bounds_function(name, found, TritonText(spec.captures))


def with_helpers(text: str) -> str:
    """The text behind the device functions that it calls."""
    named = ("tanh", "uniform", "rint", "nearest_e4m3")
    helpers = [HELPERS[name] for name in named if f"{name}(" in text]
    helpers += [FLOOR_DIV] if "floor_div(" in text else []
    return "\n\n".join([*helpers, text])
