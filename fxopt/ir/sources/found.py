"""A weight that another library has quantized, as it was recognised."""

from __future__ import annotations

from dataclasses import dataclass

from fxopt.ir.quantized_weight import QuantizedWeight


@dataclass(frozen=True, eq=False)
class Found:
    """What to compute instead of the library's product.

    Attributes:
        weight: in fxopt's layout.
        source: the library, and what it calls the weight.
        activation: how the library rounds what is multiplied with it, as `fxopt::qlinear` says it.
    """

    weight: QuantizedWeight
    source: str
    activation: str = ""

    def __str__(self) -> str:
        weight = self.weight
        rows, columns = weight.shape
        rounded = f", activations rounded to {self.activation}" if self.activation else ""
        groups = f"groups of {weight.group_size}, {weight.nbytes} bytes"
        return f"{self.source}: {weight.format.name} {rows} x {columns}, {groups}{rounded}"
