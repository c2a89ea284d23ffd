"""How many references to an input a compiled call has itself, so that all others can be told from them.

Dynamo's code loads an input from where it lives, passes it through some wrappers, and may keep it in a local
variable. How many references that makes depends on the versions of Python and torch: it is measured, once in
a process, on a call in which nobody else has the input.
"""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable, Sequence
from sys import getrefcount
from typing import Any

import torch
from torch import fx


class _Holder:
    def __init__(self) -> None:
        self.tensor = torch.zeros(1, 3)

    def grow(self, new: torch.Tensor) -> torch.Tensor:
        self.tensor = torch.cat([self.tensor, new], 1)
        return self.tensor.sum()


def references(inputs: Sequence[Any], places: Sequence[int]) -> list[int]:
    """`getrefcount` of inputs of a compiled call. `inputs` are the ``*inputs`` of the called function."""
    return [getrefcount(inputs[place]) for place in places]


@functools.cache
def references_of_a_call(measured: bool) -> int:
    """`references` to an input that is the attribute of one object and held by nobody else.

    Args:
        measured: a size, stride or offset of the tensor is an input, too; then Dynamo keeps the tensor in a
            local variable.
    """
    if not getattr(sys, "_is_gil_enabled", lambda: True)():
        return 0  # without the interpreter's lock, counts are not exact
    found: list[int] = []

    def backend(gm: fx.GraphModule, example_inputs: Sequence[Any]) -> Callable[..., Any]:
        names = [node.name for node in gm.graph.find_nodes(op="placeholder")]
        places = [place for place, name in enumerate(names) if "tensor" in name]

        def run(*inputs: Any) -> Any:
            found[:] = references(inputs, places)
            return gm.forward(*inputs)

        return run

    grow = torch.compile(_Holder.grow, backend=backend, dynamic=measured)
    holder, new = _Holder(), torch.zeros(1, 2)
    for _ in range(2):  # compiling holds more of them
        holder.tensor = torch.zeros(1, 3)
        grow(holder, new)
    return min(found, default=0)
