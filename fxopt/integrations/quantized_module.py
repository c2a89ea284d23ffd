"""`QuantizedLinear`: the module that `fxopt.prepare` puts in the place of a linear layer."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from fxopt.ir.ops import register_ops
from fxopt.ir.quantized_weight import QuantizedWeight
from fxopt.ir.weight_formats import FORMATS
from fxopt.runtime.quantized_linear import register_processor

# The buffers of a weight, in the order of the op's arguments.
PARTS = ("codes", "scales", "offsets", "columns")
# The buffer that says what the others mean: JSON as bytes, so that a state is complete in itself.
MEANING = "meaning"


class QuantizedLinear(nn.Module):
    """x @ w^T + bias with a quantized weight w: (..., K) -> (..., N), of the dtype of x.

    The parts of the weight are buffers, which keep their dtypes when the module is converted. In eager mode
    and in any compiled graph the product is the same op; it has gradients for x and the bias.
    """

    def __init__(
        self,
        weight: QuantizedWeight,
        activation: str,
        bias: torch.Tensor | None,
        *,
        threshold: float = 0.0,
        compute_dtype: torch.dtype | None = None,
    ) -> None:
        """Args:
        threshold: features of x with an entry as large as this are multiplied apart; 0 for none.
        compute_dtype: what x is cast to before the product; None for its own dtype.
        """
        super().__init__()
        register_ops()
        register_processor()
        self.format, self.activation = weight.format.name, activation
        self.group_size, self.in_features = weight.group_size, weight.in_features
        self.out_features, self.threshold = weight.shape[0], threshold
        self.compute_dtype = compute_dtype
        for name in PARTS:
            self.register_buffer(name, _stored(getattr(weight, name)))
        self.bias = None if bias is None else nn.Parameter(bias.detach(), requires_grad=False)
        self.register_buffer(MEANING, torch.frombuffer(bytearray(self._meaning()), dtype=torch.uint8))

    def _meaning(self) -> bytes:
        return json.dumps(self._kept()).encode()

    def _kept(self) -> dict[str, Any]:
        names = ("format", "activation", "group_size", "in_features", "threshold")
        kept = {name: getattr(self, name) for name in names}
        kept["compute_dtype"] = "" if self.compute_dtype is None else str(self.compute_dtype)
        kept["parts"] = [name for name, part in self._parts() if part is not None]
        return kept

    def description(self) -> dict[str, Any]:
        """All but the numbers: JSON that `on_meta` makes a module of the same layout of."""
        dtypes = {name: None if part is None else str(part.dtype) for name, part in self._parts()}
        meaning: dict[str, Any] = json.loads(self._meaning())
        return meaning | {"out_features": self.out_features, "dtypes": dtypes}

    def _load_from_state_dict(
        self,
        state_dict: dict[str, Any],
        prefix: str,
        local_metadata: Any,
        strict: bool,
        missing_keys: list[str],
        unexpected_keys: list[str],
        error_msgs: list[str],
    ) -> None:
        """Codes of another format may have the same shape and dtype: what they mean has to be the same."""
        given = state_dict.get(prefix + MEANING)
        told = None if given is None or given.is_meta else json.loads(bytes(given.tolist()))
        if told is not None and any(told.get(key, each) != each for key, each in self._kept().items()):
            error_msgs.append(
                f"{prefix.removesuffix('.')} is {_told(self._kept())}, its state is {_told(told)}: "
                "fxopt.load_quantized takes such a state into a model that is not prepared."
            )
            return
        rest = (local_metadata, strict, missing_keys, unexpected_keys, error_msgs)
        super()._load_from_state_dict(state_dict, prefix, *rest)

    def _parts(self) -> list[tuple[str, torch.Tensor | None]]:
        return [(name, getattr(self, name)) for name in PARTS]

    @staticmethod
    def on_meta(description: dict[str, Any], bias: torch.Tensor | None) -> QuantizedLinear:
        """A module without storage, whose buffers are to be loaded."""
        kind, count, group = (description[name] for name in ("format", "in_features", "group_size"))
        shapes = QuantizedWeight.shapes(FORMATS[kind], description["out_features"], count, group)
        parts = {
            name: torch.empty(shapes[name], dtype=_dtype(dtype), device="meta")
            for name, dtype in description["dtypes"].items()
            if dtype is not None
        }
        parts["codes"] = parts["codes"].view(FORMATS[kind].storage)
        return QuantizedLinear._made(QuantizedWeight(FORMATS[kind], count, group, **parts), bias, description)

    @staticmethod
    def _made(weight: QuantizedWeight, bias: torch.Tensor | None, meaning: dict[str, Any]) -> QuantizedLinear:
        told = meaning.get("compute_dtype", "")
        if "experts" in meaning:
            from fxopt.integrations.quantized_experts import QuantizedStack

            return QuantizedStack(weight, meaning["activation"], meaning["experts"])
        return QuantizedLinear(
            weight,
            meaning["activation"],
            bias,
            threshold=meaning.get("threshold", 0.0),
            compute_dtype=_dtype(told) if told else None,
        )

    @staticmethod
    def described(state: dict[str, torch.Tensor], prefix: str) -> QuantizedLinear:
        """The module whose buffers are those of `state` below `prefix`, which ends with a dot."""
        kept: dict[str, Any] = json.loads(bytes(state[prefix + MEANING].tolist()))
        kind = FORMATS[kept["format"]]
        codes = state[prefix + "codes"].view(kind.storage)
        missing = [name for name in kept.get("parts", ()) if prefix + name not in state]
        if missing:
            raise KeyError(prefix + missing[0])
        scales, rest = state[prefix + "scales"], {name: state.get(prefix + name) for name in PARTS[2:]}
        weight = QuantizedWeight(kind, kept["in_features"], kept["group_size"], codes, scales, **rest)
        return QuantizedLinear._made(weight, state.get(prefix + "bias"), kept)

    codes: torch.Tensor
    scales: torch.Tensor
    offsets: torch.Tensor | None
    columns: torch.Tensor | None

    @property
    def weight(self) -> torch.Tensor:
        """The codes, for code that looks at a layer's dtype or device; products with them raise."""
        return self.codes

    @property
    def quantized(self) -> QuantizedWeight:
        """The weight as it is stored."""
        kind = FORMATS[self.format]
        parts = (self.codes.view(kind.storage), self.scales, self.offsets, self.columns)
        return QuantizedWeight(kind, self.in_features, self.group_size, *parts)

    @property
    def typed_codes(self) -> torch.Tensor:
        """The codes in the dtype of their format."""
        return self.codes.view(torch.float8_e4m3fn) if self.format == "fp8_e4m3" else self.codes

    @property
    def attributes(self) -> dict[str, Any]:
        """Those of the op, besides tensors."""
        return {"format": self.format, "group_size": self.group_size, "activation": self.activation}

    def computed(self, x: torch.Tensor) -> torch.Tensor:
        """`x` in the dtype that the product is computed in: that of autocast, if any."""
        return _computed(x) if self.compute_dtype is None else x.to(self.compute_dtype)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        codes, given = self.typed_codes, self.computed(x)
        parts = (codes, self.scales, self.offsets, self.columns)
        out: torch.Tensor
        if self.threshold:
            out = torch.ops.fxopt.outlier_linear(
                given, codes, self.scales, self.bias, threshold=self.threshold
            )
        else:
            out = torch.ops.fxopt.qlinear(given, *parts, self.bias, **self.attributes)
        return out if self.compute_dtype is None else out.to(x.dtype)

    def extra_repr(self) -> str:
        shape = f"in_features={self.in_features}, out_features={self.out_features}"
        kinds = f"format={self.format}, group_size={self.group_size}, activation={self.activation!r}"
        kinds += f", threshold={self.threshold}" if self.threshold else ""
        return f"{shape}, bias={self.bias is not None}, {kinds}"

    def _apply(self, fn: Callable[[torch.Tensor], torch.Tensor], recurse: bool = True) -> QuantizedLinear:
        """Devices change, dtypes of the weight's parts do not."""
        kept = {name: getattr(self, name) for name in (*PARTS, MEANING)}
        super()._apply(fn, recurse)
        for name, before in kept.items():
            after = getattr(self, name)
            if before is not None and after.dtype != before.dtype:
                setattr(self, name, before.to(after.device))
        return self


def _computed(x: torch.Tensor) -> torch.Tensor:
    """`x` in the dtype that autocast has linear layers compute in."""
    device = x.device.type
    if torch.is_autocast_enabled(device) and x.dtype is not torch.float64:
        return x.to(torch.get_autocast_dtype(device))
    return x


def _told(meaning: dict[str, Any]) -> str:
    return ", ".join(f"{name} {each}" for name, each in meaning.items() if each)


def _dtype(name: str) -> torch.dtype:
    """Of ``torch.float32`` as text."""
    found: torch.dtype = getattr(torch, name.removeprefix("torch."))
    return found


def _stored(part: torch.Tensor | None) -> torch.Tensor | None:
    """Bytes for float8, which conversions of dtype would widen, and which not every file format has."""
    return part.view(torch.uint8) if part is not None and part.dtype is torch.float8_e4m3fn else part
