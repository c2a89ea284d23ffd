"""What a command looks at: `module:function`, a saved model, a model id, or the name of an architecture."""

from __future__ import annotations

import importlib
import importlib.util
import inspect
import os
import sys
import traceback
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from fxopt.errors import UserError
from fxopt.measure.full_models import FULL
from fxopt.measure.models import Subject, build, from_config, with_inputs
from fxopt.measure.shrink import SCALES, Scale
from fxopt.options import nearest


class UnknownTarget(UserError, ValueError):
    """Neither a function, nor a directory, nor an architecture."""

    message = (
        "{target!r} is no module:function, no directory with a config.json and no model type that "
        "transformers knows.{nearest}"
    )


class TargetFunctionError(UserError, ValueError):
    """`module:function` cannot be used."""

    message = (
        "{target!r}: {reason}. It must name a function without required parameters that returns "
        "(model, args, kwargs), (model, inputs) or a transformers model."
    )


class ModelUnavailable(UserError, OSError):
    """A directory or a model id that transformers cannot load."""

    message = "the model {target!r} cannot be loaded: {reason}."


class UnknownChoice(UserError, ValueError):
    """A flag with a value that is not one of its values."""

    message = "{flag} has no value {value!r}. Valid values: {valid}."


class DeviceUnavailable(UserError, RuntimeError):
    """A device that torch does not know, or has not here."""

    message = "device {device!r} cannot be used here: {reason}. `fxopt doctor` lists the devices."


@dataclass(frozen=True)
class Request:
    """How the target is to be built.

    Attributes:
        size: a key of `SCALES`; used for model types only: a saved model and one of `FULL` have their own
            size. With `full` a model type is as `small` makes it.
        batch, seq: of generated inputs; None is the size's own.
        dtype: `float32`, `bfloat16`, `float16`, `float64`.
        attention: `attn_implementation`; None is transformers' default.
        layers: of model types; None is the size's own.
    """

    size: str = "tiny"
    batch: int | None = None
    seq: int | None = None
    dtype: str = "float32"
    attention: str | None = None
    training: bool = False
    device: str = "cpu"
    layers: int | None = None

    def validate(self) -> None:
        """Check all of it.

        Raises:
            UnknownChoice, DeviceUnavailable.
        """
        self.scale(), self.torch_dtype(), self.torch_device()
        if self.attention is None or "/" in self.attention:  # a kernel of the hub
            return
        from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

        valid = ("eager", *ALL_ATTENTION_FUNCTIONS.valid_keys())
        if self.attention not in valid:
            raise UnknownChoice(flag="--attn", value=self.attention, valid=", ".join(valid))

    def scale(self) -> Scale:
        """The sizes asked for.

        Raises:
            UnknownChoice: there is no such size.
        """
        if self.size not in (*SCALES, "full"):
            raise UnknownChoice(flag="--size", value=self.size, valid=", ".join((*SCALES, "full")))
        given = {name: getattr(self, name) for name in ("batch", "seq", "layers") if getattr(self, name)}
        return Scale(**{**vars(SCALES.get(self.size, SCALES["small"])), **given})

    def torch_dtype(self) -> torch.dtype:
        """The dtype asked for.

        Raises:
            UnknownChoice: not a floating dtype that a model can have.
        """
        dtypes = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
        dtypes |= {
            "float64": torch.float64,
            "fp32": torch.float32,
            "bf16": torch.bfloat16,
            "fp16": torch.float16,
        }
        if self.dtype not in dtypes:
            raise UnknownChoice(flag="--dtype", value=self.dtype, valid=", ".join(dtypes))
        return dtypes[self.dtype]

    def torch_device(self) -> torch.device:
        """The device asked for.

        Raises:
            DeviceUnavailable: torch cannot make a tensor there.
        """
        try:
            return torch.empty(0, device=self.device).device
        except (RuntimeError, AssertionError, ImportError) as error:
            raise DeviceUnavailable(device=self.device, reason=_first_line(error)) from error


