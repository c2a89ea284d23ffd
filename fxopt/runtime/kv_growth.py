"""One step of all growing tensors of a graph.

A step usually gets exactly the views that the step before handed out. Then one check for all of them is
enough, and what remains is a view for each: `Tip`. Otherwise each is looked at by itself (`KVState.extend`).
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from operator import add, itemgetter, le
from typing import Any

import torch
from torch.multiprocessing.reductions import StorageWeakRef

from fxopt.runtime.holders import references_of_a_call
from fxopt.runtime.kv_state import STATE, when_alone
from fxopt.runtime.step_loops import CURRENT, alias

# Of so many caches in use by turns the newest views are known.
_TIPS = 64

_is_view = torch.Tensor._is_view


@dataclass(frozen=True)
class Length:
    """A number of rows: `number`; or the input at `place`, or one of its sizes, times `factor`, plus `added`.

    There `number` is an example.
    """

    number: int
    place: int | None = None
    dim: int | None = None
    factor: int = 1
    added: int = 0

    def of(self, inputs: Sequence[Any]) -> int:
        if self.place is None:
            return self.number
        given = inputs[self.place]
        return self.added + self.factor * int(given if self.dim is None else given.shape[self.dim])


@dataclass(frozen=True)
class Begin:
    """An output that is the first rows of a cache.

    Attributes:
        output: position among the outputs that the caller gets.
        dim: the dimension that is going to grow.
        bounded: the cache keeps only the newest rows, so that its length is known to end somewhere.
        part: the slice of the rows that the cache keeps, where the graph gives out all: start and end, as
            Python's slices have them.
    """

    output: int
    dim: int
    bounded: bool
    part: tuple[Length, Length] | None

    def kept(self, rows: int, inputs: Sequence[Any]) -> tuple[int, int]:
        """Of so many rows: the first that the cache keeps, and how many."""
        if self.part is None:
            return 0, rows
        first, last = self.part
        start, end, _ = slice(first.of(inputs), last.of(inputs)).indices(rows)
        return start, end - start

    def kept_of(self, tensor: torch.Tensor, inputs: Sequence[Any]) -> torch.Tensor:
        """The rows of a tensor that the cache keeps, in its memory."""
        if self.part is None:
            return tensor
        start, rows = self.kept(tensor.shape[self.dim], inputs)
        if rows == tensor.shape[self.dim]:
            return tensor
        sizes, strides = _sizes(tensor.shape, self.dim, rows), tensor.stride()
        return alias(tensor, sizes, strides, start * strides[self.dim])


@dataclass(frozen=True)
class Append(Begin):
    """An output that is an input with rows behind it.

    Attributes:
        source: position of the input.
        new: how many rows.
        measured: a size, stride or offset of the input is an input, too.
        total: rows of the memory that the graph takes, where it takes all of it.
    """

    source: int
    new: Length
    measured: bool
    total: int | None = None


@dataclass
class Form:
    """What some tensors of a step have in common.

    Attributes:
        append: how they grow. shape: of each, when the first step ended.
        rows: of each, now. stride: entries from one row to the next. strides: all.
        entry: bytes of an entry. bytes_of_row: of all entries of a row.
    """

    append: Append
    shape: torch.Size
    strides: tuple[int, ...]
    entry: int

    def __post_init__(self) -> None:
        dim = self.append.dim
        self.rows, self.stride = self.shape[dim], self.strides[dim]
        self.bytes_of_row = self.entry * math.prod(_sizes(self.shape, dim, 1))

    def size(self) -> int:
        """Bytes of one tensor."""
        return self.rows * self.bytes_of_row

    def sizes(self, rows: int) -> tuple[int, ...]:
        """With so many rows."""
        return _sizes(self.shape, self.append.dim, rows)


def _sizes(shape: Sequence[int], dim: int, rows: int) -> tuple[int, ...]:
    return (*shape[:dim], rows, *shape[dim + 1 :])


class Tip:
    """What one step handed out.

    Attributes:
        left: rows that fit behind those of every tensor.
    """

    def __init__(self, views: Sequence[torch.Tensor], appends: Sequence[Append], left: int) -> None:
        self.left = left
        self._inference = views[0].is_inference()
        self._pointers = [view.data_ptr() for view in views]
        storages = [view.untyped_storage() for view in views]
        # Keeps other storages from getting these addresses.
        self._alive = [StorageWeakRef(storage) for storage in storages]
        forms: dict[Any, Form] = {}
        kinds = []
        for view, each in zip(views, appends, strict=True):
            kinds.append((each.dim, each.part, view.shape, view.stride(), view.dtype))
            forms.setdefault(kinds[-1], Form(each, view.shape, view.stride(), view.element_size()))
        self._forms = list(forms.values())
        self._of_each = _picked([list(forms).index(kind) for kind in kinds])
        self._dims = {each.dim for each in appends}

    def is_what(self, pasts: Sequence[torch.Tensor]) -> bool:
        """These are the tensors, by their memory, which nobody else has.

        Guards of Dynamo's tell that all their sizes are right but one, and the strides.
        """
        loops, sizes = CURRENT.loops, self._of_each([form.size() for form in self._forms])
        return loops.are_alone(pasts, self._pointers, sizes, when_alone(loops, False))

    def extended(
        self, pasts: Sequence[torch.Tensor], new: int, inputs: Sequence[Any]
    ) -> tuple[Sequence[torch.Tensor], Sequence[torch.Tensor]] | None:
        """For each of these, the tensor with room for new rows, and what the cache holds afterwards.

        Returns:
            None where it is not known that these rows can be written in place.
        """
        if not self._fits(pasts, new):
            return None
        aliases, kept = CURRENT.loops.aliases, self.kept(new, inputs)
        strides = self._of_each([form.strides for form in self._forms])
        whole = self._of_each([form.sizes(form.rows + new) for form in self._forms])
        grown = handed_out = aliases(pasts, whole, strides, [0] * len(pasts))
        if any(start for start, _ in kept):
            parts = [form.sizes(rows) for form, (_, rows) in zip(self._forms, kept, strict=True)]
            first = [start * form.stride for form, (start, _) in zip(self._forms, kept, strict=True)]
            handed_out = aliases(pasts, self._of_each(parts), strides, self._of_each(first))
        self._note(new, kept, self._moved(kept))
        return grown, handed_out

    def resized(self, pasts: Sequence[torch.Tensor], new: int, inputs: Sequence[Any]) -> Resized | None:
        """The same, but the caches' own tensors get the new rows: nobody else may hold these objects."""
        alike = len(self._dims) == 1 and self._fits(pasts, new)
        return Resized(self, pasts, new, self.kept(new, inputs)) if alike else None

    def kept(self, new: int, inputs: Sequence[Any]) -> list[tuple[int, int]]:
        """`Append.kept` of each form, with new rows."""
        return [form.append.kept(form.rows + new, inputs) for form in self._forms]

    def _fits(self, pasts: Sequence[torch.Tensor], new: int) -> bool:
        return (
            new <= self.left and self._inference == torch.is_inference_mode_enabled() and self.is_what(pasts)
        )

    def _moved(self, kept: Sequence[tuple[int, int]]) -> list[int]:
        """Where what the cache keeps begins."""
        if not any(start for start, _ in kept):
            return self._pointers
        further = [
            start * form.stride * form.entry for form, (start, _) in zip(self._forms, kept, strict=True)
        ]
        return list(map(add, self._pointers, self._of_each(further)))

    def _note(self, new: int, kept: Sequence[tuple[int, int]], pointers: list[int]) -> None:
        """The caches hold these of their rows from now on."""
        self.left -= new
        self._pointers = pointers
        for form, (_, rows) in zip(self._forms, kept, strict=True):
            form.rows = rows


