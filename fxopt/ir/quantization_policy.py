"""Which linear layers are quantized, and how: what the options ask for, less what is left alone anyway."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase

from fxopt.ir.weight_formats import FORMATS
from fxopt.options import Options

# What options call it -> format of the weight, what activations are rounded to.
SCHEMES = {
    "int8": ("int8", ""),
    "int8-dynamic": ("int8", "int8"),
    "int4": ("int4", ""),
    "nf4": ("nf4", ""),
    "fp4": ("fp4", ""),
    "fp8": ("fp8_e4m3", ""),
    "fp8-dynamic": ("fp8_e4m3", "fp8"),
}
# Layers that turn hidden states into logits. An error there is not averaged by any layer behind.
HEADS = ("lm_head", "embed_out", "proj_out", "predictions.decoder", "output_projection")
# Weights with fewer numbers than this are not worth a call of their own. Measured on one core, float32, int8
# with int8 activations against the dense product. 128 x 128: 25 us to 3 us at one token, 95 to 44 at 128.
# 384 x 384: 28 us to 13 us at one, 37 to 39 at 8, 211 to 382 at 128. 768 x 768: 39 us to 43 us at one.
TINY = 2**17


@dataclass(frozen=True)
class Scheme:
    """How a layer is quantized: `group_size` 0 is all columns of a row."""

    name: str
    format: str
    activation: str
    group_size: int

    def __str__(self) -> str:
        return f"{self.name} of groups of {self.group_size}" if self.group_size else self.name


@dataclass(frozen=True)
class Layer:
    """What the policy looks at.

    Attributes:
        name: of the module, with dots; empty where it is not known.
        shape: (N, K) of the weight.
        tied: who else reads the weight, or nothing.
        kept_wide: the model keeps this layer in float32 while others are of 16 bits.
        makes_logits: the model says that this is its last layer; names say so, too.
    """

    name: str
    shape: tuple[int, int]
    tied: str = ""
    kept_wide: bool = False
    makes_logits: bool = False


def scheme_of(layer: Layer, options: Options) -> Scheme | str:
    """How to quantize a layer, or why it is left alone."""
    rule = next((rule for rule in options.quantize if fnmatchcase(layer.name, rule[0])), None)
    if rule is None:
        return "the options name no format for it"
    pattern, name = rule
    if name == "none":
        return f"the options leave {pattern!r} alone"
    skip = next((each for each in options.skip if fnmatchcase(layer.name, each)), None)
    if skip is not None:
        return f"the options skip {skip!r}"
    # A rule for this layer, rather than for all, is meant.
    obstacle = _left_by_default(layer) if pattern == "*" else ""
    return obstacle or make_scheme(name, options.group_size)


def make_scheme(name: str, group_size: int | None = None) -> Scheme:
    """The scheme that options call `name`."""
    format, activation = SCHEMES[name]
    group = FORMATS[format].default_group if group_size is None else group_size
    # Products of bytes are scaled once a row.
    return Scheme(name, format, activation, 0 if activation or format == "fp8_e4m3" else group)


def _left_by_default(layer: Layer) -> str:
    if layer.makes_logits or is_head(layer.name):
        return "it makes the logits"
    if layer.tied:
        return f"its weight is also read by {layer.tied}"
    if layer.kept_wide:
        return "the model keeps it in float32"
    if layer.shape[0] * layer.shape[1] < TINY:
        return f"{layer.shape[0]} x {layer.shape[1]} numbers, worth it from {TINY}"
    return ""


def is_head(name: str, heads: Sequence[str] = HEADS) -> bool:
    """Whether a layer of this name makes logits."""
    return any(name == head or name.endswith(f".{head}") for head in heads)