def check(target: str, request: Request, suites: Iterable[str] = ()) -> None:
    """Raise what `resolve` would raise, as far as it can be known without building a model.

    Args:
        suites: of benchmarks, which the user may have meant.
    """
    request.validate()
    if not (":" in target or Path(target).exists()):
        _model_type(target, suites)


def _model_type(target: str, suites: Iterable[str] = ()) -> str | None:
    """As transformers spells it; None for a name of `FULL` and for an id of the hub.

    Raises:
        UnknownTarget, ModelUnavailable.
    """
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING_NAMES

    known = {name.replace("_", "-"): name for name in CONFIG_MAPPING_NAMES}
    name = known.get(target.replace("_", "-"))
    if name is not None or target.lower() in FULL:
        return name
    if "/" not in target or target.startswith(("/", "./", "../", "~")):
        close = nearest("suites", target, suites) + nearest("model types", target, known)
        raise UnknownTarget(target=target, nearest=close)
    if _is_offline():
        raise ModelUnavailable(
            target=target, reason="it is a model id, and HF_HUB_OFFLINE forbids to fetch it"
        )
    return None


def resolve(target: str, request: Request, **overrides: Any) -> Subject:
    """The model that `target` names, with inputs.

    Args:
        overrides: configuration attributes, for model types only.

    Raises:
        UnknownTarget, TargetFunctionError, ModelUnavailable, UnknownChoice, DeviceUnavailable, CannotBuild.
    """
    request.validate()
    scale, dtype = request.scale(), request.torch_dtype()
    path = Path(target)
    if ":" in target and not path.exists():
        subject = _from_function(target, scale, request, dtype)
    elif path.exists():
        subject = _from_directory(path, scale, request, dtype)
    else:
        subject = _from_name(target, scale, request, dtype, overrides)
    return subject.to(request.device)


def _from_name(
    target: str, scale: Scale, request: Request, dtype: torch.dtype, overrides: dict[str, Any]
) -> Subject:
    if target.lower() in FULL:
        return _of_full_size(target.lower(), request, dtype)
    name = _model_type(target)
    if name is not None:
        return build(
            name,
            scale,
            attention=request.attention,
            dtype=dtype,
            training=request.training,
            overrides=overrides,
        )
    return _load(target, scale, request, dtype)


def _of_full_size(name: str, request: Request, dtype: torch.dtype) -> Subject:
    """A published configuration with random weights, made on the device."""
    import transformers

    full = FULL[name]
    config = transformers.AutoConfig.for_model(full.kind, **full.config)
    scale = Scale(batch=request.batch or full.batch, seq=request.seq or full.seq)
    how: dict[str, Any] = {"attention": request.attention, "training": request.training}
    return from_config(config, scale, dtype=dtype, device=request.device, **how)


def _from_directory(path: Path, scale: Scale, request: Request, dtype: torch.dtype) -> Subject:
    """A saved model; one that has a config.json and no weights gets random ones."""
    from transformers import AutoConfig

    if path.suffix == ".py":
        raise TargetFunctionError(target=str(path), reason=f"which function of it? Name it, {path}:function")
    folder = path.parent if path.is_file() else path
    if not (folder / "config.json").is_file():
        raise ModelUnavailable(target=str(path), reason="there is no config.json in it")
    if any(folder.glob("*.safetensors")) or any(folder.glob("*.bin")):
        return _load(str(folder), scale, request, dtype)
    try:
        config = AutoConfig.from_pretrained(folder)
    except Exception as error:  # of the reader of whichever format
        raise ModelUnavailable(target=str(path), reason=_first_line(error)) from error
    return from_config(config, scale, attention=request.attention, dtype=dtype, training=request.training)


def _load(target: str, scale: Scale, request: Request, dtype: torch.dtype) -> Subject:
    from transformers import AutoConfig

    from fxopt.measure.models import model_class

    extra = {} if request.attention is None else {"attn_implementation": request.attention}
    try:
        config = AutoConfig.from_pretrained(target)
        model = model_class(config).from_pretrained(target, dtype=dtype, **extra)
    except Exception as error:  # of the reader of whichever format
        raise ModelUnavailable(target=target, reason=_first_line(error)) from error
    return with_inputs(model, scale, training=request.training)


