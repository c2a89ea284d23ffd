"""Models that return the logits beside the loss, in training without them: then nobody needs them whole.

transformers' models return both, and what a compiled graph returns has to exist: N x V logits, and as many
zeros in the backward, as they have a gradient that nobody uses.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from typing import Any, TypeVar

import torch

Model = TypeVar("Model", bound=torch.nn.Module)


def loss_only(model: Model) -> Model:
    """Leave `logits` out of the outputs of `model` in training, when there is a loss. Returns `model`.

    In evaluation mode, and without labels, outputs are as before. Outputs that are tuples stay as they are:
    nothing tells which entry holds the logits. It is the model's `forward` that is changed, as Dynamo keeps
    what a hook has seen.
    """
    # A partial, unlike a closure, is bound to the copy when the model is copied.
    changed = functools.partial(_without_logits, model, model.forward)
    model.forward = functools.update_wrapper(changed, model.forward)
    return model


def _without_logits(model: torch.nn.Module, forward: Callable[..., Any], /, *args: Any, **kwargs: Any) -> Any:
    output = forward(*args, **kwargs)
    if not model.training or not isinstance(output, Mapping):
        return output
    if output.get("loss") is None or output.get("logits") is None:
        return output
    kept: Any = {name: value for name, value in output.items() if name != "logits"}
    return type(output)(**kept)
