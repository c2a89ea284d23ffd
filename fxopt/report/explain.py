"""``fxopt.explain(model, *args, **kwargs)``: compile and run once, apart from everything else, and tell."""

from __future__ import annotations

import threading
import weakref
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from types import CodeType
from typing import Any

import torch
from torch import fx

import fxopt
from fxopt.errors import NotAModel
from fxopt.report.preserve import preserved
from fxopt.report.record import collect
from fxopt.report.report import Report
from fxopt.report.watch import FrameState, Watch, drop_compilations, isolation

# One at a time: Dynamo's memory of sizes is exchanged while one runs.
_lock = threading.RLock()
# What reports that are gone had compiled: freed by the next explain, not by the garbage collector, which may
# run in the middle of a compilation.
_left_behind: list[dict[CodeType, list[str]]] = []


@dataclass(frozen=True)
class Explain:
    """Compile `model` with fxopt, call it once, and return what happened as a `Report`.

        report = fxopt.explain(model, input_ids, attention_mask=mask)
        print(report)
        report.call(longer_ids, attention_mask=longer_mask)  # one more call: does it recompile?

    Every argument after the first goes to the model. Options are given before, so that they cannot clash with
    the model's own: ``fxopt.explain.with_options(options={"host": "eager"})(model, input_ids)``.

    The model is run in the grad mode of the caller; only the forward pass is run. Compiled functions of the
    process, their caches and Dynamo's memory of sizes are left alone. Modes, buffers, random state and
    ``.grad`` are as before afterwards. What the call does to its arguments (a KV cache that it fills) stays:
    pass a copy if that matters.

    Attributes:
        mode, options, dynamic: as for `torch.compile`.
    """

    mode: str | None = None
    options: Mapping[str, Any] | None = None
    dynamic: bool | None = None

    def with_options(
        self,
        *,
        mode: str | None = None,
        options: Mapping[str, Any] | None = None,
        dynamic: bool | None = None,
    ) -> Explain:
        """The same with other options.

        Raises:
            UnknownOption, OptionTypeError, OptionValueError, UnsupportedMode: at once.
        """
        fxopt.backend.validate(mode=mode, options=options)  # type: ignore[attr-defined]
        return Explain(mode, options, dynamic)

    def __call__(self, model: Callable[..., Any], /, *args: Any, **kwargs: Any) -> Report:
        """Raises whatever the model raises, and NotAModel for what cannot be called."""
        if not callable(model):
            raise NotAModel(value=model, kind=type(model).__name__)
        with _lock:
            while _left_behind:
                drop_compilations(_left_behind.pop())
        session = Session(_uncompiled(model), self)
        report = Report(session.graphs, session.watch, subject=_name_of(session.model), session=session)
        weakref.finalize(session, _left_behind.append, session.watch.compiled)
        return report.call(*args, **kwargs)


explain = Explain()


@dataclass(eq=False)
class Session:
    """One function, compiled for one report."""

    model: Callable[..., Any]
    how: Explain
    watch: Watch = field(default_factory=Watch)
    graphs: list[Any] = field(default_factory=list)
    _frames: FrameState = field(default_factory=FrameState)
    _compiled: Callable[..., Any] | None = None

    def __post_init__(self) -> None:
        keywords = isolation() | {"backend": _Recording(self), "dynamic": self.how.dynamic}
        self._compiled = torch.compile(self.model, **keywords)

    def run(self, args: Sequence[Any], kwargs: Mapping[str, Any]) -> None:
        """One call."""
        compiled = self._compiled
        if compiled is None:
            raise ValueError("the report is closed: explain the model again")
        with _lock, preserved(_module_of(self.model)), self._frames.swapped(), self.watch.observe():
            compiled(*args, **kwargs)

    def close(self) -> None:
        """Forget the model and free what was compiled for it."""
        self._compiled = None
        self.model = _closed
        with _lock:
            drop_compilations(self.watch.compiled)
        self.watch.compiled.clear()

    def compile(self, gm: fx.GraphModule, example_inputs: Sequence[Any]) -> Callable[..., Any]:
        """What the backend does, with its record kept here."""
        self.watch.note_end_of_graph(gm)
        with collect(private=True) as found:
            try:
                return fxopt.backend(gm, example_inputs, mode=self.how.mode, options=self.how.options)
            finally:
                self.graphs += found


class _Recording:
    """The backend of one session. Dynamo keeps backends for ever, so this one does not keep the session."""

    def __init__(self, session: Session) -> None:
        self._session = weakref.ref(session)

    def __call__(self, gm: fx.GraphModule, example_inputs: Sequence[Any]) -> Callable[..., Any]:
        session = self._session()
        return gm.forward if session is None else session.compile(gm, example_inputs)


def _closed(*args: Any, **kwargs: Any) -> None:
    """Stands for the model of a closed report."""


def _uncompiled(model: Callable[..., Any]) -> Callable[..., Any]:
    """The function or module under a `torch.compile` that the user has applied already."""
    while True:
        inner = getattr(model, "_orig_mod", None) or getattr(model, "_torchdynamo_orig_callable", None)
        if inner is None:
            return model
        model = inner


def _module_of(model: Callable[..., Any]) -> torch.nn.Module | None:
    for candidate in (model, getattr(model, "__self__", None)):
        if isinstance(candidate, torch.nn.Module):
            return candidate
    return None


def _name_of(model: Callable[..., Any]) -> str:
    if isinstance(model, torch.nn.Module):
        return type(model).__name__
    return getattr(model, "__qualname__", None) or type(model).__name__
