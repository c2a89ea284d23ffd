"""Stages as runnable Python files."""

from __future__ import annotations

from pathlib import Path

from torch import fx

from fxopt.report.record import GraphRecord


class Dump:
    """Writes each stage of one graph into a directory; a closed dump writes nothing."""

    def __init__(self, directory: Path | None) -> None:
        self.directory = directory
        self._count = 0

    @staticmethod
    def open(root: str | None, record: GraphRecord) -> Dump:
        if root is None:
            return Dump(None)
        directory = Path(root) / f"graph_{record.index:03d}"
        directory.mkdir(parents=True, exist_ok=True)
        return Dump(directory)

    def write(self, stage: str, gm: fx.GraphModule) -> None:
        if self.directory is None:
            return
        path = self.directory / f"{self._count:02d}_{stage}.py"
        self._count += 1
        path.write_text(gm.print_readable(print_output=False))
