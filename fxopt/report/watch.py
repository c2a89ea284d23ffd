"""Watching Dynamo: graph breaks, recompiles and compiled functions of this thread, inside of a block.

Nothing of Dynamo's state is reset. Uses private torch APIs, listed in docs/torch_apis.md; where this torch
lacks one, that part of the report stays empty.
"""

from __future__ import annotations

import contextlib
import functools
import inspect
import logging
import re
import threading
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from types import CodeType
from typing import Any

import torch

from fxopt.report.summary import Break, Recompile

_BREAK = re.compile(r"in user code at (?P<where>.+?:\d+)\n+Graph Break Reason: (?P<reason>.*)", re.DOTALL)
_SKIP = re.compile(r"skip tracing the frame .*?following user code:\n(?P<stack>.*)", re.DOTALL)
_FRAME = re.compile(r'File "(?P<file>[^"]+)", line (?P<line>\d+)')


@dataclass
class Watch:
    """What Dynamo did in the blocks of `observe`."""

    compiled: dict[CodeType, list[str]] = field(default_factory=dict)
    recompiles: list[Recompile] = field(default_factory=list)
    _breaks: Counter[tuple[str, str, str]] = field(default_factory=Counter)
    _seen_failures: dict[CodeType, int] = field(default_factory=dict)

    @property
    def breaks(self) -> list[Break]:
        return [Break(*key, count=count) for key, count in self._breaks.items()]

    @contextlib.contextmanager
    def observe(self) -> Iterator[None]:
        """Notes what this thread compiles inside of the block."""
        from torch._dynamo.convert_frame import register_bytecode_hook

        thread = threading.get_ident()

        def on_compiled(code: CodeType, new_code: CodeType) -> None:
            if threading.get_ident() == thread:
                self._note_compiled(code)

        handle = register_bytecode_hook(on_compiled)
        try:
            with _listening(lambda text: self.note_break(*_parse_break(text))):
                yield
        finally:
            handle.remove()

    def note_end_of_graph(self, gm: Any) -> None:
        """Why Dynamo ended this graph; a break that its log has told of is not counted again."""
        ended = getattr(gm, "compile_subgraph_reason", None)
        if ended is None or not ended.graph_break or not ended.user_stack:
            return
        frame = ended.user_stack[-1]
        where = f"{frame.filename}:{frame.lineno}"
        if all(where != known for known, _, _ in self._breaks):
            self.note_break(where, ended.reason)

    def note_break(self, where: str, reason: str) -> None:
        lines = [line.strip() for line in reason.splitlines() if line.strip()]
        self._breaks[where, _headline(lines), "\n".join(lines)] += 1

    def _note_compiled(self, code: CodeType) -> None:
        from torch._guards import CompileContext

        compile_id = str(CompileContext.current_compile_id())
        earlier = self.compiled.setdefault(code, [])
        reasons = self._new_failures(code)
        if earlier:
            mine = tuple(text for failed, text in reasons if failed in earlier)
            where = f"{code.co_filename}:{code.co_firstlineno}"
            self.recompiles.append(Recompile(compile_id, where, code.co_name, mine))
        earlier.append(compile_id)

    def _new_failures(self, code: CodeType) -> list[tuple[str, str]]:
        """(compilation whose guard failed, the guard) since the last look."""
        from torch._dynamo.utils import guard_failures

        failures = guard_failures.get(code, [])
        fresh = failures[self._seen_failures.get(code, 0) :]
        self._seen_failures[code] = len(failures)
        parts = [str(text).partition(": ") for text in fresh]
        return [(failed, text.partition("\n")[0]) for failed, _, text in parts]


def _headline(lines: list[str]) -> str:
    """Dynamo's name of the break and its explanation, without the advice."""
    telling = [line for line in lines if not line.startswith("Encountered graph break")] or lines
    if not telling:
        return "no reason given"
    explanation = next((line.removeprefix("Explanation: ") for line in lines if "Explanation: " in line), "")
    return f"{telling[0]}: {explanation}" if explanation and explanation != telling[0] else telling[0]


def _parse_break(text: str) -> tuple[str, str]:
    """(file:line, reason) of a line of Dynamo's log of graph breaks."""
    found = _BREAK.search(text)
    if found is not None:
        return found["where"], found["reason"].partition("\nUser code traceback:")[0]
    skipped = _SKIP.search(text)
    frames = _FRAME.findall(skipped["stack"] if skipped else text)
    where = f"{frames[-1][0]}:{frames[-1][1]}" if frames else "-"
    return where, text


class _Handler(logging.Handler):
    """Passes on what this thread logs."""

    def __init__(self, take: Callable[[str], None]) -> None:
        super().__init__(logging.DEBUG)
        self._take = take
        self._thread = threading.get_ident()

    def emit(self, record: logging.LogRecord) -> None:
        if record.thread != self._thread:
            return
        try:
            self._take(record.getMessage())
        except Exception:
            self.handleError(record)


@contextlib.contextmanager
def _listening(take: Callable[[str], None]) -> Iterator[None]:
    """Reads Dynamo's log of graph breaks. What it shows, and where, stays as the user has set it."""
    handler = _Handler(take)
    with contextlib.ExitStack() as stack:
        for logger in _break_loggers():
            if not logger.isEnabledFor(logging.DEBUG):
                stack.callback(setattr, logger, "propagate", logger.propagate)
                stack.callback(logger.setLevel, logger.level)
                logger.setLevel(logging.DEBUG)
                logger.propagate = False
            logger.addHandler(handler)
            stack.callback(logger.removeHandler, handler)
        yield


def _break_loggers() -> list[logging.Logger]:
    from torch._dynamo import convert_frame, symbolic_convert

    found = [getattr(module, "graph_break_log", None) for module in (symbolic_convert, convert_frame)]
    return [logger for logger in found if isinstance(logger, logging.Logger)]


class FrameState:
    """Dynamo's memory of the sizes that it has seen, which decides what becomes dynamic: one of its own."""

    def __init__(self) -> None:
        from torch._dynamo import pgo

        self._mine: Any = defaultdict(pgo.CodeState)

    @contextlib.contextmanager
    def swapped(self) -> Iterator[None]:
        """Inside, Dynamo reads and writes this memory, and none on disk."""
        from torch._dynamo import config, pgo

        if not hasattr(pgo, "_CODE_STATE"):
            yield
            return
        disk = ("automatic_dynamic_local_pgo", "automatic_dynamic_remote_pgo")
        switches = {name: False for name in disk if hasattr(config, name)}
        theirs = pgo._CODE_STATE
        pgo._CODE_STATE = self._mine
        try:
            with config.patch(switches):
                yield
        finally:
            self._mine = pgo._CODE_STATE
            pgo._CODE_STATE = theirs


@functools.cache
def isolation() -> dict[str, Any]:
    """The keyword by which `torch.compile` keeps the compilations of one call apart from all others'."""
    known = inspect.signature(torch.compile).parameters
    return {"isolate_recompiles": True} if "isolate_recompiles" in known else {}


def drop_compilations(compiled: dict[CodeType, list[str]]) -> None:
    """Free what was compiled for these functions, where nobody else has compiled them too."""
    from torch._C._dynamo.eval_frame import _debug_get_cache_entry_list, reset_code

    for code, mine in compiled.items():
        entries = _debug_get_cache_entry_list(code)
        if all(str(getattr(entry, "compile_id", None)) in mine for entry in entries):
            reset_code(code)
