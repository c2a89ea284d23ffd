"""`fxopt.FxoptConfig`: how transformers loads models whose linear layers fxopt quantizes, or has quantized.

Imports transformers; imported on first use only.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torch import nn
from transformers.utils.quantization_config import QuantizationConfigMixin

from fxopt.integrations.checkpoint_names import keep_whole
from fxopt.integrations.quantized_module import QuantizedLinear
from fxopt.options import Options

METHOD = "fxopt"


class FxoptConfig(QuantizationConfigMixin):
    """``from_pretrained(path, quantization_config=FxoptConfig("int4"))`` quantizes weights as it reads them:
    the dense model is never in memory.

    Attributes:
        quantize, group_size, skip: as `fxopt.prepare` has them.
        layers: of a checkpoint that is quantized: for each kind of layer its layout and the names of modules.
            Written by `fxopt.prepare`, and not for users.
    """

    def __init__(
        self,
        quantize: str | Mapping[str, str | None] | None = None,
        *,
        group_size: int | None = None,
        skip: str | Sequence[str] = (),
        layers: Sequence[dict[str, Any]] = (),
        **_: Any,
    ) -> None:
        """
        Raises:
            OptionTypeError, OptionValueError: as for options.
        """
        self.quant_method = METHOD
        self.quantize = dict(quantize) if isinstance(quantize, Mapping) else quantize
        self.group_size = group_size
        self.skip = skip if isinstance(skip, str) else list(skip)
        self.layers = list(layers)
        self.options()
        # transformers finds the quantizer by its name; it has none where torch was told to load no plugins.
        from fxopt.integrations.hf_quantizer import register_with_transformers

        register_with_transformers()

    def options(self) -> Options:
        """As options of the backend."""
        given = {"quantize": self.quantize, "group_size": self.group_size, "skip": self.skip}
        return Options.parse(options=given, environ={})

    def descriptions(self) -> dict[str, dict[str, Any]]:
        """By the name of a module, its layout: see `QuantizedLinear.description`."""
        return {name: kind["layout"] for kind in self.layers for name in kind["names"]}

    def describe(self, model: nn.Module) -> None:
        """Have `layers` say what the quantized layers of `model` are, and these saved as they are."""
        keep_whole(model)
        self.layers = []
        for name, module in model.named_modules(remove_duplicate=False):
            if not isinstance(module, QuantizedLinear):
                continue
            layout = module.description()
            known = next((kind for kind in self.layers if kind["layout"] == layout), None)
            if known is None:
                known = {"layout": layout, "names": []}
                self.layers.append(known)
            known["names"].append(name)
