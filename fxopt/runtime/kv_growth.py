"""One step of all growing tensors of a graph.

A step usually gets exactly the views that the step before handed out. Then one check for all of them is
enough, and what remains is a view for each: `Tip`. Otherwise each is looked at by itself (`KVState.extend`).
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass
from operator import le
from typing import Any

import torch
from torch.multiprocessing.reductions import StorageWeakRef

from fxopt.runtime.holders import references_of_a_call
from fxopt.runtime.kv_state import STATE, Storages, alias

# Of so many caches in use by turns the newest views are known.
_TIPS = 64


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
        storages: of the tensors, in the order of the appends, the addresses.
        alive: keeps other storages from getting these addresses.
        shape, strides, offset: of each.
        left: rows that fit behind those of every one.
        inference: the memory was made in inference mode.
    """

    storages: list[int]
    alive: list[StorageWeakRef]
    shape: torch.Size
    strides: tuple[int, ...]
    offset: int
    left: int
    inference: bool

    def is_what(self, pasts: Sequence[torch.Tensor], found: Storages) -> bool:
        """These are the tensors, by their memory, which nobody else has.

        Guards of Dynamo's tell that all their sizes are right but one, and the strides.
        """
        if found.addresses != self.storages or not found.are_alone(pasts[0]._is_view()):
            return False
        number, entries = len(pasts), self.shape.numel()
        if [past.numel() for past in pasts].count(entries) != number:
            return False
        return [past.storage_offset() for past in pasts].count(self.offset) == number


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
        found = self.at_tip(pasts, inputs) if all(map(le, held, allowed)) else None
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

    def at_tip(
        self, pasts: Sequence[torch.Tensor], inputs: Sequence[Any]
    ) -> tuple[Sequence[torch.Tensor], Sequence[torch.Tensor]] | None:
        """What `of` gives where these are what the step before handed out; otherwise None.

        Args:
            pasts: the caches, that nobody else holds. inputs: of the call.
        """
        if not self._alike:
            return None
        found = Storages.of(pasts)
        tip = self._tips.get(found.addresses[0])
        one = self.appends[0]
        new = one.new.of(inputs)
        if tip is None or new > tip.left or tip.inference != torch.is_inference_mode_enabled():
            return None
        if not tip.is_what(pasts, found):
            return None
        STATE.in_place += len(pasts)
        dim, strides, shape, beyond = one.dim, tip.strides, tip.shape, 0
        rows = shape[dim] + new
        sizes = (*shape[:dim], rows, *shape[dim + 1 :])
        grown = handed_out = [alias(past, sizes, strides) for past in pasts]
        if one.part is not None:
            start, end, _ = slice(*one.part).indices(rows)
            sizes = (*shape[:dim], end - start, *shape[dim + 1 :])
            beyond = start * strides[dim]
            handed_out = [alias(past, sizes, strides, beyond) for past in pasts]
        tip.shape, tip.offset, tip.left = torch.Size(sizes), tip.offset + beyond, tip.left - new
        return grown, handed_out

    def _remember(self, views: Sequence[torch.Tensor]) -> None:
        forms = {(view.shape, view.stride(), view.storage_offset(), view._is_view()) for view in views}
        left = [STATE.room_behind(view) for view in views]
        if len(forms) != 1 or any(room is None for room in left):
            return
        first, storages = views[0], Storages.of(views).addresses
        room = min(room for room in left if room is not None)
        self._tips.pop(storages[0], None)
        alive = [StorageWeakRef(view.untyped_storage()) for view in views]
        form = first.shape, first.stride(), int(first.storage_offset())
        self._tips[storages[0]] = Tip(storages, alive, *form, room, first.is_inference())
        if len(self._tips) > _TIPS:
            del self._tips[next(iter(self._tips))]


def _part(tensor: torch.Tensor, each: Append) -> torch.Tensor:
    if each.part is None:
        return tensor
    start, end, _ = slice(*each.part).indices(tensor.shape[each.dim])
    sizes, strides = list(tensor.shape), tensor.stride()
    sizes[each.dim] = end - start
    return alias(tensor, sizes, strides, start * strides[each.dim])
