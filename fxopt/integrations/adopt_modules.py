"""Linear modules of other libraries -> `QuantizedLinear`, before the first call of a model.

For what no backend gets to see whole: modules that read numbers from the device, change their weights in the
first call, or call ops that graphs cannot hold. The library's tensors are let go: only fxopt's layout is
kept, and where that is the same memory, nothing is copied.
"""

from __future__ import annotations

from itertools import chain
from typing import Any

import torch
from torch import nn
from torch.nn.parameter import is_lazy

from fxopt.integrations.quantized_module import QuantizedLinear
from fxopt.integrations.replaceable import keep_hooks
from fxopt.ir.linear_notes import LinearNote, LinearNotes
from fxopt.ir.sources import CannotConvert
from fxopt.ir.sources.modules import Layer, has_processor_op, read_module
from fxopt.runtime.held_weights import leaves
from fxopt.runtime.rivals import faster_rival

_LIBRARIES = ("bitsandbytes", "compressed_tensors", "gptqmodel", "hqq", "optimum", "torchao")
ROUTE, KEPT = "fxopt::qlinear", "its library"


@torch.no_grad()
def adopt_modules(model: nn.Module) -> LinearNotes:
    """Replace the linear modules of `model` that a library has quantized, in place.

    Layers that cannot be converted stay as they are, with the reason. A module that is held in several places
    is replaced in all. So does a layer whose own op for this processor is measured to be faster.

    Returns:
        a note for each module of a known library.
    """
    notes = LinearNotes()
    made: dict[int, QuantizedLinear] = {}
    wide = _dtype(model)
    for name, module in list(model.named_modules(remove_duplicate=False)):
        if not name:
            continue
        if id(module) not in made:
            new = _converted(module, name, notes, wide)
            if new is None:
                continue
            made[id(module)] = new
        parent, _, own = name.rpartition(".")
        setattr(model.get_submodule(parent), own, made[id(module)])
    if made and all(note.is_quantized for note in notes):
        _remove_decompression(model)
    return notes


def _dtype(model: nn.Module) -> torch.dtype:
    """What the layers of a model that are not quantized compute in."""
    wide = (torch.float32, torch.bfloat16, torch.float16)
    return next((each.dtype for each in model.parameters() if each.dtype in wide), torch.float32)


def _converted(module: nn.Module, name: str, notes: LinearNotes, wide: torch.dtype) -> QuantizedLinear | None:
    size = _bytes(module)
    try:
        layer = read_module(module)
        if layer is not None:
            _check_speed(module, layer, wide)
    except CannotConvert as refusal:
        notes.append(LinearNote(name, "", type(module).__name__, KEPT, size, size, None, refusal.reason))
        return None
    if layer is None:
        return None
    found = layer.found
    notes.append(LinearNote(name, _format(layer), found.source, ROUTE, size, found.weight.nbytes, None, ""))
    new = QuantizedLinear(
        found.weight,
        found.activation,
        layer.bias,
        threshold=layer.threshold,
        compute_dtype=layer.compute_dtype,
    )
    _drop_own_hooks(module)
    keep_hooks(module, new)
    return new.train(module.training)


def _check_speed(module: Any, layer: Layer, wide: torch.dtype) -> None:
    """Raises CannotConvert where the module is faster as it is."""
    if not has_processor_op(module):
        return
    given = wide if layer.compute_dtype is None else layer.compute_dtype
    reason = faster_rival(type(module).__name__, module.forward, layer.found, given)
    if reason is not None:
        # It packs its weight in its first call: no compiler can do that for it.
        module.forward(torch.ones(1, layer.found.weight.in_features, dtype=given))
        raise CannotConvert(reason)


def _format(layer: Layer) -> str:
    weight, activation = layer.found.weight, layer.found.activation
    groups = f" g{weight.group_size}" if weight.group_size < weight.in_features else ""
    rounded = f", activations {activation}" if activation else ""
    apart = f" below {layer.threshold:g}" if layer.threshold else ""
    return f"{weight.format.name}{groups}{rounded}{apart}"


def _bytes(module: nn.Module) -> int:
    """Of the parameters and buffers that a module holds."""
    held = chain(module.parameters(recurse=False), module.buffers(recurse=False))
    loaded = (one for one in held if not is_lazy(one))
    return sum(each.numel() * each.element_size() for one in loaded for each in leaves(one))


def _drop_own_hooks(module: nn.Module) -> None:
    """Those that a library has put on its module are for its tensors; the others are the user's."""
    for hooks in (module._forward_pre_hooks, module._forward_hooks):
        for key, hook in list(hooks.items()):
            if str(getattr(hook, "__module__", "")).partition(".")[0] in _LIBRARIES:
                del hooks[key]


def _remove_decompression(model: nn.Module) -> None:
    """compressed-tensors widens all layers of a model when it is called first; none is left to widen."""
    for key, hook in list(model._forward_pre_hooks.items()):
        if str(getattr(hook, "__module__", "")).startswith("compressed_tensors"):
            del model._forward_pre_hooks[key]
            model._forward_pre_hooks_with_kwargs.pop(key, None)
