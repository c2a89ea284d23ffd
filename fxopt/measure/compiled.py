"""`torch.compile` for comparisons: who compiles, with caches of its own, and what Dynamo did meanwhile."""

from __future__ import annotations

import inspect
import os
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from fxopt.report.record import GraphRecord, collect
from fxopt.report.watch import FrameState, Watch

EAGER, BASELINE, CANDIDATE, TUNED = "eager", "inductor", "fxopt", "inductor max-autotune"
TWIN = "inductor again"

# Where Inductor and Triton look for what they compiled, unless they are told otherwise.
_FOLDERS = {"TORCHINDUCTOR_CACHE_DIR": "inductor", "TRITON_CACHE_DIR": "triton"}


def apart() -> dict[str, Any]:
    """The keyword that keeps one `torch.compile` apart from the others of the same code.

    Dynamo keeps compilations by code object, and looks through those of all backends and models at every
    call: with several in one process, one would be charged for the guards of the others.
    """
    known = inspect.signature(torch.compile).parameters
    return {"isolate_recompiles": True} if "isolate_recompiles" in known else {}


def how(
    name: str, *, mode: str | None = None, options: Mapping[str, Any] | None = None, cache: str | None = None
) -> dict[str, Any]:
    """The keywords of `torch.compile` by which a candidate is made.

    Args:
        name: `BASELINE`, `TUNED` or `CANDIDATE`.
        mode: torch.compile's, for all but `TUNED`, which has its own.
        options: for fxopt only.
        cache: directory of fxopt's emitted kernels.
    """
    if name == TUNED:
        graphs = "" if torch.cuda.is_available() else "-no-cudagraphs"
        return {"backend": BASELINE, "mode": f"max-autotune{graphs}", **apart()}
    if name == BASELINE:
        return {"backend": BASELINE, **({"mode": mode} if mode else {}), **apart()}
    given = {**(options or {}), **({"mode": mode} if mode else {}), **({"cache_dir": cache} if cache else {})}
    return {"backend": name, "options": given or None, **apart()}


def compile_with(model: Any, name: str, options: Mapping[str, Any] | None = None, **more: Any) -> Any:
    """`model` compiled by a candidate, apart from what else is compiled; `more` as for `how`."""
    return torch.compile(model, **how(name, options=options, **more))


@dataclass(frozen=True)
class Compiled:
    """What two calls cost and left behind.

    Attributes:
        seconds: until the first result. graphs, breaks, recompiles: Dynamo's, of both calls.
        result: what the first call returned.
    """

    seconds: float
    graphs: int
    breaks: int
    recompiles: int
    result: Any = field(repr=False)
    records: list[GraphRecord] = field(default_factory=list, repr=False)

    @property
    def counts(self) -> dict[str, int]:
        return {"graphs": self.graphs, "breaks": self.breaks, "recompiles": self.recompiles}


def called_twice(step: Callable[[], Any]) -> Compiled:
    """Call a step that compiles: the second call may compile again, for sizes that turned out to change.

    Sizes that changed under another candidate would be dynamic from the start, so that memory is apart.
    """
    from torch._dynamo.utils import counters

    watch, before = Watch(), counters["stats"]["unique_graphs"]
    with FrameState().swapped(), collect() as records, watch.observe():
        start = time.perf_counter()
        result = step()
        seconds = time.perf_counter() - start
        step()
    graphs = counters["stats"]["unique_graphs"] - before
    breaks = sum(one.count for one in watch.breaks)
    return Compiled(seconds, graphs, breaks, len(watch.recompiles), result, list(records))


def warm_up() -> None:
    """Have Inductor ask the C++ compiler what it can, which is no part of any model's compilation."""
    for name in (BASELINE, CANDIDATE):
        compile_with(lambda x: (x * 2).sum(), name)(torch.ones(8))
    torch._dynamo.reset()


@contextmanager
def caches_in(folder: Path) -> Iterator[None]:
    """Inside, compiled code is kept in `folder` and found there, and in no memory of this process."""
    from torch._inductor.utils import clear_caches

    with ExitStack() as stack:
        for name, part in _FOLDERS.items():
            stack.callback(_restore, name, os.environ.get(name))
            os.environ[name] = str(folder / part)
        stack.callback(clear_caches)
        clear_caches()
        yield


@contextmanager
def empty_folder() -> Iterator[Path]:
    """A directory for caches, removed at the end."""
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder:
        yield Path(folder)


def _restore(name: str, value: str | None) -> None:
    if value is None:
        os.environ.pop(name, None)
    else:
        os.environ[name] = value
