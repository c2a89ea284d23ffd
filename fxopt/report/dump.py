"""Stages as runnable Python files: ``options={"dump": "dir"}`` or ``FXOPT_DUMP=dir``.

``dir/process_<pid>/graph_003_0-1/02_rewrite-attention.py`` builds inputs of the recorded shapes from a seed,
runs the graph and prints shape and checksum of each output, so that two stages can be compared by eye. A
failure to write is one warning, never the user's.
"""

from __future__ import annotations

import itertools
import os
import warnings
from pathlib import Path

from torch import fx

from fxopt.ir.contract import Status
from fxopt.report.files import write_atomically
from fxopt.report.inputs import InputSpec, describe_inputs
from fxopt.report.program import Program
from fxopt.report.record import GraphRecord, describe_error

_warned = False


class Dump:
    """Writes each stage of one graph into a directory; a closed dump writes nothing."""

    def __init__(self, directory: Path | None, record: GraphRecord | None = None) -> None:
        self.directory = directory
        self._record = record
        self._count = 0
        self._inputs: list[InputSpec] | None = None

    @staticmethod
    def open(root: str | None, record: GraphRecord) -> Dump:
        if root is None:
            return Dump(None)
        try:
            return Dump(_own_directory(Path(root).expanduser(), record), record)
        except Exception as error:
            _warn(f"cannot write to {root}: {describe_error(error)}")
            return Dump(None)

    def write(self, stage: str, gm: fx.GraphModule) -> None:
        """Write `gm` as it is now, with the inputs of the first stage written, so that stages compare."""
        if self.directory is None:
            return
        path = self.directory / f"{self._count:02d}_{stage}.py"
        self._count += 1
        try:
            if self._inputs is None:
                self._inputs = describe_inputs(gm)
            program = Program(gm, self._inputs, self._heading(stage))
            for name, content in program.data.items():
                write_atomically(self.directory / name, content)
            write_atomically(path, program.text())
        except Exception as error:
            _warn(f"{path} was not written: {describe_error(error)}")

    def _heading(self, stage: str) -> list[str]:
        record = self._record
        if record is None:
            return [stage]
        applied: dict[str, int] = {}
        for entry in record.evidence:
            applied[entry.rewrite] = applied.get(entry.rewrite, 0) + (entry.status is Status.APPLIED)
        passes = ", ".join(f"{name} {count}" for name, count in applied.items() if count)
        known_as = f" (compilation {record.compile_id})" if record.compile_id else ""
        return [
            f"Stage {self._count - 1}, {stage}, of graph {record.index}{known_as}.",
            "",
            f"First operation at {record.location}.",
            f"Rewrites so far: {passes or 'none'}.",
        ]


def _own_directory(root: Path, record: GraphRecord) -> Path:
    """A new directory of this process and graph. What an earlier process of the same number wrote stays."""
    frame = f"_{record.compile_id.replace('/', '-')}" if record.compile_id else ""
    base = root / f"process_{os.getpid()}" / f"graph_{record.index:03d}{frame}"
    for attempt in itertools.count(2):
        try:
            base.mkdir(parents=True)
        except FileExistsError:
            base = base.with_name(f"{base.name.partition('__')[0]}__{attempt}")
        else:
            break
    return base


def _warn(text: str) -> None:
    """Once in a process."""
    global _warned
    if not _warned:
        _warned = True
        warnings.warn(f"fxopt: dump: {text}. Further failures are not reported.", stacklevel=3)
