"""Running a model once, so that everything that belongs to its answer is in one result to compare."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import torch

from support.reference import double_model, reference_mode, to_double
from support.trees import leaves, map_tensors

Result = dict[str, Any]


def infer(call: Callable[..., Any], inputs: Mapping[str, Any]) -> Result:
    """The output without gradients, and the inputs as they are afterwards (a model may write into them)."""
    own = _copy(inputs)
    with torch.no_grad():
        return {"output": call(**own), "inputs": own}


def train(call: Callable[..., Any], model: torch.nn.Module, inputs: Mapping[str, Any]) -> Result:
    """One forward and backward: output, loss, inputs afterwards, and the gradient of every parameter.

    `call` is `model` or its compiled form. The loss is the model's own if it has one.
    """
    own = _copy(inputs)
    model.zero_grad(set_to_none=True)
    output = call(**own)
    loss = loss_of(output)
    loss.backward()
    gradients = {name: parameter.grad for name, parameter in model.named_parameters()}
    model.zero_grad(set_to_none=True)
    return {"output": output, "loss": loss, "inputs": own, "gradients": gradients}


def at_once(calls: Sequence[Callable[[], Any]]) -> list[Any]:
    """What each call returns, in a thread of its own."""
    with ThreadPoolExecutor(len(calls)) as pool:
        running = [pool.submit(call) for call in calls]
        return [each.result() for each in running]


def loss_of(output: Any) -> torch.Tensor:
    """The loss in a model's output; without one, the mean square of its first floating tensor."""
    loss = getattr(output, "loss", None)
    if isinstance(loss, torch.Tensor):
        return loss
    first = next(
        leaf for _, leaf in leaves(output) if isinstance(leaf, torch.Tensor) and leaf.is_floating_point()
    )
    return first.pow(2).mean()


def infer64(model: torch.nn.Module, inputs: Mapping[str, Any]) -> Result:
    """`infer` of a float64 copy of the model."""
    wide = double_model(model)
    with reference_mode():
        return infer(wide, to_double(inputs))


def train64(model: torch.nn.Module, inputs: Mapping[str, Any]) -> Result:
    """`train` of a float64 copy of the model."""
    wide = double_model(model)
    with reference_mode():
        return train(wide, wide, to_double(inputs))


def _copy(inputs: Mapping[str, Any]) -> dict[str, Any]:
    copied: dict[str, Any] = map_tensors(
        lambda tensor: tensor.detach().clone().requires_grad_(tensor.requires_grad), dict(inputs)
    )
    return copied
