"""What fxopt has made of the weights of a model, to be made anew."""

from __future__ import annotations

import torch


def invalidate(model: torch.nn.Module | None = None) -> None:
    """Have the weights of `model` quantized again, in its next call; of all models without one.

    Needed only after a write that cannot be noticed: one through ``.data`` on a GPU, or one on a CPU that
    leaves the middle of a weight as it is. See docs/quantization.md.

    Raises:
        NotAModule: `model` is no module.
    """
    from fxopt.integrations.linear_modules import check_module
    from fxopt.runtime.packed_weights import STORE

    if model is not None:
        check_module(model)
    STORE.forget(None if model is None else list(model.parameters()))
