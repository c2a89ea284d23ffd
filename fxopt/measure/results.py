"""A file of results: what was measured on, the plan, and the rows, kept from the first row on.

Two forms, by the name of the file: JSON lines (`.jsonl`: the machine, a line for each row, a summary), or one
JSON document. Either is replaced as a whole, so that a reader never sees half of it.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from fxopt.measure.machine import describe

Row = dict[str, Any]
# Rows of one file are comparable as long as these are the same.
_SAME = ("commit", "cpu", "gpu", "cores", "threads", "python", "torch", "triton", "transformers", "fxopt")


@dataclass
class Results:
    """The rows of one run, written to `path` after every one of them; with None they are only kept.

    Attributes:
        keys: the fields of a row that say what was measured.
    """

    path: Path | None
    plan: Mapping[str, Any]
    keys: Sequence[str] = ()
    rows: list[Row] = field(default_factory=list)
    summary: Row = field(default_factory=dict)
    machine: Row = field(default_factory=describe)

    def add(self, row: Row) -> None:
        """Keep a row, in place of one for the same thing, and write the file."""
        self.rows = [old for old in self.rows if not self._same_thing(old, row)] + [row]
        self.write()

    def resume(self) -> int:
        """Take over the rows that the file has from the same plan, commit and machine; their number.

        Rows that end with an error are not taken over.
        """
        if self.path is None or not self.path.is_file():
            return 0
        found = read(self.path)
        same = all(found.machine.get(name) == self.machine.get(name) for name in _SAME)
        if not same or found.plan != _plain(self.plan):
            return 0
        self.rows = [row for row in found.rows if "error" not in row]
        return len(self.rows)

    def has(self, key: Mapping[str, Any]) -> bool:
        """Whether there is a row for it."""
        wanted = _plain(key)
        return any(all(row.get(name) == value for name, value in wanted.items()) for row in self.rows)

    def write(self) -> None:
        """Replace the file.

        Raises:
            OSError: it cannot be written.
        """
        if self.path is not None:
            replace_text(self.path, self._text())

    def _text(self) -> str:
        assert self.path is not None
        plan, rows, summary = map(_plain, (self.plan, self.rows, self.summary))
        if self.path.suffix != ".jsonl":
            whole = {"machine": self.machine, "plan": plan, "rows": rows}
            return json.dumps(whole | ({"summary": summary} if summary else {}), indent=1) + "\n"
        lines = [{"kind": "machine", **self.machine, "plan": plan}]
        lines += [{"kind": "row", **row} for row in rows]
        lines += [{"kind": "summary", **summary}] if summary else []
        return "".join(json.dumps(line) + "\n" for line in lines)

    def _same_thing(self, one: Row, other: Row) -> bool:
        return bool(self.keys) and all(one.get(name) == other.get(name) for name in self.keys)


def replace_text(path: Path, text: str) -> None:
    """Write a file as a whole: whoever reads it meanwhile sees the old one.

    Raises:
        OSError: it cannot be written.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    draft = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        draft.write_text(text)
        draft.replace(path)
    finally:
        draft.unlink(missing_ok=True)


def read(path: Path) -> Results:
    """What a file holds, in either form.

    Raises:
        OSError: there is no such file.
        ValueError: it holds no results.
    """
    text = path.read_text()
    lines = [json.loads(line) for line in text.splitlines()] if path.suffix == ".jsonl" else []
    whole = _document(lines) if lines else json.loads(text)
    if not (isinstance(whole, dict) and {"machine", "rows"} <= whole.keys()):
        raise ValueError(f"{path} holds no results")
    return Results(
        path, whole.get("plan", {}), rows=whole["rows"], summary=whole.get("summary", {}),
        machine=whole["machine"],
    )  # fmt: skip


def _document(lines: list[Row]) -> Row:
    found: Row = {"rows": []}
    for line in lines:
        kind = line.pop("kind", "")
        if kind == "machine":
            found["plan"] = line.pop("plan", {})
            found["machine"] = line
        elif kind == "summary":
            found["summary"] = line
        else:
            found["rows"].append(line)
    return found


def _plain(value: Any) -> Any:
    """As JSON has it: tuples are lists, other objects their text, and what is not finite is text too."""
    if isinstance(value, Mapping):
        return {str(key): _plain(entry) for key, entry in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(entry) for entry in value]
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    if value is None or isinstance(value, bool | int | float | str):
        return value
    return str(value)
