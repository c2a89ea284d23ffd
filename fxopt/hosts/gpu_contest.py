"""A semantic op with kernels against the same without, timed on a GPU in a process of its own."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch

from fxopt.codegen.attention_emit import kernel_serves
from fxopt.codegen.contest import Contest, Referee
from fxopt.codegen.lone_call import LoneCall
from fxopt.codegen.measuring_process import PATIENCE, MeasuringProcess, serve
from fxopt.codegen.timing import ROUNDS, interleaved, problems, sampler
from fxopt.codegen.tune import Budget, Samples
from fxopt.hosts.inductor_kernels import plain_config
from fxopt.ir.graph_facts import Kernels
from fxopt.options import Options
from fxopt.report.record import collect
from fxopt.runtime.kernel_cache import KernelCache, cache_of

# Those of the options of a compilation with which a call is compiled alone.
SHARED = ("mode", "host", "disable", "target", "gemm", "split_k", "cache_dir", "cache_mib")


@contextmanager
def measured_kernels(devices: frozenset[str], options: Options) -> Iterator[Kernels]:
    """What says of a semantic op that a kernel takes its place: where that is faster."""
    cache = cache_of(options)
    arena = GpuArena(cache)
    referee = Referee(cache, arena, alone(options), Budget(options.measuring_seconds))
    try:
        yield Kernels(devices, functools.partial(kernel_serves, devices=devices), referee)
    finally:
        arena.close()


def alone(options: Options) -> dict[str, Any]:
    """The options with which a call is compiled alone, by Inductor's modes but for their CUDA graphs: what is
    measured is captured as one anyway."""
    own = {name: getattr(options, name) for name in SHARED}
    return {**plain_config(options), "triton.cudagraphs": False, **own, "replay": "never"}


@dataclass
class GpuArena:
    """Measures on the current CUDA device."""

    cache: KernelCache
    device: str = field(default_factory=lambda: torch.cuda.get_device_name())

    def __post_init__(self) -> None:
        self._process = MeasuringProcess("fxopt.hosts.gpu_contest", self.cache)

    def contest(self, call: LoneCall, options: Mapping[str, Any], seconds: float) -> Contest:
        found: Contest = self._process.ask("contest", call, dict(options), seconds, patience=2 * PATIENCE)
        return found

    def close(self) -> None:
        self._process.close()


def contest(
    cache: KernelCache, call: LoneCall, options: Mapping[str, Any], seconds: float, device: str = "cuda"
) -> Contest:
    """Where kernels are used they are tuned, by yet another process, and each of their files is checked."""
    with collect() as records:
        ours = _entrant(call, {**options, "kernels": "always", "tune_seconds": seconds}, device)
    kernels = [kernel for record in records for kernel in record.kernels]
    wrong = [f"{kernel.name}: {one}" for kernel in kernels for one in problems(cache, kernel, device)]
    if wrong or not kernels:
        return Contest(Samples(), Samples(), tuple(wrong) or ("no kernel was made",))
    host = _entrant(call, {**options, "kernels": "never"}, device)
    kernel, without = interleaved([ours, host], ROUNDS)
    torch.compiler.reset()
    return Contest(Samples(kernel), Samples(without))


def _entrant(call: LoneCall, options: dict[str, Any], device: str) -> Callable[[], float]:
    torch.compiler.reset()
    compiled = torch.compile(call.module(), backend="fxopt", dynamic=False, options=options)
    return sampler(call.runner(compiled, device))


if __name__ == "__main__":
    serve({"contest": contest})
