"""How often Dynamo compiled: graphs, graph breaks and recompiles, to compare one backend with another."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx
from torch._dynamo.backends.registry import lookup_backend
from torch._dynamo.utils import counters


@dataclass(frozen=True)
class CompileStats:
    """What Dynamo did over some calls.

    Attributes:
        graphs: number of graphs given to the backend.
        breaks: reason -> number of graph breaks.
        recompiles: number of graphs that replaced an earlier one of the same frame.
    """

    graphs: int
    breaks: dict[str, int]
    recompiles: int


class Counting:
    """A backend that notes each graph's compile id and hands the graph to another one."""

    def __init__(self, backend: str, **keywords: Any) -> None:
        self.ids: list[str] = []
        self._inner: Callable[..., Any] = lookup_backend(backend)
        self._keywords = keywords

    def __call__(self, gm: fx.GraphModule, example_inputs: Sequence[Any]) -> Callable[..., Any]:
        self.ids.append(str(torch._guards.CompileContext.current_compile_id()))
        compiled: Callable[..., Any] = self._inner(gm, example_inputs, **self._keywords)
        return compiled


def compile_stats(backend: Counting, run: Callable[[Callable[..., Any]], object]) -> CompileStats:
    """Counts for `run(backend)`, which compiles with that backend and calls the result. Starts afresh."""
    torch._dynamo.reset()
    counters.clear()
    run(backend)
    return CompileStats(
        graphs=len(backend.ids),
        breaks={_stable(reason): count for reason, count in counters["graph_break"].items()},
        recompiles=sum(_recompile_number(compile_id) > 0 for compile_id in backend.ids),
    )


def _recompile_number(compile_id: str) -> int:
    """The 2 of "0/2": how often this frame had been compiled before."""
    return int(compile_id.rsplit("/", 1)[-1].split("_")[0])


def _stable(reason: str) -> str:
    """A reason without addresses, which differ from run to run."""
    return re.sub(r"0x[0-9a-f]+", "0x", reason)
