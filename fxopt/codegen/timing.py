"""Kernels timed on a GPU, beside what TorchInductor makes of the same: in a process of its own."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from fxopt.codegen.kernel_file import KernelFile
from fxopt.codegen.measuring_process import MeasuringProcess, serve
from fxopt.codegen.tune import Samples
from fxopt.runtime.kernel_cache import KernelCache

ROUNDS = 21
SAMPLE = 3e-4  # seconds that a sample takes, so that the resolution of events does not matter


@dataclass
class GpuTimer:
    """Times on the current CUDA device.

    Attributes:
        config: Inductor's configuration of the compilation that asks.
    """

    cache: KernelCache
    config: Mapping[str, Any]
    device: str = field(default_factory=lambda: torch.cuda.get_device_name())

    def __post_init__(self) -> None:
        self._process = MeasuringProcess("fxopt.codegen.timing", self.cache)

    def samples(self, kernels: Sequence[KernelFile]) -> list[Samples]:
        return list(self._process.ask("samples", list(kernels), dict(self.config)))

    def problems(self, kernel: KernelFile) -> list[str]:
        return list(self._process.ask("problems", kernel))

    def close(self) -> None:
        self._process.close()


def interleaved(samplers: Sequence[Callable[[], float] | None], rounds: int) -> list[tuple[float, ...]]:
    """`rounds` samples of each, taking turns, every other round in the opposite order: what drifts, such as
    the clock of the device, does so for all. What is None has no samples."""
    found: list[list[float]] = [[] for _ in samplers]
    order = list(range(len(samplers)))
    for _ in range(rounds):
        for place in order:
            sampler = samplers[place]
            if sampler is not None:
                found[place].append(sampler())
        order.reverse()
    return [tuple(one) for one in found]


def problems(cache: KernelCache, kernel: KernelFile, device: str = "cuda") -> list[str]:
    """In what a kernel differs from its reference, on its example."""
    from fxopt.codegen.kernel_check import differences

    module = cache.load(kernel)
    written = [place for place, one in enumerate(kernel.parameters) if one.name in kernel.mutates]
    return differences(module.launch, module.reference, module.example_inputs(device), written)


def _samples(cache: KernelCache, kernels: Sequence[KernelFile], config: dict[str, Any]) -> list[Samples]:
    modules = [cache.load(kernel) for kernel in kernels]
    inputs = modules[0].example_inputs("cuda")
    host = torch.compile(modules[0].reference, backend="inductor", dynamic=False, options=config)
    samplers: list[Callable[[], float] | None] = []
    errors: list[str] = []
    for function in (*(module.launch for module in modules), host):
        try:
            samplers.append(sampler(functools.partial(function, *inputs)))
            errors.append("")
        except Exception as error:
            samplers.append(None)
            errors.append(f"{type(error).__name__}: {error}"[:500])
    found = interleaved(samplers, ROUNDS)
    torch.compiler.reset()
    return [Samples(*pair) for pair in zip(found, errors, strict=True)]


def sampler(run: Callable[[], Any]) -> Callable[[], float]:
    """What measures `run` once more, in seconds. It is captured as a CUDA graph: the device is timed, however
    short the kernels are."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
            run()
    torch.cuda.current_stream().wait_stream(side)
    once = _captured(run, 1)
    _timed(once)
    repeats = min(200, max(1, math.ceil(SAMPLE / max(_timed(once), 1e-7))))
    several = _captured(run, repeats)
    _timed(several)

    def again(_held: Callable[[], Any] = run) -> float:
        # A graph holds its own memory, but not what it reads.
        return _timed(several) / repeats

    return again


def _captured(run: Callable[[], Any], repeats: int) -> torch.cuda.CUDAGraph:
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for _ in range(repeats):
            run()
    return graph


def _timed(graph: torch.cuda.CUDAGraph) -> float:
    """Seconds of one replay, by events on the stream that it runs on."""
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start.record()
    graph.replay()
    end.record()
    end.synchronize()
    return float(start.elapsed_time(end)) / 1e3


if __name__ == "__main__":
    serve({"samples": _samples, "problems": problems})
