"""Small kernels that need nothing of each other and run over the same elements: they can be one launch.

What such a kernel moves takes no longer than its launch, so that one launch for several saves time wherever
launches follow each other. That they are small also bounds what is kept for longer because one of them waits
for the inputs of another.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import sympy
import torch
from torch import fx

from fxopt.codegen.indexing import product
from fxopt.codegen.loops import loop_of
from fxopt.codegen.price import hinted
from fxopt.codegen.product_operands import in_kernel
from fxopt.codegen.region import Region, are_numbers, make_region, outputs_of, stands_alone
from fxopt.codegen.view_index import view_base
from fxopt.ir.cost import bytes_of, tensors_of
from fxopt.ir.target import launch_bytes

NEAR = 4  # kernels of the same loop, the last ones, that another is tried with
LONGEST_ROW = 1024  # elements that are reduced: rows of several kernels are in registers at once


@dataclass(frozen=True)
class SmallLoop:
    """What kernels must have in common: the device, the elements that they run over, in which order."""

    device: torch.device
    sizes: tuple[sympy.Expr, ...]
    axes: tuple[tuple[str, bool], ...]


def small_loop(members: Sequence[fx.Node]) -> SmallLoop | None:
    """The loop of `members` if they are a kernel, and it moves less than a launch takes.

    Raises:
        CannotEmit: they are no loop nest.
    """
    alone = len(members) == 1 and not stands_alone(members[0])
    outputs = outputs_of(members)
    if alone or not outputs or are_numbers(members) or any(map(in_kernel, members)):
        return None
    read = {view_base(arg) for node in members for arg in node.all_input_nodes} - set(members)
    moved = sum(bytes_of(value) for node in (*read, *outputs) for value in tensors_of(node))
    loop = loop_of(members, outputs)
    columns = product(axis.size for axis in loop.axes if axis.reduced)
    if moved > launch_bytes() or not columns.is_number or columns > LONGEST_ROW:
        return None
    axes = tuple((str(axis.symbol), axis.reduced) for axis in loop.axes)
    return SmallLoop(tensors_of(members[0])[0].device, loop.sizes, axes)


@dataclass(frozen=True)
class Joined:
    """What was won: how many kernels there were, and their bytes, at the sizes of tracing."""

    launches: int
    before: int
    after: int

    def __str__(self) -> str:
        return (
            f"{self.launches} kernels that need nothing of each other: "
            f"launches {self.launches} -> 1, bytes {self.before} -> {self.after}"
        )


def joined(
    first: Sequence[fx.Node], second: Sequence[fx.Node], both: Sequence[fx.Node], known: Joined | None
) -> Joined | None:
    """What one kernel for both saves; None where it moves more. `known`: of `first`, if it was joined before.

    Raises:
        CannotEmit: they are not one loop nest.
    """
    apart = [_moved(make_region(one)) for one in (first, second)]
    after = _moved(make_region(both))
    if after > sum(apart):
        return None
    launches, before = (known.launches, known.before) if known else (1, apart[0])
    return Joined(launches + 1, before + apart[1], after)


def _moved(region: Region) -> int:
    return hinted(region.fused.bytes, (*region.outputs, *(one.tensor for one in region.body.loads)))
