"""Learning the steps of a decoding loop, so that they can go past Dynamo's guards (`DecodeStep`).

A step is learned from two that went the slow way, one behind the other: both ran the same graph, and what
its guards look at did not change from the end of the first to the end of the second, where they had held.
"""

from __future__ import annotations

import logging
import weakref
from collections.abc import Mapping, Sequence
from types import FunctionType
from typing import Any

import torch

from fxopt.runtime.decode_build import Graph, Seen, scope_of, step_of
from fxopt.runtime.decode_step import SLOW, DecodeStep
from fxopt.runtime.frames import entry_of, tail_of
from fxopt.runtime.kv_calls import GrowingCall, noted
from fxopt.runtime.relied import CONSTANT, Relied, Unknown, relied_on
from fxopt.runtime.step_loops import CURRENT
from fxopt.runtime.step_numbers import counted, site_of
from fxopt.runtime.watched import Watched

log = logging.getLogger("fxopt")

# After so many steps that were slow, a call of generate learns no more: its cache is new at each step.
_PATIENCE = 16
_HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")


class DecodePath:
    """The calls of one compiled model within one call of generate.

    Attributes:
        taken: how many steps went past the guards.
    """

    taken = 0  # of all paths; for tests and benchmarks
    _graphs: weakref.WeakKeyDictionary[Any, dict[int, Graph]] = weakref.WeakKeyDictionary()
    _resets = 0

    def __init__(self, compiled: Any) -> None:
        self._compiled = compiled
        self._model = compiled._orig_mod
        self._step: DecodeStep | None = None
        self._before: Seen | None = None
        self._slow = 0
        self._epoch = DecodePath._resets

    @classmethod
    def forget(cls) -> None:
        """Nothing that was learned counts any more."""
        cls._resets += 1
        cls._graphs.clear()

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        step, self._step = self._step, None
        if step is not None and self._epoch == DecodePath._resets:
            result = step.take(args, kwargs)
            if result is not SLOW:
                DecodePath.taken += 1
                self._step = step
                return result
        del step
        if self._slow >= _PATIENCE:
            return self._compiled(*args, **kwargs)
        self._slow += 1
        self._epoch = DecodePath._resets
        notes: list[tuple[GrowingCall, Sequence[Any]]] = []
        token = noted.set(notes)
        try:
            result = self._compiled(*args, **kwargs)
        finally:
            noted.reset(token)
        self._learn(notes, args, kwargs)
        return result

    def _learn(self, notes: Sequence[tuple[GrowingCall, Any]], args: Sequence[Any], kwargs: Any) -> None:
        before, self._before = self._before, None
        try:
            if len(notes) == 1 and not args:
                self._step = self._learned(*notes[0], kwargs, before)
        except Unknown as reason:
            log.debug("steps go through Dynamo's guards: %s", reason)
            self._slow = _PATIENCE
        except Exception as error:
            log.debug("steps go through Dynamo's guards: %s: %s", type(error).__name__, error)
            self._slow = _PATIENCE
        if self._step is not None:
            self._slow = 0

    def _learned(
        self, call: GrowingCall, inputs: Sequence[Any], kwargs: Mapping[str, Any], before: Seen | None
    ) -> DecodeStep | None:
        function, frame = type(self._model).forward, call.frame
        if not call.appends:
            return None
        if frame is None or not isinstance(function, FunctionType) or function.__code__ is not frame.code:
            raise Unknown("another function than the model's forward was compiled")
        if torch.is_grad_enabled():
            raise Unknown("gradients")
        scope = scope_of(function, self._model, kwargs)
        roots = {name: value for name, value in kwargs.items() if not isinstance(value, torch.Tensor)}
        watched = Watched.below(value for value in roots.values() if not isinstance(value, CONSTANT))
        sites = [site_of(frame.sources[place], scope) for place in call.places]
        counts = counted(frame, inputs, scope, watched)
        content = watched.content([*sites, *counts.values()])
        seen = self._before = Seen(call, watched, sites, counts, content)
        if before is None or before.call is not call or before.content != seen.content:
            return None
        graph = self._graph(call, function)
        if graph.relied is None or not graph.relied():
            graph.relied = self._relied(graph, scope, function, watched, kwargs).checks()
            return None
        return step_of(self._model, graph, seen, frame, inputs, kwargs, roots)

    def _graph(self, call: GrowingCall, function: FunctionType) -> Graph:
        graphs = DecodePath._graphs.setdefault(self._compiled, {})
        loops = CURRENT.loops
        if id(call) not in graphs or graphs[id(call)].loops is not loops:
            wanted = lambda found: getattr(found, "growing", None) is call  # noqa: E731
            entry = entry_of(function.__code__, function, wanted)
            tail = None if entry is None else tail_of(entry.code, function, getattr(loops, "store", None))
            if tail is None:
                raise Unknown("the compiled frame does more than call one graph")
            graphs[id(call)] = Graph(call, entry.guard_manager, tail, loops)
        return graphs[id(call)]

    def _relied(
        self, graph: Graph, scope: dict[str, Any], function: Any, watched: Watched, kwargs: Mapping[str, Any]
    ) -> Relied:
        without = watched.ids() | {id(value) for value in kwargs.values()} | {id(scope["L"])}
        without |= {id(value) for value in scope["L"].values() if isinstance(value, dict)}
        relied = relied_on(graph.guards, scope, without)
        for kind in type(self._model).__mro__[:-1]:
            relied.add(kind)
        relied.add(function)
        hooks = [vars(module)[name] for module in (self._compiled, self._model) for name in _HOOKS]
        hooks += [vars(torch.nn.modules.module)[f"_global{name}"] for name in _HOOKS]
        if any(hooks) or "forward" in vars(self._model):
            raise Unknown("the model has hooks")
        for each in (*hooks, vars(self._compiled), vars(self._model)):
            relied.add(each)
        return relied
