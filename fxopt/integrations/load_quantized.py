"""`fxopt.load_quantized`: the saved state of a prepared model, loaded into one that was not prepared."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import nn

from fxopt.integrations.checkpoint_names import own_names
from fxopt.integrations.linear_modules import is_linear, matrix_of
from fxopt.integrations.prepare import replace
from fxopt.integrations.quantized_module import MEANING, QuantizedLinear

Model = TypeVar("Model", bound=nn.Module)


def load_quantized(model: Model, state: Mapping[str, torch.Tensor] | str | Path) -> Model:
    """Load what a prepared model has saved into a model of the same class and configuration.

    Args:
        model: changed in place; layers that are quantized in `state` are replaced, their weights are freed.
        state: ``prepared.state_dict()``, or the directory of ``prepared.save_pretrained(...)``.

    Raises:
        RuntimeError: there is no state, or it is damaged, or does not fit the model.
    """
    given = dict(state) if isinstance(state, Mapping) else own_names(model, _read(Path(state)))
    made = {}
    for key in [key for key in given if key.endswith(f".{MEANING}")]:
        prefix = key.removesuffix(MEANING)
        made[prefix.removesuffix(".")] = _described(given, prefix)
        for name in [name for name in given if name.startswith(prefix)]:
            del given[name]
    unfit = [reason for name, layer in made.items() if (reason := _obstacle(model, name, layer))]
    if unfit:
        raise RuntimeError(f"the state is that of another model: {'; '.join(unfit)}")
    for name, layer in made.items():
        replace(model, name, layer)
    missing, unexpected = model.load_state_dict(given, strict=False)
    absent = [name for name in missing if name.rpartition(".")[0] not in made and not _is_tied(model, name)]
    if absent or unexpected:
        raise RuntimeError(f"missing in the state: {absent}, not in the model: {unexpected}")
    return model


def _described(state: dict[str, torch.Tensor], prefix: str) -> QuantizedLinear:
    try:
        return QuantizedLinear.described(state, prefix)
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise RuntimeError(f"the state of {prefix.removesuffix('.')} is damaged: {error!r}") from error


def _is_tied(model: nn.Module, name: str) -> bool:
    """A parameter that is another one, too, under whose name it was loaded."""
    known = dict(model.named_parameters(remove_duplicate=False))
    own = known.get(name)
    return own is not None and any(each is own for other, each in known.items() if other != name)


def _obstacle(model: nn.Module, name: str, layer: QuantizedLinear) -> str:
    """Why a layer cannot be that of the model which has this name, or nothing."""
    held: Any = model
    for part in name.split("."):
        held = getattr(held, part, None)
    if held is None:
        return f"{name} is not in the model"
    numbers = layer.out_features * layer.in_features
    if isinstance(held, torch.Tensor):  # a stack of experts
        return "" if held.numel() == numbers else f"{name} has {held.numel()} numbers, the state {numbers}"
    if is_linear(held):
        shape = tuple(matrix_of(held).shape)
    elif hasattr(held, "in_features") and hasattr(held, "out_features"):
        shape = held.out_features, held.in_features
    else:
        return f"{name} is a {type(held).__name__}, no linear layer"
    stored = layer.out_features, layer.in_features
    return "" if shape == stored else f"{name} is of {shape}, that of the state of {stored}"


def _read(folder: Path) -> dict[str, torch.Tensor]:
    from safetensors.torch import load_file

    files = sorted(folder.glob("*.safetensors"))
    if not files:
        raise RuntimeError(f"no *.safetensors in {folder}")
    return {name: tensor for file in files for name, tensor in load_file(file).items()}
