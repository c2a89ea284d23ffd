"""Which products with many rows become kernels: those that are known, or priced, to be a win.

The vendor's library multiplies large matrices close to what the matrix units can do. A kernel with a norm in
front of a product or an activation behind it saves the memory traffic between them, and may lose more than
that in the product itself. So such products are left to the library, unless the kernel was measured to be
faster, or, where nothing is measured, the model below takes it for faster by a margin.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from torch import fx

from fxopt.codegen.configurations import predicted
from fxopt.codegen.kernel_file import KernelFile
from fxopt.codegen.matmul import MatmulBody
from fxopt.codegen.price import hinted
from fxopt.codegen.product_operands import CHOSEN, flops_of_product, is_large
from fxopt.codegen.region import Region, can_emit
from fxopt.codegen.view_index import view_base
from fxopt.ir.cost import bytes_of
from fxopt.ir.target import Target

LIBRARY, OURS = 0.8, 0.6  # shares of the matrix units' peak: what a library is taken to reach, and a kernel
MARGIN = 0.95  # a kernel that is not faster by a twentieth is no win
LAUNCH = 2e-6  # seconds


@dataclass(frozen=True)
class Comparison:
    """Seconds in one kernel, and as a library's products with one kernel for all around them."""

    kernel: float
    library: float

    @property
    def wins(self) -> bool:
        return self.kernel < MARGIN * self.library

    def __str__(self) -> str:
        return f"{self.kernel * 1e6:.1f} us in one kernel, {self.library * 1e6:.1f} us around a library's"


def candidates(graph: fx.Graph, devices: frozenset[str]) -> list[fx.Node]:
    """The products that could become kernels and do not without being chosen."""
    choose(graph, ())
    found = [node for node in graph.nodes if is_large(node)]
    choose(graph, found)
    emitted = [node for node in found if can_emit(node, devices)]
    choose(graph, ())
    return emitted


def choose(graph: fx.Graph, products: Iterable[fx.Node]) -> None:
    """From now on `products`, and no others with many rows, may become parts of kernels of `graph`."""
    for node in graph.nodes:
        node.meta.pop(CHOSEN, None)
    for node in products:
        node.meta[CHOSEN] = True


def large_products(region: Region) -> list[fx.Node]:
    """Those of a region that it has because they were chosen."""
    return [node for node in region.members if is_large(node) and node.meta.get(CHOSEN)]


def compared(region: Region, kernel: KernelFile, target: Target) -> Comparison:
    """What the model says of `region` and its `kernel`, at the sizes of tracing."""
    inside, moved = frozenset(region.members), hinted(region.fused.bytes, region.members)
    peak, library, rest = 0.0, 0.0, moved
    assert isinstance(region.body, MatmulBody)
    on_matrix_units = region.body.on_matrix_units
    for node in large_products(region):
        arithmetic = flops_of_product(node) / target.rate(region.body.dtype, tensor_cores=on_matrix_units)
        operands = [view_base(one) for one in node.all_input_nodes]
        stored = bytes_of(node.meta["val"])
        read = {one: bytes_of(one.meta["val"]) for one in operands}
        library += max((stored + sum(read.values())) / target.bandwidth, arithmetic / LIBRARY) + LAUNCH
        peak += arithmetic
        # The rest reads the product, writes what it has made for it, and reads nothing that only this needs.
        rest += stored + sum(size if one in inside else -size for one, size in read.items())
    ours = max(predicted(kernel, target), peak / OURS)
    return Comparison(ours, library + max(0, rest) / target.bandwidth + LAUNCH)
