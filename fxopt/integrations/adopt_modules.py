"""Linear modules of other libraries -> `QuantizedLinear`, before the first call of a model.

For what no backend gets to see whole: modules that read numbers from the device, change their weights in the
first call, or call ops that graphs cannot hold. The library's tensors are let go: only fxopt's layout is
kept, and where that is the same memory, nothing is copied.
"""

from __future__ import annotations

from itertools import chain

import torch
from torch import nn

from fxopt.integrations.quantized_module import QuantizedLinear
from fxopt.ir.linear_notes import LinearNote, LinearNotes
from fxopt.ir.sources import CannotConvert
from fxopt.ir.sources.modules import Layer, read_module
from fxopt.runtime.held_weights import leaves

ROUTE, KEPT = "fxopt::qlinear", "its library"


@torch.no_grad()
def adopt_modules(model: nn.Module) -> LinearNotes:
    """Replace the linear modules of `model` that a library has quantized, in place.

    Layers that cannot be converted stay as they are, with the reason. A module that is held in several places
    is replaced in all.

    Returns:
        a note for each module of a known library.
    """
    notes = LinearNotes()
    made: dict[int, QuantizedLinear] = {}
    for name, module in list(model.named_modules(remove_duplicate=False)):
        if not name:
            continue
        if id(module) not in made:
            new = _converted(module, name, notes)
            if new is None:
                continue
            made[id(module)] = new
        parent, _, own = name.rpartition(".")
        setattr(model.get_submodule(parent), own, made[id(module)])
    if made and all(note.is_quantized for note in notes):
        _remove_decompression(model)
    return notes


def _converted(module: nn.Module, name: str, notes: LinearNotes) -> QuantizedLinear | None:
    size = _bytes(module)
    try:
        layer = read_module(module)
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
    return new.train(module.training)


def _format(layer: Layer) -> str:
    weight, activation = layer.found.weight, layer.found.activation
    groups = f" g{weight.group_size}" if weight.group_size < weight.in_features else ""
    rounded = f", activations {activation}" if activation else ""
    apart = f" below {layer.threshold:g}" if layer.threshold else ""
    return f"{weight.format.name}{groups}{rounded}{apart}"


def _bytes(module: nn.Module) -> int:
    """Of the parameters and buffers that a module holds."""
    held = chain(module.parameters(recurse=False), module.buffers(recurse=False))
    return sum(each.numel() * each.element_size() for one in held for each in leaves(one))


def _remove_decompression(model: nn.Module) -> None:
    """compressed-tensors widens all layers of a model when it is called first; none is left to widen."""
    for key, hook in list(model._forward_pre_hooks.items()):
        if str(getattr(hook, "__module__", "")).startswith("compressed_tensors"):
            del model._forward_pre_hooks[key]
            model._forward_pre_hooks_with_kwargs.pop(key, None)
