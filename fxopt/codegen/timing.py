"""Kernels timed on a GPU, beside what TorchInductor makes of the same: in a process of its own.

What crashes, hangs or runs out of memory there leaves the compilation whole. The process starts with the
first question and ends with `close`. A question is a pickled tuple on its standard input, the answer a
pickled value on its standard output.
"""

from __future__ import annotations

import functools
import math
import os
import pickle
import subprocess
import sys
import threading
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from fxopt.codegen.kernel_file import KernelFile
from fxopt.codegen.tune import CannotMeasure, Samples
from fxopt.options import environment_without
from fxopt.runtime.kernel_cache import KernelCache

ROUNDS = 21
SAMPLE = 3e-4  # seconds that a sample takes, so that the resolution of events does not matter
PATIENCE = 300  # seconds after which an answer is not waited for


@dataclass
class GpuTimer:
    """Times on the current CUDA device.

    Attributes:
        config: Inductor's configuration of the compilation that asks.
    """

    cache: KernelCache
    config: Mapping[str, Any]
    device: str = field(default_factory=lambda: torch.cuda.get_device_name())
    _process: subprocess.Popen[bytes] | None = None

    def samples(self, kernels: Sequence[KernelFile]) -> list[Samples]:
        return list(self._ask("samples", list(kernels), dict(self.config)))

    def problems(self, kernel: KernelFile) -> list[str]:
        return list(self._ask("problems", kernel))

    def close(self) -> None:
        if self._process is not None:
            self._process.kill()
            self._process.communicate()
            self._process = None

    def _ask(self, *question: Any) -> Any:
        if self._process is None:
            self._process = self._start()
        process = self._process
        assert process.stdin is not None
        assert process.stdout is not None
        hung = threading.Timer(PATIENCE, process.kill)
        hung.start()
        try:
            pickle.dump(question, process.stdin)
            process.stdin.flush()
            answer = pickle.load(process.stdout)
        except (OSError, EOFError, pickle.UnpicklingError) as error:
            code = process.wait()
            self.close()
            raise CannotMeasure(f"the measuring process ended with {code}") from error
        finally:
            hung.cancel()
        if isinstance(answer, CannotMeasure):
            self.close()
            raise answer
        return answer

    def _start(self) -> subprocess.Popen[bytes]:
        place = (str(self.cache.directory), str(self.cache.limit), str(torch.cuda.current_device()))
        return subprocess.Popen(
            [sys.executable, "-m", "fxopt.codegen.timing", *place],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            env=environment_without("TRITON_INTERPRET"),
        )


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


def main() -> None:
    directory, limit, device = sys.argv[1:]
    torch.cuda.set_device(int(device))
    cache = KernelCache(Path(directory), int(limit))
    questions, answers = sys.stdin.buffer, os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)  # what is printed meanwhile is not an answer
    while True:
        try:
            name, *given = pickle.load(questions)
        except EOFError:
            return
        pickle.dump(_answer(cache, name, given), answers)
        answers.flush()


def _answer(cache: KernelCache, name: str, given: Sequence[Any]) -> Any:
    try:
        answer: Any = (_samples if name == "samples" else _problems)(cache, *given)
        torch.cuda.synchronize()  # raises what a kernel has done to the device, for all that follow
    except Exception as error:
        return CannotMeasure(f"{type(error).__name__}: {error}"[:500])
    return answer


def _problems(cache: KernelCache, kernel: KernelFile) -> list[str]:
    from fxopt.codegen.kernel_check import differences

    module = cache.load(kernel)
    written = [place for place, one in enumerate(kernel.parameters) if one.name in kernel.mutates]
    return differences(module.launch, module.reference, module.example_inputs("cuda"), written)


def _samples(cache: KernelCache, kernels: Sequence[KernelFile], config: dict[str, Any]) -> list[Samples]:
    modules = [cache.load(kernel) for kernel in kernels]
    inputs = modules[0].example_inputs("cuda")
    host = torch.compile(modules[0].reference, backend="inductor", dynamic=False, options=config)
    samplers: list[Callable[[], float] | None] = []
    errors: list[str] = []
    for function in (*(module.launch for module in modules), host):
        try:
            samplers.append(_sampler(functools.partial(function, *inputs)))
            errors.append("")
        except Exception as error:
            samplers.append(None)
            errors.append(f"{type(error).__name__}: {error}"[:500])
    found = interleaved(samplers, ROUNDS)
    torch.compiler.reset()
    return [Samples(*pair) for pair in zip(found, errors, strict=True)]


def _sampler(run: Callable[[], Any]) -> Callable[[], float]:
    """Captured as a CUDA graph, so that it is the device that is timed, however short the kernels are."""
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
    return lambda: _timed(several) / repeats


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
    # The classes must be those of the module that the asking process knows.
    from fxopt.codegen import timing as this_module

    this_module.main()
