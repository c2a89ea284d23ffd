"""What transformers' loader does to a weight after it has read it, for `FxoptQuantizer`.

Imports transformers; imported on first use only.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from transformers.core_model_loading import ConversionOps

if TYPE_CHECKING:
    from fxopt.integrations.hf_quantizer import FxoptQuantizer


class QuantizeLoaded(ConversionOps):
    """The dense weight of a layer becomes the quantized layer."""

    def __init__(self, quantizer: FxoptQuantizer) -> None:
        self.quantizer = quantizer

    @torch.no_grad()
    def convert(
        self,
        input_dict: dict[str, Any],
        model: Any = None,
        missing_keys: set[str] | None = None,
        **_: Any,
    ) -> dict[str, torch.Tensor]:
        """Returns what is left to be loaded as it is."""
        left = {}
        for name, given in input_dict.items():
            weight = given[0] if isinstance(given, list) else given
            wanted = self.quantizer.param_needs_quantization(model, name)
            if not wanted or not self.quantizer.quantize(model, name, weight):
                left[name] = weight
            elif missing_keys is not None:
                missing_keys.discard(name)
        return left
