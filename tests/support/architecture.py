"""Small random models of many architectures: real code of transformers, tiny sizes, no download.

Sizes are odd where the architecture allows it (vocabulary, sequence, heads, group size of K/V heads), so
that a transposed or wrongly broadcast tensor has a wrong shape or wrong numbers. Weights are rescaled from
their small initial values (`liven`), because with those an attention is nearly uniform, every norm weight
is 1 and every bias is 0: a wrong mask, scale or weight would hardly change the result.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
import transformers

Inputs = dict[str, Any]
BATCH, SEQ, VOCAB = 2, 13, 131


@dataclass(frozen=True)
class Architecture:
    """One architecture: which class, which tiny config, and how inputs for it are made.

    `inputs(config, batch, seq)` gives the unmasked inputs with `labels`, if the model has a loss.
    """

    name: str
    model_class: str
    config: dict[str, Any]
    inputs: Callable[[Any, int, int], Inputs]
    # Models with hand-written attention have one implementation only, called "eager".
    attentions: tuple[str, ...] = ("eager", "sdpa")
    masks: tuple[str, ...] = ("left", "right")
    parts: dict[str, dict[str, Any]] = field(default_factory=dict)

    def make_config(self) -> Any:
        """The tiny config, every dropout set to 0."""
        config = getattr(transformers, self.model_class).config_class(**self.config, **self.parts)
        for part in (config, *(getattr(config, name) for name in self.parts)):
            _without_dropout(part)
        return config

    def make_model(
        self, attn_implementation: str = "eager", dtype: torch.dtype = torch.float32, *, seed: int = 0
    ) -> torch.nn.Module:
        """A new model in eval mode with random, lively weights."""
        if attn_implementation not in self.attentions:
            raise ValueError(f"{self.name} has {self.attentions}, not {attn_implementation!r}")
        torch.manual_seed(seed)
        model_class = getattr(transformers, self.model_class)
        model: torch.nn.Module = model_class._from_config(
            self.make_config(), attn_implementation=attn_implementation
        )
        liven(model)
        return model.to(dtype).eval()

    def make_inputs(
        self,
        batch: int = BATCH,
        seq: int = SEQ,
        *,
        training: bool = False,
        mask: str | None = None,
        dtype: torch.dtype = torch.float32,
        seed: int = 0,
    ) -> Inputs:
        """Keyword arguments of the model, with labels if `training`.

        `mask` is None (no mask argument), "left" or "right" (the side of the padding: row b has b + 1 padded
        positions, so at least one position is padded in every row).
        """
        torch.manual_seed(seed)
        inputs = self.inputs(self.make_config(), batch, seq)
        if not training:
            inputs = {name: value for name, value in inputs.items() if name not in ("labels", "return_loss")}
        if mask is not None:
            if mask not in self.masks:
                raise ValueError(f"{self.name} takes masks {self.masks}, not {mask!r}")
            inputs["attention_mask"] = padding_mask(batch, seq, mask)
        return {
            name: value.to(dtype) if isinstance(value, torch.Tensor) and value.is_floating_point() else value
            for name, value in inputs.items()
        }


def padding_mask(batch: int, seq: int, side: str) -> torch.Tensor:
    """int64[batch, seq]: row b has (b + 1) % (seq - 1) zeros on the side named."""
    positions = torch.arange(seq)
    if side == "left":
        positions = positions.flip(0)
    padded = (torch.arange(batch) + 1) % (seq - 1)
    return (positions[None, :] < seq - padded[:, None]).long()


def _without_dropout(config: Any) -> None:
    for name, value in list(vars(config).items()):
        if "drop" in name and isinstance(value, float | int) and not isinstance(value, bool):
            setattr(config, name, type(value)(0))


@torch.no_grad()
def liven(model: torch.nn.Module) -> None:
    """Rescale every weight matrix to unit gain and shift every vector, in place.

    Matrices that are centred on zero are redrawn with variance 1 / fan-in, which gives attention logits of
    the order of 1. All others (norm weights, biases, zero tables, state matrices that hold chosen values)
    keep their mean and get noise of 0.2.
    """
    transposed = {
        id(module.weight)
        for module in model.modules()
        if isinstance(module, transformers.pytorch_utils.Conv1D)
    }
    convolutions = {
        id(parameter)
        for module in model.modules()
        if isinstance(module, torch.nn.modules.conv._ConvNd)
        for parameter in module.parameters()
    }
    for parameter in model.parameters():
        if not parameter.is_floating_point():
            continue
        spread = float(parameter.std()) if parameter.numel() > 1 else 0.0
        centred = abs(float(parameter.mean())) < 0.5 * spread
        if parameter.dim() < 2 or not centred:
            parameter.add_(torch.randn_like(parameter) * 0.2)
            continue
        fan_in = parameter.shape[0] if id(parameter) in transposed else parameter.shape[-1]
        if id(parameter) in convolutions:
            fan_in = parameter[0].numel()
        parameter.copy_(torch.randn_like(parameter) * fan_in**-0.5)
