"""The device functions by which a template of attention becomes the kernel of one mask and one score."""

from __future__ import annotations

from collections.abc import Sequence

import sympy
from sympy.logic.boolalg import Boolean

from fxopt.codegen.attention_program import FLOOR_DIV, Capture, TritonText
from fxopt.codegen.helpers import HELPERS


def live_function(formula: Boolean, captures: Sequence[Capture]) -> str:
    """``is_live(b, h, q, k, columns, captured)``: where keys take part, int1.

    Raises:
        Unsupported: the formula has what is not covered.
    """
    return _function("is_live", "b, h, q, k, columns", TritonText(captures).condition(formula))


def score_function(result: sympy.Expr, captures: Sequence[Capture], name: str = "scored") -> str:
    """``scored(s, b, h, q, k, columns, captured)``: what becomes of a scaled score, float32.

    Raises:
        Unsupported: the formula has what is not covered.
    """
    return _function(name, "s, b, h, q, k, columns", TritonText(captures).number(result))


def _function(name: str, parameters: str, result: str) -> str:
    return f"@triton.jit\ndef {name}({parameters}, captured):\n    return {result}\n"


def with_helpers(text: str) -> str:
    """The text behind the device functions that it calls."""
    helpers = [HELPERS[name] for name in ("tanh", "uniform") if f"{name}(" in text]
    helpers += [FLOOR_DIV] if "floor_div(" in text else []
    return "\n\n".join([*helpers, text])
