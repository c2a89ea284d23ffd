"""The name `FXOPT` in the enum and the list of the accelerate that is installed, and of others to come."""

from __future__ import annotations

import copy
import enum
import pickle
import sys
from dataclasses import dataclass, field, fields
from types import ModuleType
from typing import Any

import pytest

from fxopt.integrations.accelerate import UnknownEnumLayout, extend_dynamo_backends, extend_launch_choices


class Backends(str, enum.Enum):
    NO = "NO"
    INDUCTOR = "INDUCTOR"


@pytest.fixture
def backends(monkeypatch: pytest.MonkeyPatch) -> Any:
    """A fresh enum with accelerate's mixin, which pickle can find in this module."""
    fresh = enum.Enum("Backends", {"NO": "NO", "INDUCTOR": "INDUCTOR"}, type=str, module=__name__)
    monkeypatch.setattr(sys.modules[__name__], "Backends", fresh)
    return fresh


def module_with(**attributes: Any) -> ModuleType:
    module = ModuleType("accelerate.utils.dataclasses")
    module.__dict__.update(attributes)
    return module


def test_added_member_is_like_the_others(backends: Any) -> None:
    assert extend_dynamo_backends(module_with(DynamoBackend=backends)).endswith("since fxopt added it")
    member = backends.FXOPT
    assert backends("FXOPT") is backends["FXOPT"] is member
    assert list(backends) == [backends.NO, backends.INDUCTOR, member]
    assert len(backends) == 3
    assert isinstance(member, backends)
    assert member in backends
    assert (member.name, member.value) == ("FXOPT", "FXOPT")
    assert member == "FXOPT"
    assert hash(member) == hash("FXOPT")
    assert repr(member) == "<Backends.FXOPT: 'FXOPT'>"
    assert backends.__members__["FXOPT"] is member
    assert member != backends.NO
    with pytest.raises(ValueError, match="'OTHER' is not a valid"):
        backends("OTHER")


def test_added_member_is_one_object(backends: Any) -> None:
    extend_dynamo_backends(module_with(DynamoBackend=backends))
    member = backends.FXOPT
    assert copy.deepcopy(member) is member
    assert pickle.loads(pickle.dumps(member)) is member


def test_adding_twice_adds_once(backends: Any) -> None:
    module = module_with(DynamoBackend=backends)
    extend_dynamo_backends(module)
    assert extend_dynamo_backends(module) == "nothing to do: accelerate accepts the name"
    assert [member.name for member in backends] == ["NO", "INDUCTOR", "FXOPT"]


def test_enum_without_a_mixin_is_extended_too() -> None:
    plain = enum.Enum("plain", {"NO": "NO"})  # type: ignore[misc]
    extend_dynamo_backends(module_with(DynamoBackend=plain))
    assert plain("FXOPT").value == "FXOPT"  # type: ignore[call-arg]


def test_accelerate_that_has_the_member_is_left_alone() -> None:
    own = enum.Enum("own", {"NO": "NO", "FXOPT": "FXOPT"}, type=str)  # type: ignore[misc]
    before = dict(own.__members__)
    assert extend_dynamo_backends(module_with(DynamoBackend=own)).startswith("nothing to do")
    assert dict(own.__members__) == before


def test_accelerate_that_accepts_every_name_is_left_alone() -> None:
    class Open(str, enum.Enum):
        NO = "NO"

        @classmethod
        def _missing_(cls, value: object) -> Open:
            return cls.NO

    assert extend_dynamo_backends(module_with(DynamoBackend=Open)).startswith("nothing to do")
    assert list(Open) == [Open.NO]


@pytest.mark.parametrize("attributes", [{}, {"DynamoBackend": str}, {"DynamoBackend": ("NO", "INDUCTOR")}])
def test_accelerate_without_the_enum_is_left_alone(attributes: dict[str, Any]) -> None:
    module = module_with(**attributes)
    before = dict(vars(module))
    assert extend_dynamo_backends(module).startswith("nothing to do")
    assert dict(vars(module)) == before


def test_enum_that_still_refuses_is_an_error() -> None:
    class Refusing(enum.EnumMeta):
        def __call__(cls, value: object, *args: Any, **kwargs: Any) -> Any:
            raise ValueError(value)

    class Closed(enum.Enum, metaclass=Refusing):
        NO = "NO"

    with pytest.raises(UnknownEnumLayout, match="still refuses 'FXOPT'"):
        extend_dynamo_backends(module_with(DynamoBackend=Closed))


def test_help_of_the_plugin_names_the_backend(backends: Any) -> None:
    @dataclass
    class TorchDynamoPlugin:
        backend: str = field(default="no", metadata={"help": "One of ['no', 'inductor']", "x": 1})

    extend_dynamo_backends(module_with(DynamoBackend=backends, TorchDynamoPlugin=TorchDynamoPlugin))
    (described,) = fields(TorchDynamoPlugin)
    assert described.metadata == {"help": "One of ['no', 'inductor', 'fxopt']", "x": 1}


def test_launch_offers_the_name_once_and_at_the_end() -> None:
    module = module_with(DYNAMO_BACKENDS=["EAGER", "INDUCTOR"])
    extend_launch_choices(module)
    extend_launch_choices(module)
    assert module.DYNAMO_BACKENDS == ["EAGER", "INDUCTOR", "FXOPT"]


@pytest.mark.parametrize("attributes", [{}, {"DYNAMO_BACKENDS": ("EAGER",)}])
def test_launch_without_the_list_is_left_alone(attributes: dict[str, Any]) -> None:
    module = module_with(**attributes)
    before = dict(vars(module))
    assert extend_launch_choices(module).startswith("nothing to do")
    assert dict(vars(module)) == before


def test_installed_accelerate() -> None:
    """The routes that check a name, in the accelerate of this environment."""
    from accelerate.commands.config import config_utils
    from accelerate.commands.launch import launch_command_parser
    from accelerate.utils import DynamoBackend, TorchDynamoPlugin

    plugin = TorchDynamoPlugin(backend="fxopt", use_regional_compilation=True)
    assert plugin.backend is DynamoBackend.FXOPT
    assert plugin.to_kwargs()["backend"] == "fxopt"
    assert copy.deepcopy(plugin).backend is plugin.backend
    position = config_utils.DYNAMO_BACKENDS.index("FXOPT")
    assert config_utils._convert_dynamo_backend(position) == "FXOPT"
    assert config_utils._convert_dynamo_backend(2) == "INDUCTOR"
    parsed = launch_command_parser().parse_args(["--dynamo_backend", "fxopt", "train.py"])
    assert parsed.dynamo_backend == "fxopt"