class Resized:
    """The tensors of a cache while a step runs that writes new rows behind theirs.

    Making a tensor takes longer than all that is checked before. So the objects that the cache holds get
    other sizes. A step that fails gives them back as they were.

    Attributes:
        grown: with room for the new rows.
    """

    def __init__(
        self, tip: Tip, pasts: Sequence[torch.Tensor], new: int, kept: Sequence[tuple[int, int]]
    ) -> None:
        """Args: kept: see `Tip.kept`."""
        self._tip, self._pasts, self._new, self._kept = tip, pasts, new, kept
        (self._dim,) = tip._dims
        self._pointers, self._rows = tip._pointers, [form.rows for form in tip._forms]
        self.grown: Sequence[torch.Tensor] = ()

    def __enter__(self) -> Resized:
        try:
            self.grown = self._resize(self._pasts, [rows + self._new for rows in self._rows], self._pointers)
        except BaseException:
            self.__exit__(RuntimeError)
            raise
        return self

    def handed_out(self) -> Sequence[torch.Tensor]:
        """What the cache holds from now on; to be called when the step has run."""
        tip = self._tip
        kept = self._kept
        pointers = tip._moved(kept)
        if pointers is not self._pointers:
            self.grown = self._resize(self.grown, [rows for _, rows in kept], pointers)
        tip._note(self._new, kept, pointers)
        return self.grown

    def __exit__(self, kind: Any, *error: Any) -> None:
        if kind is not None:
            self._resize(self._pasts, self._rows, self._pointers)

    def _resize(
        self, tensors: Sequence[torch.Tensor], rows: Sequence[int], pointers: Sequence[int]
    ) -> Sequence[torch.Tensor]:
        return CURRENT.loops.resized(tensors, self._dim, self._tip._of_each(rows), pointers)


