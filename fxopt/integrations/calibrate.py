"""`fxopt.calibrate`: what goes into each linear layer, for a few batches, so that rounding can heed it."""

from __future__ import annotations

import reprlib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn
from torch.utils.hooks import RemovableHandle

from fxopt.errors import OptionTypeError
from fxopt.integrations.linear_modules import check_module, is_linear, matrix_of, plain_module


@dataclass
class Calibration:
    """What `calibrate` has seen.

    Attributes:
        hessians: by the name of a layer, the sum of x^T x over its inputs, (K, K) in float32. Layers that are
            given one and the same tensor share it.
        tokens: rows that were added up, by layer.
    """

    hessians: dict[str, torch.Tensor] = field(default_factory=dict)
    tokens: dict[str, int] = field(default_factory=dict)


@torch.no_grad()
def calibrate(model: nn.Module, data: Iterable[Any]) -> Calibration:
    """Run `model` on a few batches and keep the second moments of the inputs of its linear layers.

    Args:
        model: run as it is, in evaluation mode; it is not changed.
        data: batches, each a mapping of keyword arguments, a tuple of arguments, or one argument.

    Returns:
        what ``fxopt.prepare(model, quantize="int4", calibration=...)`` takes.

    Raises:
        NotAModule: `model` is no module.
        OptionTypeError: `data` is one batch, or nothing that has batches.
        ValueError: there was no batch.
    """
    check_module(model)
    if isinstance(data, (str, bytes, Mapping)) or not isinstance(data, Iterable):
        wanted = "an iterable of batches, as a list of mappings"
        raise OptionTypeError(name="data", wanted=wanted, value=reprlib.repr(data), kind=type(data).__name__)
    model = plain_module(model)
    seen = _Seen(Calibration())
    handles = seen.watch(model)
    modes, count = [(module, module.training) for module in model.modules()], 0
    model.eval()
    try:
        for count, batch in enumerate(data, 1):  # noqa: B007 - counted
            _call(model, batch)
            seen.forget_inputs()
    finally:
        for module, training in modes:
            module.training = training
        for handle in handles:
            handle.remove()
    if not count:
        raise ValueError("fxopt.calibrate was given no batch")
    return seen.found


def _call(model: nn.Module, batch: Any) -> None:
    if isinstance(batch, Mapping):
        model(**batch)
    elif isinstance(batch, (tuple, list)):
        model(*batch)
    else:
        model(batch)


class _Seen:
    """Inputs of layers in one call of the model."""

    def __init__(self, found: Calibration) -> None:
        self.found = found
        self._added: dict[tuple[int, int], tuple[torch.Tensor, str]] = {}

    def watch(self, model: nn.Module) -> list[RemovableHandle]:
        return [
            module.register_forward_pre_hook(self._hook(name), with_kwargs=True)
            for name, module in model.named_modules()
            if is_linear(module)
        ]

    def forget_inputs(self) -> None:
        self._added.clear()

    def _hook(self, name: str) -> Any:
        def before(module: nn.Module, args: tuple[Any, ...], named: dict[str, Any]) -> None:
            self._add(name, module, args[0] if args else next(iter(named.values())))

        return before

    def _add(self, name: str, module: nn.Module, x: torch.Tensor) -> None:
        columns = matrix_of(module).shape[1]
        rows = x.detach().reshape(-1, columns)
        self.found.tokens[name] = self.found.tokens.get(name, 0) + rows.shape[0]
        # The tensor is kept until the call ends, so that its id is not given to another one.
        # Written to in between, it is another input.
        version = 0 if x.is_inference() else x._version
        first = self._added.setdefault((id(x), version), (x, name))[1]
        known = self.found.hessians.get(name)
        if first != name and (known is None or known is self.found.hessians[first]):
            self.found.hessians[name] = self.found.hessians[first]
            return
        if known is None:
            known = self.found.hessians[name] = torch.zeros(columns, columns, device=x.device)
        wide = rows.float()
        known.addmm_(wide.t(), wide)
