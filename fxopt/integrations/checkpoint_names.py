"""Names of tensors in checkpoints of transformers, and those that a model has for them.

A checkpoint may have older names than the model, name the model without its head or with it, and hold parts
of what is one parameter. Prepared models are saved under the checkpoint's names, but whole.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import Any

import torch
from torch import nn


def own_name(model: nn.Module, name: str) -> str | None:
    """What `model` calls a module or a parameter that was saved from a model with a head, or without one.

    The part without a head is the attribute `base_model_prefix`. None: it has none of this name.
    """
    prefix = getattr(model, "base_model_prefix", "")
    candidates = [name]
    if prefix:
        candidates.append(
            name.removeprefix(f"{prefix}.") if name.startswith(f"{prefix}.") else f"{prefix}.{name}"
        )
    return next((each for each in candidates if _has(model, each)), None)


def _has(model: nn.Module, name: str) -> bool:
    held: Any = model
    for part in name.split("."):
        if not isinstance(held, nn.Module) or not hasattr(held, part):
            return False
        held = getattr(held, part)
    return isinstance(held, (nn.Module, torch.Tensor))


def bias_of(model: nn.Module, name: str) -> torch.Tensor | None:
    """The bias of a linear layer; None for a stack of experts, whose module has it."""
    parent, _, own = name.rpartition(".")
    found: torch.Tensor | None = getattr(getattr(model.get_submodule(parent), own), "bias", None)
    return found


def own_names(model: nn.Module, state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The tensors of a prepared model's checkpoint by the names of `model`, less those of another's head."""
    if not is_of_transformers(model):
        return state
    from transformers.conversion_mapping import get_model_conversion_mapping

    renamings = without_converters(get_model_conversion_mapping(model))
    found = {}
    for saved, tensor in state.items():
        name = saved
        for renaming in renamings:
            name = renaming.rename_source_key(name)[0]
        # A part of a quantized weight is found by what it is part of.
        place, _, part = name.rpartition(".")
        own = own_name(model, name)
        if own is None and (whole := own_name(model, place)) is not None:
            own = f"{whole}.{part}"
        if own is not None or not _is_of_head(model, name):
            found[own or name] = tensor
    return found


def _is_of_head(model: nn.Module, name: str) -> bool:
    """Whether a tensor belongs to the head of a model of which `model` is the part without."""
    prefix = getattr(model, "base_model_prefix", "")
    return bool(prefix) and not hasattr(model, prefix) and not _has(model, name.partition(".")[0])


def without_converters(conversions: Sequence[Any]) -> list[Any]:
    """Those of transformers' conversions of checkpoints that do not change tensors, only names."""
    from transformers.core_model_loading import WeightConverter

    return [each for each in conversions if not isinstance(each, WeightConverter)]


def keep_whole(model: nn.Module) -> None:
    """Have transformers save the tensors of `model` as they are, under the checkpoint's names.

    It would take parameters apart into what other libraries' checkpoints have, quantized or not.
    """
    from transformers import core_model_loading
    from transformers.conversion_mapping import get_model_conversion_mapping

    used = getattr(model, "_weight_conversions", None)
    if used is None:  # as it does for a model that was not loaded
        prefixes = getattr(core_model_loading, "PrefixChange", ())
        every = get_model_conversion_mapping(model, add_legacy=False)
        used = [each for each in every if not isinstance(each, prefixes)]
    setattr(model, "_weight_conversions", without_converters(used))  # noqa: B010 - no attribute of nn.Module


def is_of_transformers(model: nn.Module) -> bool:
    """Whether it is one of transformers' models; imports nothing."""
    known = sys.modules.get("transformers.modeling_utils")
    return known is not None and isinstance(model, known.PreTrainedModel)