def _picked(places: Sequence[int]) -> Callable[[Sequence[Any]], tuple[Any, ...]]:
    """A function that gives the values at `places`."""
    return itemgetter(*places) if len(places) > 1 else lambda values: (values[places[0]],)


class Growth:
    """The growing tensors of one graph, step by step."""

    def __init__(self, appends: Sequence[Append], together: bool = False) -> None:
        """Args: together: get more room at one step, not each at another."""
        self.appends = appends
        self.shares = shares(len(appends), together)
        self._tips: dict[int, Tip] = {}
        self._as_many = len({each.new for each in appends}) == 1

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
                past, each.dim, each.new.of(inputs), share,
                bounded=each.bounded, alone=count <= most, total=each.total,
            )
            for past, each, share, count, most in zip(
                pasts, self.appends, self.shares, held, allowed, strict=True
            )
        ]  # fmt: skip
        handed_out = [each.kept_of(tensor, inputs) for each, tensor in zip(self.appends, grown, strict=True)]
        if self._as_many:
            self._remember(handed_out)
        return grown, handed_out

    def at_tip(
        self, pasts: Sequence[torch.Tensor], inputs: Sequence[Any]
    ) -> tuple[Sequence[torch.Tensor], Sequence[torch.Tensor]] | None:
        """What `of` gives where these are what the step before handed out; otherwise None.

        Args:
            pasts: the caches, that nobody else holds. inputs: of the call.
        """
        tip = self._tip(pasts)
        found = None if tip is None else tip.extended(pasts, self.appends[0].new.of(inputs), inputs)
        if found is not None:
            STATE.in_place += len(pasts)
        return found

    def resized(self, pasts: Sequence[torch.Tensor], inputs: Sequence[Any]) -> Resized | None:
        """Likewise, as `Tip.resized`."""
        tip = self._tip(pasts)
        found = None if tip is None else tip.resized(pasts, self.appends[0].new.of(inputs), inputs)
        if found is not None:
            STATE.in_place += len(pasts)
        return found

    def _tip(self, pasts: Sequence[torch.Tensor]) -> Tip | None:
        return self._tips.get(pasts[0].untyped_storage()._cdata) if pasts else None

    def _remember(self, views: Sequence[torch.Tensor]) -> None:
        left = [STATE.room_behind(view) for view in views]
        known = [room for room in left if room is not None]
        alike = len({view.is_inference() for view in views}) == 1 and not any(map(_is_view, views))
        if len(known) < len(views) or not alike:
            return
        first = views[0].untyped_storage()._cdata
        self._tips.pop(first, None)
        self._tips[first] = Tip(views, self.appends, min(known))
        if len(self._tips) > _TIPS:
            del self._tips[next(iter(self._tips))]


def shares(count: int, together: bool) -> list[float]:
    """`share` of `capacity_for`, for each of the tensors of one graph."""
    return [1.0 if together else number / max(count - 1, 1) for number in range(count)]
