"""Objects that change at each step of a decoding loop, such as a cache: whether anyone else changes them.

What the step itself does to them is known. So it is enough that between two steps nothing happens to them.
"""

from __future__ import annotations

import types
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from fxopt.runtime.relied import CONSTANT, Unknown, same_items
from fxopt.runtime.step_loops import CURRENT, Loops

# A place where a step stores a new tensor: an object's dict, and the name.
Site = tuple[dict[str, Any], str]


@dataclass
class Watched:
    """Objects, and what they hold.

    Attributes:
        objects: those with attributes. kinds: their classes. attributes: their dicts.
        dicts: of the objects, and others. lists: with what is in them.
        loops: with which `versions` were read.
        versions: of the dicts, when the last step had ended.
    """

    objects: list[Any]
    kinds: list[type]
    attributes: list[dict[str, Any]]
    dicts: list[dict[Any, Any]]
    lists: list[tuple[list[Any], list[Any]]]
    loops: Loops
    versions: Any = None

    @staticmethod
    def below(roots: Iterable[Any]) -> Watched:
        """Everything that `roots` hold, tensors excepted.

        Raises:
            Unknown: an object can change in ways that are not noticed.
        """
        found = Watched([], [], [], [], [], CURRENT.loops)
        seen: set[int] = set()
        waiting = list(roots)
        while waiting:
            value = waiting.pop()
            if id(value) not in seen:
                seen.add(id(value))
                waiting += found._add(value)
        found.kinds, found.attributes = list(map(type, found.objects)), list(map(vars, found.objects))
        found.after_a_step()
        return found

    def _add(self, value: Any) -> Iterable[Any]:
        if isinstance(value, tuple):
            return value
        if isinstance(value, (torch.Tensor, type, types.FunctionType, *CONSTANT)):
            return ()
        if isinstance(value, list):
            self.lists.append((value, list(value)))
            return value
        if isinstance(value, dict):
            self.dicts.append(value)
            return list(value.values())
        held = getattr(value, "__dict__", None)
        if not isinstance(held, dict) or isinstance(value, torch.nn.Module):
            raise Unknown(f"a {type(value).__name__} is an argument")
        self.objects.append(value)
        return (held,)

    def ids(self) -> set[int]:
        """The ids of all that is watched."""
        return {id(each) for each in (*self.objects, *self.dicts, *(now for now, _ in self.lists))}

    def after_a_step(self) -> None:
        """What there is now is to stay until the next step."""
        self.versions = self.loops.versions(self.dicts)

    def untouched(self) -> bool:
        """Nothing has changed since `after_a_step`."""
        return (
            self.loops.versions_are(self.dicts, self.versions)
            and self.loops.types_are(self.objects, self.kinds)
            and self.loops.dicts_are(self.objects, self.attributes)
            and all(same_items(now, then) for now, then in self.lists)
        )

    def content(self, sites: Sequence[Site]) -> list[list[tuple[Any, int]]]:
        """What dicts and lists hold, without what is stored at `sites`; for comparing two steps."""
        excepted = {(id(held), name) for held, name in sites}
        named = [
            [(key, id(value)) for key, value in held.items() if (id(held), key) not in excepted]
            for held in self.dicts
        ]
        return named + [[(place, id(value)) for place, value in enumerate(held)] for _, held in self.lists]
