"""One linear layer of a model: how it is quantized, the module that takes its place, and the note on it."""

from __future__ import annotations

from itertools import chain
from typing import Any

import torch
from torch import nn

from fxopt.integrations.calibrate import Calibration
from fxopt.integrations.linear_modules import is_linear, matrix_of
from fxopt.integrations.quantized_module import QuantizedLinear
from fxopt.ir.calibrated_quantize import quantize_calibrated
from fxopt.ir.linear_notes import LinearNote
from fxopt.ir.quantization_policy import Layer, Scheme, scheme_of
from fxopt.ir.quantize import NotFinite
from fxopt.ir.quantize import quantize as round_to_nearest
from fxopt.ir.quantized_weight import signal_to_noise
from fxopt.options import Options


def dense_note(name: str, source: str, weight: torch.Tensor, reason: str) -> LinearNote:
    """Why a layer is left as it is."""
    size = weight.numel() * weight.element_size()
    return LinearNote(name, "", source, "dense", size, size, None, reason)


def stack_notes(model: nn.Module) -> list[LinearNote]:
    """Weights of three dimensions, as those of experts: what of a model is not in its linear layers."""
    return [
        dense_note(name, "a stack of matrices", parameter, "it is no linear layer")
        for name, parameter in model.named_parameters()
        if parameter.dim() == 3
    ]


def quantized_layer(
    name: str, module: Any, scheme: Scheme, calibration: Calibration | None
) -> tuple[QuantizedLinear, LinearNote]:
    """The module that takes a layer's place, and what became of it.

    Raises:
        NotFinite: the weight has an infinity or NaN.
    """
    dense = matrix_of(module)
    hessian = None if calibration is None else calibration.hessians.get(name)
    if not bool(dense.isfinite().all()):
        raise NotFinite("it has entries that are not finite")
    if hessian is None:
        weight = round_to_nearest(dense, scheme.format, scheme.group_size)
    else:
        weight = quantize_calibrated(dense, hessian.to(dense.device), scheme.format, scheme.group_size)
    how = (
        f"{scheme}, calibrated on {calibration.tokens[name]} tokens"
        if hessian is not None and calibration
        else str(scheme)
    )
    size = dense.numel() * dense.element_size()
    decibels = signal_to_noise(dense, weight.dequantize())
    note = LinearNote(name, how, type(module).__name__, "fxopt::qlinear", size, weight.nbytes, decibels, "")
    return QuantizedLinear(weight, scheme.activation, module.bias), note


class LayerFacts:
    """What a model says of its layers; looked up before any is replaced, or has its weights."""

    def __init__(self, model: nn.Module) -> None:
        found = getattr(model, "get_output_embeddings", None)
        self.head = found() if callable(found) else None
        listed = ("_keep_in_fp32_modules", "_keep_in_fp32_modules_strict")
        self.wide = {part for name in listed for part in getattr(model, name, None) or ()}
        dtypes = [matrix_of(module).dtype for module in model.modules() if is_linear(module)]
        self.narrow = 2 * len([each for each in dtypes if each.itemsize == 2]) > len(dtypes)
        self.readers: dict[int, list[str]] = {}
        for name, module in model.named_modules(remove_duplicate=False):
            for parameter in module.parameters(recurse=False):
                self.readers.setdefault(id(parameter), []).append(name)
        # Models of transformers list them, too: before weights are loaded, they are not yet one tensor.
        pairs: Any = getattr(model, "all_tied_weights_keys", None) or {}
        both = chain(pairs.items(), ((source, target) for target, source in pairs.items()))
        self.tied = {name.rpartition(".")[0]: other.rpartition(".")[0] for name, other in both}

    def scheme(self, name: str, module: Any, options: Options) -> Scheme | str:
        """How to quantize a layer, or why it is left alone."""
        rows, columns = matrix_of(module).shape
        others = [reader for reader in self.readers[id(module.weight)] if reader != name]
        wide = not self.wide.isdisjoint(name.split("."))
        wide = wide or (self.narrow and module.weight.dtype is torch.float32)
        tied, is_head = "".join(others[:1]) or self.tied.get(name, ""), module is self.head
        return scheme_of(Layer(name, (rows, columns), tied, wide, is_head), options)
