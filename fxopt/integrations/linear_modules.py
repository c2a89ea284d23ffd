"""Linear layers of a model as modules: which ones are, and their weights as (N, K)."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from torch._dynamo.eval_frame import OptimizedModule

from fxopt.errors import NotAModule


def check_module(model: object) -> None:
    """Raises NotAModule for whatever is none."""
    if not isinstance(model, nn.Module):
        raise NotAModule(value=model, kind=type(model).__name__)


def plain_module(model: nn.Module) -> nn.Module:
    """What `torch.compile` has wrapped: names of layers and of parameters are those of the model itself."""
    inner = model._orig_mod if isinstance(model, OptimizedModule) else model
    return inner if isinstance(inner, nn.Module) else model


def is_linear(module: nn.Module) -> bool:
    """A plain `nn.Linear`, or GPT-2's `Conv1D`; subclasses may mean something else by it."""
    return type(module) is nn.Linear or is_transposed(module)


def is_transposed(module: nn.Module) -> bool:
    """transformers' `Conv1D`, whose weight is (K, N)."""
    kind = type(module)
    return kind.__name__ == "Conv1D" and kind.__module__ == "transformers.pytorch_utils"


def matrix_of(module: Any) -> torch.Tensor:
    """The weight of a layer, (N, K); a view."""
    weight: torch.Tensor = module.weight.detach()
    return weight.t() if is_transposed(module) else weight
