"""transformers loads prepared models, and quantizes others while it loads them, through this class.

Imports transformers; imported on first use only, and by a hook when transformers' registry of quantizers is.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import nn
from transformers.quantizers.auto import (
    AUTO_QUANTIZATION_CONFIG_MAPPING,
    AUTO_QUANTIZER_MAPPING,
    register_quantization_config,
    register_quantizer,
)
from transformers.quantizers.base import HfQuantizer

from fxopt.integrations.checkpoint_names import bias_of, own_name, without_converters
from fxopt.integrations.linear_modules import is_linear, matrix_of
from fxopt.integrations.prepare import NOTES, quantize_in_place, replace
from fxopt.integrations.quantization_config import METHOD, FxoptConfig
from fxopt.integrations.quantize_layer import LayerFacts, dense_note, other_notes, quantized_stack
from fxopt.integrations.quantized_module import QuantizedLinear
from fxopt.ir.linear_notes import LinearNote, LinearNotes
from fxopt.ir.quantization_policy import Scheme
from fxopt.ir.weight_formats import FORMATS

# What transformers marks a module or a tensor with that it is not to initialize.
_LOADED = "_is_hf_initialized"


def register_with_transformers() -> None:
    """Make `FxoptConfig` and the method "fxopt" known to transformers. Idempotent."""
    if METHOD not in AUTO_QUANTIZATION_CONFIG_MAPPING:
        register_quantization_config(METHOD)(FxoptConfig)
    if METHOD not in AUTO_QUANTIZER_MAPPING:
        register_quantizer(METHOD)(FxoptQuantizer)


class FxoptQuantizer(HfQuantizer):
    """What `from_pretrained` asks of a quantization method.

    A prepared checkpoint: its layers are put in place without storage, and loaded. Any other: each weight is
    quantized when it is read, and the layer is replaced.
    """

    requires_calibration = False
    quantization_config: FxoptConfig

    def __init__(self, quantization_config: FxoptConfig, **kwargs: Any) -> None:
        super().__init__(quantization_config, **kwargs)
        self.schemes: dict[str, Scheme] = {}
        self.notes: dict[str, LinearNote] = {}

    def validate_environment(self, *_: Any, device_map: Any = None, **__: Any) -> None:
        """
        Raises:
            ValueError: weights that are to be quantized would be left on disk.
        """
        if not self.pre_quantized and isinstance(device_map, dict) and "disk" in device_map.values():
            raise ValueError("fxopt quantizes weights in memory: the device_map has some of them on disk")

    def _process_model_before_weight_loading(self, model: nn.Module, **_: Any) -> None:
        if self.pre_quantized:
            for saved, layout in self.quantization_config.descriptions().items():
                name = own_name(model, saved)
                if name is not None:  # else it is part of a head that this model does not have
                    replace(model, name, QuantizedLinear.on_meta(layout, bias_of(model, name)))
            return
        about, options = LayerFacts(model), self.quantization_config.options()
        for name, module in model.named_modules():
            self._choose(about.stack_schemes(name, module, options), module)
        for name, module in model.named_modules():
            if not is_linear(module):
                continue
            self._choose({name: about.scheme(name, module, options)}, module)

    def _choose(self, chosen: Mapping[str, Scheme | str], module: Any) -> None:
        """Note how a linear layer, or the stacks of a module of experts, are quantized, or why not."""
        for name, each in chosen.items():
            if isinstance(each, Scheme):
                self.schemes[name] = each
            else:
                weight = matrix_of(module) if is_linear(module) else getattr(module, name.rpartition(".")[2])
                self.notes[name] = dense_note(name, type(module).__name__, weight, each)

    def param_needs_quantization(self, model: nn.Module, param_name: str, **_: Any) -> bool:
        """Whether `quantize` is to take this parameter."""
        return param_name.removesuffix(".weight") in self.schemes

    def param_element_size(self, model: nn.Module, param_name: str, param: torch.Tensor) -> float:
        """Bytes of a number of a parameter once it is loaded: what memory of devices is planned with."""
        scheme = self.schemes.get(param_name.removesuffix(".weight"))
        if scheme is None:
            return param.element_size()
        # A scale, and mostly an offset, of two bytes for each group.
        groups = 4 / scheme.group_size if scheme.group_size else 0.0
        return FORMATS[scheme.format].bits / 8 + groups

    def get_quantize_ops(self) -> Any:
        """What is done to a weight after it was read."""
        # Imported late: transformers' loader may be what imports the registry.
        from fxopt.integrations.quantize_loaded import QuantizeLoaded

        return QuantizeLoaded(self)

    def quantize(self, model: nn.Module, param_name: str, weight: torch.Tensor) -> bool:
        """Replace the layer whose weight this is; False where it has to stay dense."""
        name = param_name.removesuffix(".weight")
        dense = nn.Parameter(weight, requires_grad=False)
        if name == param_name:
            self._quantize_stack(model, name, dense)
        else:
            module: Any = model.get_submodule(name)
            module.weight = dense
            self.notes[name] = quantize_in_place(model, name, self.schemes[name])
        made = model.get_submodule(name)
        if not isinstance(made, QuantizedLinear):
            del self.schemes[name]  # it is loaded as any other parameter
            return False
        for each in (made, *made.buffers()):
            setattr(each, _LOADED, True)
        return True

    def _quantize_stack(self, model: nn.Module, name: str, dense: nn.Parameter) -> None:
        """A stack of experts. Entries that are not finite make NaN: the other may be replaced already."""
        parent, _, own = name.rpartition(".")
        module = model.get_submodule(parent)
        setattr(module, own, dense)
        made, self.notes[name] = quantized_stack(name, module, self.schemes[name], checked=False)
        replace(model, name, made)

    def update_weight_conversions(self, weight_conversions: list[Any], *model: nn.Module) -> list[Any]:
        """What a checkpoint's tensors become: those of a prepared model are whole already.

        `model` is given by later versions of transformers.
        """
        if not self.pre_quantized:
            found: list[Any] = super().update_weight_conversions(weight_conversions, *model)
            return found
        return without_converters(weight_conversions)

    def _process_model_after_weight_loading(self, model: nn.Module, **_: Any) -> nn.Module:
        for module in model.modules():
            if isinstance(module, QuantizedLinear) and module.bias is not None:
                module.bias.requires_grad_(False)
        if not self.pre_quantized:
            self._note_unread(model)
            self.quantization_config.describe(model)
            setattr(model, NOTES, LinearNotes([*self.notes.values(), *other_notes(model, self.notes)]))
        return model

    def _note_unread(self, model: nn.Module) -> None:
        """Linear layers that were to be quantized, and of which the checkpoint has no weight: tied ones."""
        for name, module in model.named_modules():
            if name in self.schemes and name not in self.notes:
                reason = "the checkpoint has it under another name: fxopt.prepare quantizes it"
                self.notes[name] = dense_note(name, type(module).__name__, matrix_of(module), reason)

    def is_serializable(self) -> bool:
        return True

    @property
    def is_trainable(self) -> bool:
        """Adapters on top are: gradients go through to the inputs of layers."""
        return True

    @property
    def is_compileable(self) -> bool:
        return True