def _from_function(target: str, scale: Scale, request: Request, dtype: torch.dtype) -> Subject:
    from transformers import PreTrainedModel

    function = _function(target)
    missing = _required(function)
    if missing:
        raise TargetFunctionError(target=target, reason=f"it wants arguments ({missing})")
    try:
        result = function()
    except Exception as error:
        raise TargetFunctionError(target=target, reason=_raised(error)) from error
    if isinstance(result, PreTrainedModel):
        return with_inputs(result.to(dtype), scale, training=request.training)
    if not isinstance(result, tuple) or not 2 <= len(result) <= 3 or not callable(result[0]):
        raise TargetFunctionError(target=target, reason=f"it returned {type(result).__name__}")
    model, args, kwargs = _inputs_of(result)
    if not isinstance(kwargs, dict):
        reason = f"the third of what it returned is no dict, it is {type(kwargs).__name__}"
        raise TargetFunctionError(target=target, reason=reason)
    if isinstance(model, torch.nn.Module):
        model.train(request.training)
    return Subject(target, model, args, kwargs, request.training)


def _required(function: Callable[..., Any]) -> str:
    """The parameters without a default. A built-in function that does not tell has some, for all we know."""
    try:
        parameters = inspect.signature(function).parameters.values()
    except (TypeError, ValueError):
        return "unknown ones"
    optional = (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)
    return ", ".join(p.name for p in parameters if p.default is p.empty and p.kind not in optional)


def _inputs_of(result: tuple[Any, ...]) -> tuple[Any, tuple[Any, ...], Any]:
    """What a model is called with. One tensor is one argument, and None in the place of arguments none."""
    model, inputs, named = result if len(result) == 3 else (*result, None)
    if isinstance(inputs, dict) and len(result) == 2:
        return model, (), inputs
    given = () if inputs is None else inputs
    return (
        model,
        tuple(given) if isinstance(given, tuple | list) else (given,),
        {} if named is None else named,
    )


def _function(target: str) -> Callable[[], Any]:
    """Import it, also from the current directory, and from a file that ends in `.py`."""
    place, _, name = target.rpartition(":")
    try:
        module = _module_of_file(Path(place)) if place.endswith(".py") else _module(place)
    except (ImportError, OSError) as error:
        raise TargetFunctionError(target=target, reason=_first_line(error)) from error
    except Exception as error:  # of the module's own code
        raise TargetFunctionError(target=target, reason=_raised(error)) from error
    function = getattr(module, name, None)
    if not callable(function):
        raise TargetFunctionError(target=target, reason=f"{place} has no function {name!r}")
    return function  # type: ignore[no-any-return]


def _module(name: str) -> Any:
    if os.getcwd() not in sys.path:
        sys.path.insert(0, os.getcwd())
    return importlib.import_module(name)


def _module_of_file(path: Path) -> Any:
    spec = importlib.util.spec_from_file_location(path.stem, path)
    if spec is None or spec.loader is None:
        raise ImportError(f"{path} is no Python file")
    module = importlib.util.module_from_spec(spec)
    sys.modules[path.stem] = module
    spec.loader.exec_module(module)
    return module


def _is_offline() -> bool:
    from huggingface_hub import constants

    return bool(constants.HF_HUB_OFFLINE)


def _raised(error: Exception) -> str:
    """What code of the user raised, and where."""
    *_, last = traceback.extract_tb(error.__traceback__)
    text = " ".join(str(error).split()[:60]) or "no message"
    return f"it raised {type(error).__name__} at {last.filename}:{last.lineno}: {text.rstrip('.')}"


def _first_line(error: BaseException) -> str:
    lines = str(error).strip().splitlines()
    return lines[0].rstrip(".") if lines else type(error).__name__
