"""Linear modules of other libraries -> `QuantizedLinear`, before the first call of a model.

For what no backend gets to see whole: modules that read numbers from the device, change their weights in the
first call, or call ops that graphs cannot hold. The library's tensors are let go: only fxopt's layout is
kept, and where that is the same memory, nothing is copied.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import nn

from fxopt.integrations.quantized_linear import QuantizedLinear
from fxopt.ir.sources import CannotConvert
from fxopt.ir.sources.modules import read_module


@dataclass
class Adoption:
    """What became of the quantized linear modules of a model, by their names.

    Attributes:
        adopted: what each is. kept: why each stays as it is.
    """

    adopted: dict[str, str] = field(default_factory=dict)
    kept: dict[str, str] = field(default_factory=dict)

    def __str__(self) -> str:
        lines = [f"{name}: {what}" for name, what in self.adopted.items()]
        lines += [f"{name}: kept, {why}" for name, why in self.kept.items()]
        return "\n".join(lines)


def adopt_modules(model: nn.Module) -> Adoption:
    """Replace the linear modules of `model` that a library has quantized, in place.

    Layers that cannot be converted stay as they are, with the reason.
    """
    done = Adoption()
    made: dict[int, QuantizedLinear] = {}
    with torch.no_grad():
        for name, module in list(model.named_modules(remove_duplicate=False)):
            if module is model:
                continue
            new = made.get(id(module)) or _converted(module, name, done)
            if new is not None:
                made[id(module)] = new
                parent, _, own = name.rpartition(".")
                setattr(model.get_submodule(parent), own, new)
    if done.adopted and not done.kept:
        _remove_decompression(model)
    return done


def _converted(module: nn.Module, name: str, done: Adoption) -> QuantizedLinear | None:
    try:
        layer = read_module(module)
    except CannotConvert as refusal:
        done.kept[name] = refusal.reason
        return None
    if layer is None:
        return None
    new = QuantizedLinear(
        layer.found, layer.bias, threshold=layer.threshold, compute_dtype=layer.compute_dtype
    )
    done.adopted[name] = str(layer.found)
    return new.train(module.training)


def _remove_decompression(model: nn.Module) -> None:
    """compressed-tensors widens all layers of a model when it is called first; none is left to widen."""
    for key, hook in list(model._forward_pre_hooks.items()):
        if str(getattr(hook, "__module__", "")).startswith("compressed_tensors"):
            del model._forward_pre_hooks[key]
            model._forward_pre_hooks_with_kwargs.pop(key, None)
