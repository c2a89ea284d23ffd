"""One step of all growing tensors of a graph.

A step usually gets exactly the views that the step before handed out. Then one check for all of them is
enough, and what remains is a view for each: `Tip`. Otherwise each is looked at by itself (`KVState.extend`).
"""

from __future__ import annotations

import functools
import weakref
from collections.abc import Sequence
from dataclasses import dataclass
from operator import is_, le
from sys import getrefcount
from typing import Any

import torch

from fxopt.runtime.holders import references_of_a_call
from fxopt.runtime.kv_state import STATE, when_alone

# Of so many caches in use by turns the newest views are known.
_TIPS = 64
_use_count = torch._C._storage_Use_Count


@dataclass(frozen=True)
class Length:
    """A number of rows: `number`, or the input at `place`, or one of its sizes."""

    number: int
    place: int | None = None
    dim: int | None = None

    def of(self, inputs: Sequence[Any]) -> int:
        if self.place is None:
            return self.number
        given = inputs[self.place]
        return int(given) if self.dim is None else int(given.shape[self.dim])


@dataclass(frozen=True)
class Begin:
    """An output that is the first rows of a cache.

    Attributes:
        output: position among the outputs that the caller gets.
        dim: the dimension that is going to grow.
        bounded: the cache keeps only the newest rows, so that its length is known to end somewhere.
    """

    output: int
    dim: int
    bounded: bool


@dataclass(frozen=True)
class Append(Begin):
    """An output that is an input with rows behind it.

    Attributes:
        source: position of the input.
        new: how many rows.
        measured: a size, stride or offset of the input is an input, too.
        part: the slice of the rows that the cache keeps, where it does not keep all.
    """

    source: int
    new: Length
    measured: bool
    part: tuple[int, int] | None


@dataclass
class Tip:
    """What one step handed out.

    Attributes:
        views: in the order of the appends. storages: of each, its address.
        alone: `references_to_storage` of each where nobody else has its memory.
        left: rows that fit behind those of every view.
        inference: the memory was made in inference mode.
    """

    views: list[weakref.ref[torch.Tensor]]
    storages: list[int]
    alone: tuple[int, int]
    left: int
    inference: bool

    def is_what(self, pasts: Sequence[torch.Tensor]) -> bool:
        """These are the views, and nobody else has their memory."""
        if not all(map(is_, [view() for view in self.views], pasts)):
            return False
        shared, held = self.alone
        if any(count != shared for count in map(_use_count, self.storages)):
            return False
        return all(getrefcount(past.untyped_storage()) == held for past in pasts)


class Growth:
    """The growing tensors of one graph, step by step."""

    def __init__(self, appends: Sequence[Append]) -> None:
        self.appends = appends
        self.shares = [number / max(len(appends) - 1, 1) for number in range(len(appends))]
        self._tips: dict[int, Tip] = {}
        # Alike are those of one length, whose views then are alike in sizes, strides and offset.
        forms = [(each.dim, each.part, each.new) for each in appends]
        self._alike = len(set(forms)) == 1

    @functools.cached_property
    def _allowed(self) -> list[int]:
        """References to each input that the call has itself."""
        return [references_of_a_call(each.measured) for each in self.appends]

    def of(
        self, inputs: Sequence[Any], held: Sequence[int]
    ) -> tuple[Sequence[torch.Tensor], Sequence[torch.Tensor]]:
        """For each append, the tensor with room for the new rows, and what the cache is to hold afterwards.

        Args:
            inputs: of the call. held: `references` to the inputs that grow.
        """
        pasts = [inputs[each.source] for each in self.appends]
        allowed = self._allowed
        tip = self._tips.pop(id(pasts[0]), None) if self._alike else None
        if tip is not None and all(map(le, held, allowed)) and tip.is_what(pasts):
            found = self._at_tip(tip, inputs, pasts)
            if found is not None:
                return found
        grown = [
            STATE.extend(
                past, each.dim, each.new.of(inputs), share, bounded=each.bounded, alone=count <= most
            )
            for past, each, share, count, most in zip(
                pasts, self.appends, self.shares, held, allowed, strict=True
            )
        ]
        handed_out = [_part(tensor, each) for tensor, each in zip(grown, self.appends, strict=True)]
        if self._alike:
            self._remember(handed_out)
        return grown, handed_out

    def _at_tip(
        self, tip: Tip, inputs: Sequence[Any], pasts: Sequence[torch.Tensor]
    ) -> tuple[list[torch.Tensor], list[torch.Tensor]] | None:
        one, first = self.appends[0], pasts[0]
        new = one.new.of(inputs)
        if new > tip.left or tip.inference != torch.is_inference_mode_enabled():
            return None
        STATE.in_place += len(pasts)
        dim, strides, offset = one.dim, first.stride(), first.storage_offset()
        rows = first.shape[dim] + new
        sizes = (*first.shape[:dim], rows, *first.shape[dim + 1 :])
        grown = [past.as_strided(sizes, strides, offset) for past in pasts]
        handed_out = grown
        if one.part is not None:
            start, end, _ = slice(*one.part).indices(rows)
            sizes = (*first.shape[:dim], end - start, *first.shape[dim + 1 :])
            offset += start * strides[dim]
            handed_out = [past.as_strided(sizes, strides, offset) for past in pasts]
        tip.views = list(map(weakref.ref, handed_out))
        tip.left -= new
        self._keep(handed_out[0], tip)
        return grown, handed_out

    def _remember(self, views: Sequence[torch.Tensor]) -> None:
        forms = {(view.shape, view.stride(), view.storage_offset(), view._is_view()) for view in views}
        left = [STATE.room_behind(view) for view in views]
        if len(forms) != 1 or any(room is None for room in left):
            return
        storages = [view.untyped_storage()._cdata for view in views]
        alone, inference = when_alone(views[0]._is_view()), views[0].is_inference()
        room = min(room for room in left if room is not None)
        self._keep(views[0], Tip(list(map(weakref.ref, views)), storages, alone, room, inference))

    def _keep(self, first: torch.Tensor, tip: Tip) -> None:
        self._tips[id(first)] = tip
        if len(self._tips) > _TIPS:
            del self._tips[next(iter(self._tips))]


def _part(tensor: torch.Tensor, each: Append) -> torch.Tensor:
    if each.part is None:
        return tensor
    start, end, _ = slice(*each.part).indices(tensor.shape[each.dim])
    return tensor.narrow(each.dim, start, end - start)
