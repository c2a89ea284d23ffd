"""How far a result is from float64, and whether that is as close as eager's.

The rule is the one of the tests: the error of a compiled result against float64 is at most twice that of
eager, plus one unit in the last place.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch.overrides import TorchFunctionMode
from torch.utils import _pytree as pytree

_LOWER = frozenset({torch.float32, torch.float16, torch.bfloat16})
_TO_LOWER = frozenset({torch.Tensor.float, torch.Tensor.half, torch.Tensor.bfloat16})


class _KeepDouble(TorchFunctionMode):
    """A model that computes its softmax or norm in float32, whatever it is given, computes it in float64."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in _TO_LOWER:
            return args[0].double()
        return func(
            *(_double(argument) for argument in args),
            **{name: _double(argument) for name, argument in (kwargs or {}).items()},
        )


def _double(argument: Any) -> Any:
    return torch.float64 if isinstance(argument, torch.dtype) and argument in _LOWER else argument


@contextmanager
def float64_everywhere() -> Iterator[None]:
    """Inside, every float dtype that code names is float64."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    try:
        with _KeepDouble():
            yield
    finally:
        torch.set_default_dtype(before)


def floating(tree: Any) -> list[torch.Tensor]:
    """The floating tensors of a result, in order."""
    leaves = pytree.tree_leaves(tree)
    return [leaf.detach() for leaf in leaves if isinstance(leaf, torch.Tensor) and leaf.is_floating_point()]


def max_error(result: Any, reference: Any) -> float:
    """The largest absolute difference between two results; infinite when their shapes or NaNs differ.

    Entries beyond float32's range in the reference (mask fills) are not compared.
    """
    ours, theirs = floating(result), floating(reference)
    if [t.shape for t in ours] != [t.shape for t in theirs]:
        return math.inf
    return max((_difference(a, b) for a, b in zip(ours, theirs, strict=True)), default=0.0)


def _difference(ours: torch.Tensor, reference: torch.Tensor) -> float:
    ours, reference = ours.double().to(reference.device), reference.double()
    comparable = reference.abs() < 1e30
    if bool((ours.isnan() & comparable).any()):
        return math.inf
    difference = (ours - reference)[comparable]
    return float(difference.abs().max()) if difference.numel() else 0.0


def comparable(eager: Any, reference: Any) -> bool:
    """Whether both compute the same thing: more than half of the dtype's digits agree."""
    for low, exact in zip(floating(eager), floating(reference), strict=True):
        finite = exact.double().abs()
        finite = finite[finite < 1e30]
        largest = float(finite.max()) if finite.numel() else 0.0
        if _difference(low, exact) > math.sqrt(torch.finfo(low.dtype).eps) * largest:
            return False
    return True


def dashboard_passes(candidate: Any, eager: Any, reference: Any, *, training: bool) -> bool:
    """The rule by which PyTorch's performance dashboard says that a compiled model is right.

    Close to eager by a tolerance, or else not much further from float64 than eager: the root mean square of
    the error is compared tensor by tensor. Tolerances are those of the dashboard's Hugging Face suite
    (benchmarks/dynamo/huggingface.py of PyTorch), the rule is `same` of torch itself.
    """
    from torch._dynamo.utils import same

    ours, theirs, exact = floating(candidate), floating(eager), floating(reference)
    if not len(ours) == len(theirs) == len(exact):
        return False
    tolerance = 1e-2 if training else 1e-3
    return bool(same(theirs, ours, exact, tol=tolerance, equal_nan=True, log_error=_ignore))


def _ignore(*_: Any) -> None:
    """The verdict says it all."""


def allowed_error(eager: Any, reference: Any) -> float:
    """Twice eager's error plus one unit in the last place at the largest entry."""
    unit = 0.0
    for low, exact in zip(floating(eager), floating(reference), strict=True):
        finite = exact.double().abs()
        finite = finite[finite < 1e30]
        if finite.numel() and float(finite.max()) > 0:
            unit = max(unit, torch.finfo(low.dtype).eps * 2.0 ** math.floor(math.log2(float(finite.max()))))
    return 2.0 * max_error(eager, reference) + unit
