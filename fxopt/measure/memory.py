"""How much memory a call needs at its peak, above what is there before it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

_EVENT = "[memory]"


def peak_bytes(call: Callable[[], Any]) -> int:
    """The peak of bytes that a call holds of torch's CPU allocator, scratch memory of kernels included.

    The profiler reports each allocation and release; what was allocated before the call does not count.
    """
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
