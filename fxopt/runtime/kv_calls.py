"""Calls of compiled graphs whose caches grow: what goes in and out around them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextvars import ContextVar
from dataclasses import dataclass, field
from operator import itemgetter
from typing import Any

import torch

from fxopt.runtime.frames import Frame
from fxopt.runtime.holders import references
from fxopt.runtime.kv_growth import Append, Begin, Growth, shares
from fxopt.runtime.kv_state import STATE, will_grow
from fxopt.runtime.read_lengths import has_been_read, is_any_length

# Where calls are noted while somebody wants to know about them: the call, and its inputs.
noted: ContextVar[list[tuple[GrowingCall, Sequence[Any]]] | None] = ContextVar("fxopt_noted", default=None)


@dataclass
class Plan:
    """What is to be done around the calls of one graph.

    Attributes:
        appends, begins: tensors that grow, and that are going to.
        complete: output and dimension of those that have all their rows, as many as there is to read.
        together: they get more room at one step, not each at another.
    """

    appends: list[Append] = field(default_factory=list)
    begins: list[Begin] = field(default_factory=list)
    complete: list[tuple[int, int]] = field(default_factory=list)
    together: bool = False

    def __bool__(self) -> bool:
        return bool(self.appends or self.begins)


class GrowingCall:
    """A compiled graph that takes tensors with room for new rows, as a function of the caches as they are.

    Attributes:
        appends: in the order of the outputs. places: of their inputs.
        growth: of these inputs.
        instead, frame: see `with_growing_caches`.
    """

    def __init__(
        self,
        compiled: Callable[..., Any],
        plan: Plan,
        instead: Callable[[Sequence[Any]], Callable[..., Any] | None],
        frame: Frame | None = None,
    ) -> None:
        self.compiled = compiled
        self.appends = sorted(plan.appends, key=lambda each: each.output)
        self.places = [each.source for each in self.appends]
        self.growth = Growth(self.appends, plan.together)
        self.instead = instead
        self.frame = frame
        self._complete = plan.complete if plan.begins else []
        self._begins = list(zip(plan.begins, shares(len(plan.begins), plan.together), strict=True))
        self._parts = [each for each in plan.begins if each.part is not None]
        self._in_order: Callable[[Sequence[Any]], tuple[Any, ...]] | None = None

    def __call__(self, inputs: Sequence[Any]) -> Any:
        other = self.instead(inputs)
        if other is not None:
            return other(*inputs)
        notes = noted.get()
        if notes is not None:
            notes.append((self, inputs))
        if not self.places:
            outputs = list(self.compiled(*inputs))
            self._begin(outputs, inputs)
            return outputs
        grown, handed_out = self.growth.of(inputs, references(inputs, self.places))
        return self.run(list(inputs), grown, lambda: handed_out)

    def run(
        self,
        given: list[Any],
        grown: Sequence[torch.Tensor],
        handed_out: Callable[[], Sequence[torch.Tensor]],
    ) -> list[Any]:
        """All outputs.

        Args:
            given: the inputs but for the caches; it is changed.
            grown: the caches with room for new rows.
            handed_out: what they hold afterwards; called when the graph has run.
        """
        for place, tensor in zip(self.places, grown, strict=True):
            given[place] = tensor
        results = self.compiled(*given)
        if self._in_order is None:
            self._in_order = _merged([each.output for each in self.appends], len(results))
        outputs = list(self._in_order([*handed_out(), *results]))
        del results
        self._begin(outputs, given)
        return outputs

    def _begin(self, outputs: list[Any], given: Sequence[Any]) -> None:
        """Put caches with room behind them in the place of those that begin, where these are going to grow.

        Nobody else may hold the outputs: each tensor that is copied goes before the next one is.
        """
        if not will_grow():
            for each in self._parts:
                outputs[each.output] = each.kept_of(outputs[each.output], given)
            return
        for each, share in self._begins:
            rows = STATE.begin(
                each.kept_of(outputs[each.output], given), each.dim, share, bounded=each.bounded
            )
            is_any_length(rows, each.dim)  # the step behind the prompt is compiled for all lengths at once
            outputs[each.output] = rows
        for output, dim in self._complete:
            has_been_read(outputs[output], dim)


def _merged(places: Sequence[int], others: int) -> Callable[[Sequence[Any]], tuple[Any, ...]]:
    """A function that puts the first of some values at `places`, and the others in between."""
    total = len(places) + others
    rest = [place for place in range(total) if place not in set(places)]
    order = sorted(range(total), key=[*places, *rest].__getitem__)
    return itemgetter(*order) if total > 1 else tuple


def with_growing_caches(
    compiled: Callable[..., Any],
    plan: Plan,
    instead: Callable[[Sequence[Any]], Callable[..., Any] | None],
    frame: Frame | None = None,
) -> Callable[..., Any]:
    """`compiled`, which takes tensors with room for new rows, as a function of the caches as they are.

    Args:
        instead: another function for a call with such inputs, or None.
        frame: that the graph was captured from.
    """
    call = GrowingCall(compiled, plan, instead, frame)

    def run(*inputs: Any) -> Any:
        return call(inputs)

    run.growing = call  # type: ignore[attr-defined]
    return run
