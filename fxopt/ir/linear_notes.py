"""What became of each linear layer: one note a layer, and their sum."""

from __future__ import annotations

from dataclasses import dataclass

# The route of a layer that nobody has quantized.
DENSE = "dense"


@dataclass(frozen=True)
class LinearNote:
    """One linear layer.

    Attributes:
        name: of the module, with dots.
        format: what its weight is stored as, with groups; empty when it is dense.
        source: what the layer was: a class, or a parameter.
        route: what computes it; `DENSE`, and "its library" where that has quantized it.
        bytes_before: of the dense weight. bytes_after: of what is kept.
        decibels: signal-to-noise ratio of the weight; None when it is dense, or was quantized before.
        reason: why it is not quantized by fxopt's product, or nothing.
    """

    name: str
    format: str
    source: str
    route: str
    bytes_before: int
    bytes_after: int
    decibels: float | None
    reason: str

    @property
    def is_quantized(self) -> bool:
        return not self.reason


class LinearNotes(list[LinearNote]):
    """All linear layers of a model, or of a graph."""

    @property
    def bytes_before(self) -> int:
        return sum(note.bytes_before for note in self)

    @property
    def bytes_after(self) -> int:
        return sum(note.bytes_after for note in self)

    @property
    def summary(self) -> str:
        """``28 of 29 linear layers quantized, 88.1 -> 24.3 MB``."""
        count = sum(note.is_quantized for note in self)
        sizes = f"{self.bytes_before / 1e6:.1f} -> {self.bytes_after / 1e6:.1f} MB"
        return f"{count} of {len(self)} linear layers quantized, {sizes}"

    def __str__(self) -> str:
        return "\n".join([self.summary, *map(_line, self)])


def _line(note: LinearNote) -> str:
    sizes = f"{note.bytes_before} -> {note.bytes_after} B"
    if not note.is_quantized:
        return f"  {note.name}: {note.bytes_before} B, {note.route}: {note.reason}"
    lost = "" if note.decibels is None else f", {note.decibels:.1f} dB"
    return f"  {note.name}: {note.format}, {note.source} by {note.route}, {sizes}{lost}"
