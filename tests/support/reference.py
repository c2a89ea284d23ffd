"""Running a model in float64, including the parts that name a lower precision themselves.

`model.double()` alone is no reference: many models compute their softmax, norms and rotary angles under a
written `.float()` or `dtype=torch.float32`, so the "exact" result would carry errors as large as those it
should judge. `reference_mode` reads every such dtype as float64. Values rounded *before* the run (weights,
buffers, inputs) are kept as they are: both sides start from the same numbers.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch.overrides import TorchFunctionMode

from support.trees import map_tensors

_NARROW = frozenset({torch.float32, torch.float16, torch.bfloat16})
_CASTS = frozenset({torch.Tensor.float, torch.Tensor.half, torch.Tensor.bfloat16})


class _WidenDtypes(TorchFunctionMode):
    """Replaces float32, float16 and bfloat16 by float64 in the arguments of every torch call."""

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Any,  # noqa: ANN401  (torch's signature)
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:  # noqa: ANN401
        if func in _CASTS:
            return args[0].double()
        wide_args = tuple(_widen(arg) for arg in args)
        wide_kwargs = {name: _widen(value) for name, value in (kwargs or {}).items()}
        return func(*wide_args, **wide_kwargs)


def _widen(argument: object) -> object:
    return torch.float64 if isinstance(argument, torch.dtype) and argument in _NARROW else argument


@contextmanager
def reference_mode() -> Iterator[None]:
    """Inside, floating computations on float64 tensors stay float64 whatever dtype the code names."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    try:
        with _WidenDtypes():
            yield
    finally:
        torch.set_default_dtype(before)


def to_double(tree: Any) -> Any:  # noqa: ANN401  (same structure out as in)
    """A copy with floating tensors in float64 (as leaves that keep `requires_grad`), all others cloned."""
    return map_tensors(_doubled, tree)


def _doubled(tensor: torch.Tensor) -> torch.Tensor:
    if not tensor.is_floating_point():
        return tensor.detach().clone()
    return tensor.detach().to(torch.float64, copy=True).requires_grad_(tensor.requires_grad)


def double_model(model: torch.nn.Module) -> torch.nn.Module:
    """A deep copy with every parameter and buffer in float64, same values."""
    wide = copy.deepcopy(model).double()
    for module in wide.modules():
        config: Any = getattr(module, "config", None)
        # The grouped matmul knows no float64; the batched one is the same sum over experts.
        if getattr(config, "_experts_implementation", None) == "grouped_mm":
            config._experts_implementation = "batched_mm"
    return wide


def run_reference64(model: Callable[..., Any], inputs: Mapping[str, Any] | tuple[Any, ...]) -> Any:  # noqa: ANN401
    """`model(**inputs)` (or `model(*inputs)`) in float64; neither the model nor the inputs are touched.

    A module is deep-copied. A plain function is called as it is, so weights that it closes over must be
    float64 already: better pass them as inputs.
    """
    function = double_model(model) if isinstance(model, torch.nn.Module) else model
    with reference_mode():
        wide = to_double(inputs)
        return function(**wide) if isinstance(wide, dict) else function(*wide)
