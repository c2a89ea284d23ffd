"""Teaches accelerate, and through it the Hugging Face Trainer, the backend name `fxopt`.

accelerate checks a backend's name against the enum `DynamoBackend` before `torch.compile` can look it up, and
its command line checks it against the list `DYNAMO_BACKENDS`. Both get one more entry.
"""

from __future__ import annotations

from enum import Enum
from types import MappingProxyType, ModuleType
from typing import Any

from fxopt.errors import FxoptError

NAME = "FXOPT"


class UnknownEnumLayout(FxoptError):
    """The member was added and the enum still refuses it."""

    message = "accelerate's DynamoBackend has an unknown layout and still refuses {name!r}"


def extend_dynamo_backends(module: ModuleType) -> str:
    """Add the member `FXOPT` to `accelerate.utils.dataclasses.DynamoBackend`; says what was done.

    Raises:
        UnknownEnumLayout: the enum refuses the name even with the member added.
    """
    backends = getattr(module, "DynamoBackend", None)
    if not (isinstance(backends, type) and issubclass(backends, Enum)):
        return "nothing to do: this accelerate does not check backend names against an enum"
    if _accepts(backends):
        return "nothing to do: accelerate accepts the name"
    _add_member(backends, NAME)
    if not (_accepts(backends) and getattr(backends, NAME) in list(backends)):
        raise UnknownEnumLayout(name=NAME)
    _mention_in_help(module)
    return "accelerate accepts the name since fxopt added it"


def extend_launch_choices(module: ModuleType) -> str:
    """Add `FXOPT` to the names that `accelerate launch` and `accelerate config` offer."""
    names = getattr(module, "DYNAMO_BACKENDS", None)
    if not isinstance(names, list):
        return "nothing to do: this accelerate has no list of backends for its command line"
    if NAME in names:
        return "nothing to do: accelerate's command line offers the name"
    # At the end: the answers of `accelerate config` are positions in this list.
    names.append(NAME)
    return "accelerate's command line offers the name since fxopt added it"


def _accepts(backends: type[Enum]) -> bool:
    try:
        backends(NAME)
    except ValueError:
        return False
    return True


def _add_member(enumeration: Any, name: str) -> None:
    """Add a member whose value is its name, in the way that the class statement itself would have done.

    Python has no public way to extend an enum; the tables written here are the same from 3.10 to 3.14.
    """
    mixin = enumeration._member_type_
    member = object.__new__(enumeration) if mixin is object else mixin.__new__(enumeration, name)
    member._name_ = name
    member._value_ = name
    member.__objclass__ = enumeration
    member._sort_order_ = len(enumeration._member_names_)
    enumeration._member_names_.append(name)
    enumeration._member_map_[name] = member
    enumeration._value2member_map_[name] = member
    hashable_values = getattr(enumeration, "_hashable_values_", None)  # Python 3.12 and newer
    if hashable_values is not None:
        hashable_values.append(name)
    # EnumMeta's own __setattr__ refuses to touch a name that is a member.
    type.__setattr__(enumeration, name, member)


def _mention_in_help(module: ModuleType) -> None:
    """The help text of `TorchDynamoPlugin.backend` was composed from the enum when accelerate was loaded."""
    fields = getattr(getattr(module, "TorchDynamoPlugin", None), "__dataclass_fields__", {})
    field = fields.get("backend")
    metadata = dict(getattr(field, "metadata", None) or {})
    if field is None or "'inductor'" not in metadata.get("help", ""):
        return
    metadata["help"] = metadata["help"].replace("'inductor'", f"'inductor', '{NAME.lower()}'")
    field.metadata = MappingProxyType(metadata)
