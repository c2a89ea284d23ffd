"""What this process holds."""

from __future__ import annotations

import contextlib
import gc

import torch
from torch import nn


def live_bytes() -> int:
    """Of all tensors on the CPU that anybody holds."""
    gc.collect()
    storages = {}
    for each in gc.get_objects():
        if type(each) in (torch.Tensor, nn.Parameter) and each.device.type == "cpu":
            # What functorch wraps, and what is sparse, has no storage; their parts are objects of their own.
            with contextlib.suppress(NotImplementedError):
                storage = each.untyped_storage()
                storages[storage.data_ptr()] = storage.nbytes()
    return sum(storages.values())
