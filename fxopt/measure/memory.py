"""How much memory a call needs at its peak, above what is there before it; and what a model keeps."""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

_EVENT = "[memory]"
# The profiler's library would say on stderr when it starts and stops.
_QUIET = "6"


def peak_bytes(call: Callable[[], Any]) -> int:
    """The peak of bytes that a call holds of torch's allocator, scratch memory of kernels included.

    What was allocated before the call does not count. With a GPU it is the GPU's memory, of which the
    allocator keeps the peak itself; else the CPU's, of which the profiler reports what comes and goes.
    """
    return _on_gpu(call) if torch.cuda.is_available() else _on_cpu(call)


def copy_bandwidth(device: str) -> float:
    """Bytes a second that a copy of a large tensor moves, read and written; the best of some."""
    from fxopt.measure.timing import interleave

    size = 1 << (29 if device.startswith("cuda") else 26)
    source = torch.empty(size, dtype=torch.int8, device=device).zero_()
    target = torch.empty_like(source)
    times = interleave({"copy": lambda: target.copy_(source)}, rounds=10, budget_seconds=1.0)
    return 2 * size / min(times.seconds["copy"])


def stored_bytes(model: nn.Module) -> int:
    """What a model keeps of parameters and buffers, without the tables that are read by rows.

    Tensors that are made of others count by these, and of bitsandbytes' layers the scales, which are beside.
    """
    tables = {id(one.weight) for one in model.modules() if isinstance(one, nn.Embedding)}
    tables -= {id(one.weight) for one in model.modules() if type(one) is nn.Linear}
    held = [*model.parameters(), *model.buffers()]
    states = [getattr(one, "quant_state", None) for one in held]
    beside = [getattr(one, "SCB", None) for one in held]
    held += [each for state in states if state is not None for each in _scales(state)]
    return sum(_bytes(one) for one in {id(one): one for one in held}.values() if id(one) not in tables) + sum(
        _bytes(one) for one in beside if one is not None
    )


def _scales(state: Any) -> list[torch.Tensor]:
    """Of bitsandbytes' 4-bit weights; their scales may be quantized in turn."""
    inner = getattr(state, "state2", None)
    return [state.absmax, *([inner.absmax] if inner is not None else [])]


def _bytes(tensor: Any) -> int:
    if not hasattr(tensor, "__tensor_flatten__"):
        return int(tensor.numel() * tensor.element_size())
    names, _ = tensor.__tensor_flatten__()
    return sum(_bytes(getattr(tensor, name)) for name in names)


def _on_gpu(call: Callable[[], Any]) -> int:
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    result = call()
    torch.cuda.synchronize()
    del result
    return int(torch.cuda.max_memory_allocated() - before)


def _on_cpu(call: Callable[[], Any]) -> int:
    os.environ.setdefault("KINETO_LOG_LEVEL", _QUIET)
    activities = [torch.profiler.ProfilerActivity.CPU]
    with torch.profiler.profile(activities=activities, profile_memory=True) as profile:
        result = call()
    del result
    events = [each for each in profile.profiler.kineto_results.events() if each.name() == _EVENT]
    live = peak = 0
    for event in sorted(events, key=lambda each: each.start_ns()):
        live += event.nbytes()
        peak = max(peak, live)
    return peak
