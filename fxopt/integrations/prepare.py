"""`fxopt.prepare`: linear layers of a model become quantized ones, and their dense weights are freed."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, TypeVar

import torch
from torch import nn

from fxopt.integrations.adopt_modules import adopt_modules
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

Model = TypeVar("Model", bound=nn.Module)

# Where a prepared model keeps what became of its layers.
NOTES = "fxopt_linears"


@torch.no_grad()
def prepare(
    model: Model,
    quantize: str | Mapping[str, str | None] | None = None,
    *,
    group_size: int | None = None,
    skip: str | Sequence[str] = (),
    calibration: Calibration | None = None,
) -> Model:
    """Put `QuantizedLinear` in the place of linear layers, one by one; each dense weight is freed at once.

    Layers that a library has quantized keep their numbers, whatever `quantize` says.

    Args:
        model: changed in place. Compile it afterwards.
        quantize, group_size, skip: as ``options`` have them, see `fxopt.options.Options`.
        calibration: of `fxopt.calibrate`. Layers that it has seen are rounded such that their outputs for
            these inputs change least.

    Returns:
        `model`. ``model.fxopt_linears`` says what became of each linear layer; `print` shows it as a table.

    Raises:
        OptionTypeError, OptionValueError: as for options.
    """
    given = {"quantize": quantize, "group_size": group_size, "skip": skip}
    options = Options.parse(options=given, environ={})
    notes = adopt_modules(model)
    known = {note.name for note in notes}
    names = [name for name, module in model.named_modules() if is_linear(module) and name not in known]
    about = _About(model)
    for name in names:
        module: Any = model.get_submodule(name)
        chosen = about.scheme(name, module, options)
        if isinstance(chosen, Scheme):
            try:
                made, note = _quantized(name, module, chosen, calibration)
            except NotFinite as error:
                chosen = str(error)
            else:
                replace(model, name, made)
                notes.append(note)
                continue
        notes.append(_dense(name, type(module).__name__, module.weight, chosen))
    notes.extend(
        _dense(name, "a stack of matrices", parameter, "it is no linear layer")
        for name, parameter in model.named_parameters()
        if parameter.dim() == 3
    )
    setattr(model, NOTES, notes)
    return model


def replace(model: nn.Module, name: str, made: nn.Module) -> None:
    """Put `made` in the place of the sub-module `name`."""
    parent, _, own = name.rpartition(".")
    made.train(model.training)
    setattr(model.get_submodule(parent), own, made)


def _dense(name: str, source: str, weight: torch.Tensor, reason: str) -> LinearNote:
    size = weight.numel() * weight.element_size()
    return LinearNote(name, "", source, "dense", size, size, None, reason)


def _quantized(
    name: str, module: Any, scheme: Scheme, calibration: Calibration | None
) -> tuple[QuantizedLinear, LinearNote]:
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


class _About:
    """What a model says of its layers; looked up before any is replaced."""

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

    def scheme(self, name: str, module: Any, options: Options) -> Scheme | str:
        """How to quantize a layer, or why it is left alone."""
        rows, columns = matrix_of(module).shape
        others = [reader for reader in self.readers[id(module.weight)] if reader != name]
        wide = not self.wide.isdisjoint(name.split("."))
        wide = wide or (self.narrow and module.weight.dtype is torch.float32)
        tied, is_head = "".join(others[:1]), module is self.head
        return scheme_of(Layer(name, (rows, columns), tied, wide, is_head), options)
