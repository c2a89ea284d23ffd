"""Integers that change from one decoding step to the next: lengths of caches, places of windows, and counts.

Dynamo has a source for each of them, and most are equal: all keys and values of layers of one kind have as
many rows. So a step reads one of each kind. That the others are equal still is known, as all of them grew
together from where they were equal (`Tip`).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from fxopt.runtime.frames import Frame
from fxopt.runtime.kv_calls import GrowingCall
from fxopt.runtime.relied import Unknown
from fxopt.runtime.watched import Site, Watched

# What `Numbers.of` gives is called in guards.
NAME = "_numbers"


@dataclass
class Numbers:
    """Where the numbers are read, in this order.

    Attributes:
        rows: of these caches, by place; `dim` is the dimension that grows.
        offsets: of these caches, windows that move through their memory.
        counts: integers that objects hold.
        places: of each source, in what `of` gives.
    """

    dim: int
    rows: list[int] = field(default_factory=list)
    offsets: list[int] = field(default_factory=list)
    counts: list[Site] = field(default_factory=list)
    places: dict[str, int] = field(default_factory=dict)

    def of(self, pasts: Sequence[torch.Tensor]) -> list[Any] | None:
        """The numbers of a step over these caches; None where an object holds something else."""
        found: list[Any] = [pasts[place].shape[self.dim] for place in self.rows]
        found += [pasts[place].storage_offset() for place in self.offsets]
        for held, name in self.counts:
            found.append(held.get(name))
            if type(found[-1]) is not int:
                return None
        return found

    def texts(self) -> dict[str, str]:
        """What to write in guards, in place of sources."""
        return {source: f"{NAME}[{place}]" for source, place in self.places.items()}


def numbers_of(call: GrowingCall, frame: Frame, inputs: Sequence[Any], counts: Mapping[str, Site]) -> Numbers:
    """Those of a call with these inputs. `counts`: see `counted`."""
    rows: dict[Any, list[str]] = {}
    offsets: dict[Any, list[str]] = {}
    found = Numbers(call.appends[0].dim)
    for number, (place, append) in enumerate(zip(call.places, call.appends, strict=True)):
        source, tensor = frame.sources[place], inputs[place]
        kind = (tensor.shape[append.dim], append.part)
        if kind not in rows:
            found.rows.append(number)
        rows.setdefault(kind, []).append(f"{source}.size()[{append.dim}]")
        if append.part is not None:
            where = (*kind, tensor.storage_offset(), tensor.stride(append.dim))
            if where not in offsets:
                found.offsets.append(number)
            offsets.setdefault(where, []).append(f"{source}.storage_offset()")
    found.counts = list(counts.values())
    groups = [*rows.values(), *offsets.values(), *([source] for source in counts)]
    found.places = {source: place for place, sources in enumerate(groups) for source in sources}
    return found


def counted(frame: Frame, inputs: Sequence[Any], scope: dict[str, Any], watched: Watched) -> dict[str, Site]:
    """The inputs that are integers which watched objects hold: their sources, and where they are held."""
    ids, found = {id(held) for held in watched.dicts}, {}
    for source, value in zip(frame.sources, inputs, strict=False):
        if type(value) is int and source and not source.endswith(("]", ")")):
            site = site_of(source, scope)
            if id(site[0]) in ids:
                found[source] = site
    return found


def site_of(source: str, scope: dict[str, Any]) -> Site:
    """Where an object holds what `source` stands for.

    Raises:
        Unknown: none does.
    """
    holder, _, name = source.rpartition(".")
    held = getattr(eval(holder, dict(scope)), "__dict__", {})
    if name not in held:
        raise Unknown(f"no attribute {source}")
    return held, name
