"""How much memory a call needs at its peak, above what is there before it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

_EVENT = "[memory]"


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


def _on_gpu(call: Callable[[], Any]) -> int:
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    result = call()
    torch.cuda.synchronize()
    del result
    return int(torch.cuda.max_memory_allocated() - before)


def _on_cpu(call: Callable[[], Any]) -> int:
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
