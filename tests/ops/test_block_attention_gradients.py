"""Gradients of the body of ``fxopt::block_attention`` against finite differences in float64."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import pytest
import torch

from fxopt.ir.ops import register_ops
from support.attention_kernels import CASES, Case, operands_of, others_of

DOUBLE = torch.float64
# A row of NaN has no derivative. Scores that a number absorbs have one, though the mean of V stays the same.
NAMES = [name for name, case in CASES.items() if case.dead != "nan"]


def attention(case: Case, leaves: dict[str, torch.Tensor]) -> torch.Tensor:
    """The op's result for a case, of these tensors."""
    captures = [leaves[f"c{place}"] for place in range(len(case.captures))]
    given = (leaves["query"], leaves["key"], leaves["value"], leaves.get("sinks"), leaves.get("seed"))
    attributes: dict[str, Any] = {"mask": case.mask, "score": case.score, "scale": 1 / math.sqrt(case.width)}
    attributes |= {"dead_rows": case.dead, "stops": case.stops, "stopped": [], "wide_scores": False}
    op = torch.ops.fxopt.block_attention.default
    out: torch.Tensor = op(*given, captures, case.sizes, **attributes, dropout_p=case.dropout)[0]
    return out


def leaves_of(case: Case) -> tuple[dict[str, torch.Tensor], list[str]]:
    """All tensors of a case, and the names of those that get a gradient."""
    operands = zip(("query", "key", "value"), operands_of(case, DOUBLE), strict=True)
    others = others_of(case, DOUBLE)
    tensors = {**dict(operands), **{name: one for name, one in others.items() if not name.startswith("n")}}
    wanted = ["query", "key", "value", *(["sinks"] if case.sinks else []), *(f"c{at}" for at in case.learned)]
    return tensors, wanted


def is_right(case: Case, *, only: str = "", wrong: float = 1.0) -> bool:
    """Args: only: the tensor that counts, instead of all. wrong: a factor of the gradient."""
    case = replace(case, dead="zero") if case.dead == "mean" and not case.stops else case
    tensors, wanted = leaves_of(case)
    wanted = [only] if only else wanted
    given = [tensors[name].detach().clone().requires_grad_() for name in wanted]

    def attend(*leaves: torch.Tensor) -> torch.Tensor:
        out = attention(case, tensors | dict(zip(wanted, leaves, strict=True)))
        return out.detach() + (out - out.detach()) * wrong if wrong != 1.0 else out

    # Along random directions, for which torch multiplies `atol` by sums over all numbers of a tensor.
    return torch.autograd.gradcheck(attend, given, atol=1e-9, fast_mode=True, raise_exception=False)


@pytest.mark.parametrize("name", NAMES)
def test_gradients_are_those_of_finite_differences(name: str) -> None:
    register_ops()
    torch.manual_seed(0)
    assert is_right(CASES[name])


def test_a_wrong_gradient_is_seen() -> None:
    register_ops()
    assert is_right(CASES["few queries"], only="query")
    assert not is_right(CASES["few queries"], only="query", wrong=1.01)
