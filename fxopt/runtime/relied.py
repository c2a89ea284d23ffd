"""What the guards of one compiled frame look at, as a few comparisons.

Dynamo checks each value that it has seen while compiling, one by one. Nearly all of them live in dicts: the
attributes of modules, their parameters, the globals of Python modules, classes. A dict has a version that
changes with it. So as long as the same guards held once, and no dict that they look into has changed, and
what else they read is the same object, they still hold.

Uses private torch APIs, listed in docs/torch_apis.md.
"""

from __future__ import annotations

import enum
import gc
import types
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from operator import is_
from typing import Any

import torch

from fxopt.runtime.step_loops import CURRENT, Loops, PythonLoops

# What cannot change, or has nothing of its own that could.
CONSTANT = (
    type(None), bool, int, float, complex, str, bytes, tuple, frozenset, range, slice, enum.Enum,
    types.CodeType, types.BuiltinFunctionType, types.MethodType, types.MethodDescriptorType,
    types.WrapperDescriptorType, types.GetSetDescriptorType, types.MemberDescriptorType, property,
    staticmethod, classmethod, torch.dtype, torch.device, torch.layout, torch.memory_format,
)  # fmt: skip


class Unknown(Exception):  # noqa: N818 - a reason to go the slow way
    """What a guard relies on cannot be told."""


@dataclass
class Relied:
    """Values that guards look at.

    Attributes:
        dicts: whose content counts. objects: whose class counts.
        lists: with what is in them. functions: with their code and defaults. cells: with what they hold.
        tensors: whose sizes, strides, dtype and device count.
    """

    dicts: dict[int, dict[Any, Any]] = field(default_factory=dict)
    objects: dict[int, Any] = field(default_factory=dict)
    lists: dict[int, tuple[list[Any], list[Any]]] = field(default_factory=dict)
    functions: dict[int, types.FunctionType] = field(default_factory=dict)
    cells: dict[int, types.CellType] = field(default_factory=dict)
    tensors: dict[int, torch.Tensor] = field(default_factory=dict)

    def add(self, value: Any) -> None:
        """Note one value.

        Raises:
            Unknown: it can change in ways that are not noticed.
        """
        if isinstance(value, torch.Tensor):
            self.tensors[id(value)] = value
        elif isinstance(value, type):
            for held in gc.get_referents(vars(value)):
                if isinstance(held, dict):
                    self.dicts[id(held)] = held
        elif isinstance(value, types.FunctionType):
            self.functions[id(value)] = value
            self.cells.update((id(cell), cell) for cell in value.__closure__ or ())
        elif isinstance(value, list):
            self.lists[id(value)] = (value, list(value))
        elif isinstance(value, dict):
            self.dicts[id(value)] = value
        elif isinstance(value, types.CellType):
            self.cells[id(value)] = value
        elif not isinstance(value, CONSTANT) and type(value) is not object:  # a sentinel: it holds nothing
            self._add_object(value)

    def _add_object(self, value: Any) -> None:
        held = getattr(value, "__dict__", None)
        if not isinstance(held, dict):
            raise Unknown(f"a {type(value).__name__}")
        self.dicts[id(held)] = held
        self.objects[id(value)] = value

    def checks(self) -> Callable[[], bool]:
        """A function that says whether everything is as it is now."""
        functions, objects = list(self.functions.values()), list(self.objects.values())
        cells, lists = list(self.cells.values()), list(self.lists.values())
        unchanged = _unchanged(list(self.dicts.values()), functions)
        kinds, held = list(map(type, objects)), list(map(_content, cells))

        def hold() -> bool:
            return (
                unchanged()
                and CURRENT.loops.types_are(objects, kinds)
                and all(same_items(now, then) for now, then in lists)
                and same_items(list(map(_content, cells)), held)
            )

        return hold


def _content(cell: types.CellType) -> Any:
    try:
        return cell.cell_contents
    except ValueError:
        return None


def same_items(now: Sequence[Any], then: Sequence[Any]) -> bool:
    """Both hold the same objects."""
    return len(now) == len(then) and all(map(is_, now, then))


class _Dicts:
    """Dicts whose versions are checked all at once: see `_unchanged_dicts`."""

    def __init__(self, dicts: Sequence[dict[Any, Any]]) -> None:
        self.values = tuple(dicts)


def _unchanged(
    dicts: Sequence[dict[Any, Any]], functions: Sequence[types.FunctionType]
) -> Callable[[], bool]:
    """Whether no dict was changed, and no function has got other code or defaults."""
    loops = CURRENT.loops
    codes, keywords = loops.codes(functions), [each.__kwdefaults__ for each in functions]
    same_dicts = _unchanged_dicts(loops, [*dicts, *(each for each in keywords if each is not None)])
    return lambda: same_dicts() and loops.codes_are(functions, codes)


def _unchanged_dicts(loops: Loops, dicts: Sequence[dict[Any, Any]]) -> Callable[[], bool]:
    """Whether no dict was changed.

    A root that is marked as safe for tags notes the versions of all dicts below it when it is first checked,
    and then compares those alone, one behind the other; from Python 3.12 on not even that, as dicts tell it
    of changes, unless they are empty and filled from another dict. Until then `Loops.versions`, where it is
    compiled, needs less: behind a step of the model the dicts are no longer in the processor's caches, and it
    has them fetched ahead.
    """
    from torch._C._dynamo.guards import RootGuardManager

    if loops.versions is not PythonLoops.versions:
        versions = loops.versions(dicts)
        return lambda: loops.versions_are(dicts, versions)
    root, holder = RootGuardManager(), _Dicts(dicts)
    top = _below(root.tuple_getitem_manager, holder, key=0)
    items = _below(top.getattr_manager, holder.values, attr="values")
    for place, held in enumerate(dicts):
        child = _below(items.tuple_getitem_manager, held, key=place)
        _add_guard(child.add_dict_version_guard, held)
        child.mark_tag_safe()
    items.mark_tag_safe()
    top.mark_tag_safe()
    top.mark_tag_safe_root()
    values, empty = (holder,), [each for each in dicts if not each]
    return lambda: bool(root.check(values)) and not any(empty)


def _below(make: Callable[..., Any], value: Any, **how: Any) -> Any:
    from torch._dynamo.guards import GuardManagerType

    return make(**how, source="", example_value=value, guard_manager_enum=GuardManagerType.GUARD_MANAGER)


def _add_guard(add: Callable[..., None], value: Any) -> None:
    try:
        add(value, [""], None)
    except TypeError:  # older versions of torch take no stack
        add(value, [""])


def relied_on(guards: Any, scope: dict[str, Any], without: set[int]) -> Relied:
    """What the guards of a compiled frame look at.

    Args:
        guards: the `GuardManagerWrapper` of the frame.
        scope: `L` and `G`, the names that the sources of guards begin with.
        without: the ids of values that are checked otherwise.

    Raises:
        Unknown: some of it cannot be told.
    """
    relied = Relied()
    for source in {manager.get_source() for manager in _managers(guards.root)} - {"L", ""}:
        try:
            value = eval(source, {**(guards.closure_vars or {}), **scope})
        except Exception as error:
            raise Unknown(source) from error
        if id(value) not in without and id(getattr(value, "__dict__", None)) not in without:
            relied.add(value)
    return relied


def _managers(manager: Any) -> Iterator[Any]:
    yield manager
    pairs: Any = getattr(manager, "get_key_value_managers", dict)().values()
    children = [child for pair in pairs for child in pair if child is not None]
    for child in [*children, *manager.get_child_managers()]:
        yield from _managers(child)
