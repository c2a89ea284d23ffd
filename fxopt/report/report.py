"""The report: what was compiled, what was rewritten, what was not and why. Text, JSON, HTML."""

from __future__ import annotations

import json
import platform
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from fxopt.report.record import GraphRecord, records
from fxopt.report.summary import Break, Recompile, cost_dict, graph_dict, saved, sites_by_pass, summary_text

if TYPE_CHECKING:
    from collections.abc import Iterator

    from rich.console import Console, ConsoleOptions, RenderableType

SCHEMA = "fxopt-report"
SCHEMA_VERSION = 1


class _Watched(Protocol):
    @property
    def breaks(self) -> list[Break]: ...

    @property
    def recompiles(self) -> list[Recompile]: ...


class _Session(Protocol):
    def run(self, args: Sequence[Any], kwargs: dict[str, Any]) -> None: ...

    def close(self) -> None: ...


class Report:
    """Made by `fxopt.explain`, or of everything compiled in this process by `Report.of_process`.

    Printing it, with `print` or with rich, shows a table in which the sites of repeated layers share a row;
    `print(report.verbose())` lists every site.

    Attributes:
        graphs: a record for each graph, in the order of compilation.
        subject: what was explained.
        calls: how often it was called.
    """

    def __init__(
        self,
        graphs: Sequence[GraphRecord],
        watch: _Watched | None = None,
        *,
        subject: str = "",
        session: _Session | None = None,
        verbose: bool = False,
    ) -> None:
        self.graphs = graphs
        self.subject = subject
        self.calls = 0
        self._watch = watch
        self._session = session
        self._verbose = verbose

    @classmethod
    def of_process(cls) -> Report:
        """All graphs that fxopt has compiled in this process, at most the last 512.

        Graph breaks and recompiles are not known: nobody watched. TORCH_LOGS="graph_breaks,recompiles" shows
        them as they happen.
        """
        return cls(records(), subject="this process")

    @property
    def breaks(self) -> list[Break] | None:
        """Graph breaks, each with the user's file and line; None when Dynamo was not watched."""
        return None if self._watch is None else self._watch.breaks

    @property
    def recompiles(self) -> list[Recompile] | None:
        """Recompilations, each with the guards that failed; None when Dynamo was not watched."""
        return None if self._watch is None else self._watch.recompiles

    @property
    def summary(self) -> str:
        """Everything in one line."""
        return summary_text(self.graphs, self.breaks, self.recompiles)

    def call(self, *args: Any, **kwargs: Any) -> Report:
        """Call the explained function again, with other arguments. Returns this report, brought up to date.

        Raises:
            ValueError: the report was not made by `fxopt.explain`, or is closed.
        """
        if self._session is None:
            raise ValueError("only a report made by fxopt.explain can call its model")
        self._session.run(args, kwargs)
        self.calls += 1
        return self

    def close(self) -> None:
        """Let go of the model and of what was compiled for it. What the report says stays."""
        if self._session is not None:
            self._session.close()

    def verbose(self) -> Report:
        """The same report, printed with every site in a row of its own and with all reasons in full."""
        full = Report(self.graphs, self._watch, subject=self.subject, session=self._session, verbose=True)
        full.calls = self.calls
        return full

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON types. The layout is documented in docs/explain.md and versioned."""
        import torch

        import fxopt

        return {
            "schema": SCHEMA,
            "schema_version": SCHEMA_VERSION,
            "versions": {
                "fxopt": fxopt.__version__,
                "torch": str(torch.__version__),
                "python": platform.python_version(),
            },
            "subject": self.subject,
            "calls": self.calls,
            "summary": self._summary_dict(),
            "graphs": [graph_dict(record) for record in self.graphs],
            "breaks": None if self.breaks is None else [vars(one).copy() for one in self.breaks],
            "recompiles": None if self.recompiles is None else [_recompile_dict(r) for r in self.recompiles],
        }

    def _summary_dict(self) -> dict[str, Any]:
        breaks, recompiles = self.breaks, self.recompiles
        return {
            "text": self.summary,
            "graphs": len(self.graphs),
            "backward_graphs": sum(record.trains for record in self.graphs),
            "breaks": None if breaks is None else len(breaks),
            "recompiles": None if recompiles is None else len(recompiles),
            "passes": {
                name: {"applied": applied, "sites": sites}
                for name, (applied, sites) in sites_by_pass(self.graphs).items()
            },
            "saved": cost_dict(saved(self.graphs)),
        }

    def to_json(self, *, indent: int | None = 2) -> str:
        """`to_dict` as a JSON string."""
        return json.dumps(self.to_dict(), indent=indent)

    def to_html(self, path: str | Path) -> Path:
        """Write one page that needs nothing else to be read: no network, no other file."""
        from fxopt.report.files import write_atomically
        from fxopt.report.html import page

        return write_atomically(Path(path), page(self))

    def __str__(self) -> str:
        from fxopt.report.text import plain

        return plain(self, self._verbose)

    def __repr__(self) -> str:
        return f"<fxopt.Report {self.subject}: {self.summary}>"

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> Iterator[RenderableType]:
        from fxopt.report.text import parts

        yield from parts(self, self._verbose, options.max_width)


def _recompile_dict(one: Recompile) -> dict[str, Any]:
    return {**vars(one), "reasons": list(one.reasons)}
