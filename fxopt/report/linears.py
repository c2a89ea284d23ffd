"""Linear layers in the report: what their weights are stored as, and how large the model is by that."""

from __future__ import annotations

from collections.abc import Iterable

from fxopt.ir.linear_notes import LinearNote, LinearNotes
from fxopt.report.record import GraphRecord


def linears_of(graphs: Iterable[GraphRecord]) -> LinearNotes:
    """The layers of all graphs, each once: a model may have several graphs of the same layers."""
    found: dict[str, LinearNote] = {}
    for record in graphs:
        for note in record.linears:
            if note.name not in found or note.is_quantized:
                found[note.name] = note
    return LinearNotes(found.values())


def grouped(notes: LinearNotes) -> list[tuple[str, int, int, int, str]]:
    """(outcome, layers, bytes before, bytes after, of the layers' decibels the least and the largest)."""
    groups: dict[str, list[LinearNote]] = {}
    for note in notes:
        outcome = f"{note.format} by {note.route}" if note.is_quantized else f"dense: {note.reason}"
        groups.setdefault(outcome, []).append(note)
    return [
        (
            outcome,
            len(same),
            sum(note.bytes_before for note in same),
            sum(note.bytes_after for note in same),
            _range([note.decibels for note in same if note.decibels is not None]),
        )
        for outcome, same in groups.items()
    ]


def _range(decibels: list[float]) -> str:
    if not decibels:
        return ""
    least, most = f"{min(decibels):.1f}", f"{max(decibels):.1f}"
    return least if least == most else f"{least} to {most}"
