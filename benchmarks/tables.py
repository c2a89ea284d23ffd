"""Tables of pages, in Markdown."""

from __future__ import annotations

from collections.abc import Iterable, Sequence


def table(names: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A table with these names of columns; each line ends with a line break."""
    return "".join(f"{_line(each)}\n" for each in (names, ["---"] * len(names), *rows))


def _line(cells: Iterable[str]) -> str:
    """One line of a table."""
    return "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |"
