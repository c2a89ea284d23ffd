"""`fxopt.load_quantized`: the saved state of a prepared model, loaded into one that was not prepared."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TypeVar

import torch
from torch import nn

from fxopt.integrations.checkpoint_names import own_names
from fxopt.integrations.prepare import replace
from fxopt.integrations.quantized_module import MEANING, QuantizedLinear

Model = TypeVar("Model", bound=nn.Module)


def load_quantized(model: Model, state: Mapping[str, torch.Tensor] | str | Path) -> Model:
    """Load what a prepared model has saved into a model of the same class and configuration.

    Args:
        model: changed in place; layers that are quantized in `state` are replaced, their weights are freed.
        state: ``prepared.state_dict()``, or the directory of ``prepared.save_pretrained(...)``.

    Raises:
        RuntimeError: there is no state, or the rest of it does not fit the model.
    """
    given = dict(state) if isinstance(state, Mapping) else own_names(model, _read(Path(state)))
    for key in [key for key in given if key.endswith(f".{MEANING}")]:
        prefix = key.removesuffix(MEANING)
        replace(model, prefix.removesuffix("."), QuantizedLinear.described(given, prefix))
        for name in [name for name in given if name.startswith(prefix)]:
            del given[name]
    missing, unexpected = model.load_state_dict(given, strict=False)
    made = [name for name, module in model.named_modules() if isinstance(module, QuantizedLinear)]
    absent = [name for name in missing if name.rpartition(".")[0] not in made and not _is_tied(model, name)]
    if absent or unexpected:
        raise RuntimeError(f"missing in the state: {absent}, not in the model: {unexpected}")
    return model


def _is_tied(model: nn.Module, name: str) -> bool:
    """A parameter that is another one, too, under whose name it was loaded."""
    own = model.get_parameter(name)
    return any(each is own for other, each in model.named_parameters(remove_duplicate=False) if other != name)


def _read(folder: Path) -> dict[str, torch.Tensor]:
    from safetensors.torch import load_file

    files = sorted(folder.glob("*.safetensors"))
    if not files:
        raise RuntimeError(f"no *.safetensors in {folder}")
    return {name: tensor for file in files for name, tensor in load_file(file).items()}
