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
        elif not isinstance(value, CONSTANT):
            self._add_object(value)

    def _add_object(self, value: Any) -> None:
        held = getattr(value, "__dict__", None)
        if not isinstance(held, dict):
            raise Unknown(f"a {type(value).__name__}")
        self.dicts[id(held)] = held
        self.objects[id(value)] = value

    def checks(self) -> Callable[[], bool]:
        """A function that says whether everything is as it is now."""
        dicts, objects = list(self.dicts.values()), list(self.objects.values())
        functions, cells = list(self.functions.values()), list(self.cells.values())
        lists = list(self.lists.values())
        unchanged = _unchanged(dicts, objects, functions)
        held = [_content(cell) for cell in cells]

        def hold() -> bool:
            return (
                unchanged()
                and all(same_items(now, then) for now, then in lists)
                and same_items([_content(cell) for cell in cells], held)
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


def _unchanged(
    dicts: Sequence[dict[Any, Any]], objects: Sequence[Any], functions: Sequence[types.FunctionType]
) -> Callable[[], bool]:
    """Whether no dict was changed, no object has got another class, no function other code; in C++.

    From Python, reading the code of a function raises an audit event, which takes longer than all the rest.
    """
    from torch._C._dynamo.guards import RootGuardManager
    from torch._dynamo.guards import GuardManagerType

    root, values = RootGuardManager(), (*dicts, *objects, *functions)
    kind = GuardManagerType.GUARD_MANAGER

    def below(make: Callable[..., Any], value: Any, **how: Any) -> Any:
        return make(**how, source=f"{len(how)}", example_value=value, guard_manager_enum=kind)

    for place, value in enumerate(values):
        child = below(root.tuple_getitem_manager, value, key=place)
        if place < len(dicts):
            _add_guard(child.add_dict_version_guard, value)
        elif place < len(dicts) + len(objects):
            _add_guard(child.add_type_match_guard, id(type(value)))
        else:
            code = below(child.code_manager, value.__code__)
            _add_guard(code.add_id_match_guard, id(value.__code__))
            if value.__defaults__ is not None:
                defaults = below(child.func_defaults_manager, value.__defaults__)
                _add_guard(defaults.add_id_match_guard, id(value.__defaults__))
            if value.__kwdefaults__ is not None:
                keywords = below(child.func_kwdefaults_manager, value.__kwdefaults__)
                _add_guard(keywords.add_dict_version_guard, value.__kwdefaults__)
    # What is known by its id is kept, so that nothing else gets that id.
    values += tuple((value.__code__, value.__defaults__) for value in functions)
    return lambda: bool(root.check(values))


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
