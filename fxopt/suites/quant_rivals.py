"""torchao and bitsandbytes beside fxopt: the same layers of the same model, quantized by them."""

from __future__ import annotations

import copy
import importlib
import importlib.util
from collections.abc import Callable, Sequence
from typing import Any

from torch import nn

from fxopt.integrations.prepare import replace

TORCHAO, BITSANDBYTES = "torchao", "bitsandbytes"
# Options of Inductor. torchao's are those that it sets for the whole process unless it is told not to.
SETTINGS: dict[str, dict[str, Any]] = {
    TORCHAO: {
        "coordinate_descent_tuning": True,
        "coordinate_descent_check_all_directions": True,
        "force_fuse_int_mm_with_mul": True,
    },
    BITSANDBYTES: {},
}
Make = Callable[[Any, str], nn.Module]


def rivals(scheme: str) -> list[str]:
    """The libraries that are installed and have the scheme."""
    return [
        name
        for name, (schemes, _) in _LIBRARIES.items()
        if scheme in schemes and importlib.util.find_spec(name) is not None
    ]


def quantized_by(library: str, model: nn.Module, names: Sequence[str], scheme: str) -> nn.Module:
    """A copy of `model` whose layers `names` are quantized by the library; it may raise what it likes."""
    make = _LIBRARIES[library][1]
    made = copy.deepcopy(model)
    for name in names:
        replace(made, name, make(made.get_submodule(name), scheme))
    return made


def _by_torchao(layer: nn.Linear, scheme: str) -> nn.Module:
    quantization: Any = importlib.import_module("torchao.quantization")
    how: dict[str, Any] = {"set_inductor_config": False}
    kind = getattr(quantization, _TORCHAO[scheme])
    if scheme == "int4":
        how["group_size"] = 32
        if layer.weight.device.type == "cpu":  # the layout that has a kernel there
            packed: Any = importlib.import_module("torchao.prototype.quantization.int4")
            kind = packed.PrototypeInt4WeightOnlyConfig
        else:
            how["int4_packing_format"] = "tile_packed_to_4d"
    quantization.quantize_(layer, kind(**how))
    return layer


def _by_bitsandbytes(layer: nn.Linear, scheme: str) -> nn.Module:
    layers: Any = importlib.import_module("bitsandbytes").nn
    rows, columns, bias = layer.out_features, layer.in_features, layer.bias is not None
    weight, device = layer.weight.detach(), layer.weight.device
    if scheme == "int8-dynamic":
        made = layers.Linear8bitLt(columns, rows, bias, has_fp16_weights=False, threshold=0.0)
        made.weight = layers.Int8Params(weight.clone(), requires_grad=False, has_fp16_weights=False)
    else:
        made = layers.Linear4bit(columns, rows, bias, compute_dtype=weight.dtype, quant_type=scheme)
        made.weight = layers.Params4bit(weight.clone(), requires_grad=False, quant_type=scheme)
    made.bias = layer.bias
    quantized: nn.Module = made.to(device)  # which quantizes
    return quantized


_TORCHAO = {
    "int8": "Int8WeightOnlyConfig",
    "int8-dynamic": "Int8DynamicActivationInt8WeightConfig",
    "int4": "Int4WeightOnlyConfig",
    "fp8": "Float8WeightOnlyConfig",
    "fp8-dynamic": "Float8DynamicActivationFloat8WeightConfig",
}
_LIBRARIES: dict[str, tuple[tuple[str, ...], Make]] = {
    TORCHAO: (tuple(_TORCHAO), _by_torchao),
    BITSANDBYTES: (("int8-dynamic", "nf4", "fp4"), _by_bitsandbytes),
}
