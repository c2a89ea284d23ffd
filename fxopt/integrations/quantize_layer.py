"""One linear layer of a model: how it is quantized, the module that takes its place, and the note on it."""

from __future__ import annotations

from collections.abc import Iterable
from itertools import chain
from typing import Any

import torch
from torch import nn
from torch.nn.parameter import is_lazy

from fxopt.integrations.calibrate import Calibration
from fxopt.integrations.linear_modules import is_linear, matrix_of
from fxopt.integrations.quantized_experts import QuantizedStack, stack_names
from fxopt.integrations.quantized_module import QuantizedLinear
from fxopt.integrations.replaceable import obstacle
from fxopt.ir.calibrated_quantize import quantize_calibrated
from fxopt.ir.linear_notes import DENSE, LinearNote
from fxopt.ir.quantization_policy import Layer, Scheme, scheme_of
from fxopt.ir.quantize import NotFinite, decibels, quantize_parameter
from fxopt.ir.quantize import quantize as round_to_nearest
from fxopt.options import Options


def dense_note(name: str, source: str, weight: torch.Tensor, reason: str) -> LinearNote:
    """Why a layer is left as it is."""
    size = weight.numel() * weight.element_size()
    return LinearNote(name, "", source, DENSE, size, size, None, reason)


def other_notes(model: nn.Module, known: Iterable[str]) -> list[LinearNote]:
    """What else is large in a model: stacks that are no experts' which fxopt knows, subclasses of Linear."""
    told = set(known)
    stacks = [
        dense_note(name, "a parameter", parameter, "no linear layer, and no module of experts, holds it")
        for name, parameter in model.named_parameters()
        if not is_lazy(parameter) and parameter.dim() == 3 and name not in told
    ]
    own = [
        dense_note(
            name, type(module).__name__, module.weight, "a subclass of Linear: it may do anything else"
        )
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear) and name not in told and not is_lazy(module.weight)
    ]
    return stacks + own


def quantized_stack(
    name: str, module: Any, scheme: Scheme, *, checked: bool = True
) -> tuple[QuantizedStack, LinearNote]:
    """What takes the place of a parameter `name` of a module of experts, and what became of it.

    Raises:
        NotFinite: the weight has an infinity or NaN, and `checked`. Else products with it are NaN.
    """
    dense, turned = getattr(module, name.rpartition(".")[2]).detach(), module.is_transposed
    format, group = scheme.format, scheme.group_size
    weight = quantize_parameter(dense, format, group, transposed=turned, checked=checked)
    size, lost = dense.numel() * dense.element_size(), decibels(dense, weight, transposed=turned)
    route, kind = "fxopt::expert_linear", type(module).__name__
    note = LinearNote(name, str(scheme), kind, route, size, weight.nbytes, lost, "")
    return QuantizedStack(weight, scheme.activation, dense.shape[0]), note


def quantized_layer(
    name: str, module: Any, scheme: Scheme, calibration: Calibration | None
) -> tuple[QuantizedLinear, LinearNote]:
    """The module that takes a layer's place, and what became of it.

    Raises:
        NotFinite: the weight has an infinity or NaN.
    """
    dense = matrix_of(module)
    if dense.is_meta:
        raise NotFinite("it has no numbers yet, as on the meta device")
    if not bool(dense.isfinite().all()):
        raise NotFinite("it has entries that are not finite")
    hessian, how = _calibrated(name, dense, scheme, calibration)
    if hessian is None:
        weight = round_to_nearest(dense, scheme.format, scheme.group_size)
    else:
        weight = quantize_calibrated(dense, hessian.to(dense.device), scheme.format, scheme.group_size)
    size = dense.numel() * dense.element_size()
    kept, lost = weight.nbytes, decibels(dense, weight)
    note = LinearNote(name, how, type(module).__name__, "fxopt::qlinear", size, kept, lost, "")
    return QuantizedLinear(weight, scheme.activation, module.bias), note


def _calibrated(
    name: str, dense: torch.Tensor, scheme: Scheme, calibration: Calibration | None
) -> tuple[torch.Tensor | None, str]:
    """What a layer has been calibrated with, and how it is quantized then.

    Raises:
        ValueError: it was of another width then.
    """
    found = None if calibration is None else calibration.hessians.get(name)
    if found is None or calibration is None:
        return None, str(scheme)
    if found.shape[0] != dense.shape[1]:
        raise ValueError(f"{name} has {dense.shape[1]} input features, calibrated were {found.shape[0]}")
    if not bool(found.isfinite().all()):
        return None, f"{scheme}, not calibrated: its inputs were not finite"
    tokens = calibration.tokens[name]
    return found if tokens else None, f"{scheme}, calibrated on {tokens} tokens"


class LayerFacts:
    """What a model says of its layers; looked up before any is replaced, or has its weights."""

    def __init__(self, model: nn.Module) -> None:
        self.model = model
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
        others = [reader for reader in self.readers.get(id(module.weight), ()) if reader != name]
        wide = not self.wide.isdisjoint(name.split("."))
        wide = wide or (self.narrow and module.weight.dtype is torch.float32)
        tied, is_head = "".join(others[:1]) or self.tied.get(name, ""), module is self.head
        chosen = scheme_of(Layer(name, (rows, columns), tied, wide, is_head), options)
        return obstacle(self.model, name) or chosen if isinstance(chosen, Scheme) else chosen

    def stack_schemes(self, name: str, module: Any, options: Options) -> dict[str, Scheme | str]:
        """How to quantize the stacks of a module of experts, by the names of the parameters, or why not.

        It computes with quantized stacks alone: where one is to be left as it is, so are all.
        """
        found: dict[str, Scheme | str] = {}
        for own in stack_names(module):
            weight = getattr(module, own)
            rows, columns = weight.shape[:0:-1] if module.is_transposed else weight.shape[1:]
            wide = not self.wide.isdisjoint(f"{name}.{own}".split("."))
            wide = wide or (self.narrow and weight.dtype is torch.float32)
            layer = Layer(f"{name}.{own}", (rows, columns), kept_wide=wide)
            found[f"{name}.{own}"] = scheme_of(layer, options)
        dense = [(one, reason) for one, reason in found.items() if isinstance(reason, str)]
        if not dense or len(dense) == len(found):
            return found
        other, why = dense[0]
        reason = f"{other.rpartition('.')[2]} is not: {why}"
        return {one: each if isinstance(each, str) else reason for one, each in found.items()}
