"""Other roundings of one computation: how far apart may two equally good runs of a model be?

Eager's error is one draw of a random quantity. For a small tensor, or one whose errors have a common cause,
one draw says little about its size: TorchInductor's own results exceed twice eager's error in some gradient
of nearly every model. Monte Carlo arithmetic (Parker, 1997) gives more draws: the same operators in the same
order, each result multiplied by 1 + d with a random |d| of at most half the dtype's epsilon, and rounded: the
standard model of what one rounding does. The spread is a property of the computation, not of one library.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map_only

# Their results are exact, whatever the rounding: copies, selections, constants.
_EXACT = frozenset(
    {
        "_to_copy", "_unsafe_view", "abs", "amax", "amin", "arange", "cat", "clamp", "clone",
        "constant_pad_nd", "copy", "embedding", "eye", "fill", "flip", "full", "full_like", "gather",
        "index", "index_put", "index_select", "masked_fill", "max", "maximum", "min", "minimum", "neg",
        "new_empty", "new_full", "new_ones", "new_zeros", "ones", "ones_like", "relu", "repeat", "roll",
        "scalar_tensor", "scatter", "select_backward", "slice_backward", "sort", "stack", "topk",
        "tril", "triu", "where", "zeros", "zeros_like",
    }
)  # fmt: skip


class PerturbedRounding(TorchDispatchMode):
    """Inside, some entries of each computed floating tensor move to a neighbouring number."""

    def __init__(self, seed: int) -> None:
        super().__init__()
        self._generator = torch.Generator().manual_seed(seed)

    def __torch_dispatch__(
        self,
        func: Any,
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        result = func(*args, **(kwargs or {}))
        if _is_exact(func):
            return result
        operands = [arg for arg in args if isinstance(arg, torch.Tensor) and torch.Tag.pointwise in func.tags]
        return tree_map_only(torch.Tensor, lambda tensor: self._moved(tensor, operands), result)

    def _moved(self, tensor: torch.Tensor, operands: list[torch.Tensor]) -> torch.Tensor:
        """The tensor, written over. What equals an operand (times 1, plus 0) was not rounded and stays."""
        if not tensor.is_floating_point() or tensor.numel() == 0:
            return tensor
        unit = torch.finfo(tensor.dtype).eps / 2
        noise = torch.rand(tensor.shape, generator=self._generator, dtype=torch.float64) * 2 - 1
        for operand in operands:
            noise.masked_fill_(tensor == operand, 0.0)
        return tensor.copy_(tensor.double() * (1 + unit * noise))


def _is_exact(func: Any) -> bool:
    """Views, writes, random numbers and selections: nothing is rounded, or it is not ours to move."""
    name = func._schema.name.split("::")[-1]
    return (
        func.namespace != "aten"
        or func.is_view
        or func._schema.is_mutable
        or torch.Tag.nondeterministic_seeded in func.tags
        or any(returned.alias_info is not None for returned in func._schema.returns)
        or name.startswith("empty")
        or name in _EXACT
    )


def perturbed(run: Callable[[], Any], count: int = 4) -> Callable[[], list[Any]]:
    """For `assert_closer`: makes `count` results of `run`, each under its own rounding.

    `run` is to do everything that is compared, the backward pass included.
    """
    return functools.partial(_perturbed, run, count)


def _perturbed(run: Callable[[], Any], count: int) -> list[Any]:
    results = []
    for seed in range(count):
        with PerturbedRounding(seed):
            results.append(run())
    return results
