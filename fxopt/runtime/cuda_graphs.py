"""CUDA graphs as recordings: see `fxopt.runtime.graphs`."""

from __future__ import annotations

import functools
import threading
import weakref
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch

from fxopt.runtime.graphs import Recorder, Recording


def recorder_for(device: torch.device) -> Recorder | None:
    """What makes recordings for a device; None where there is nothing."""
    if device.type != "cuda" or torch.version.hip is not None:
        return None
    return _recorder(torch.cuda.current_device() if device.index is None else device.index)


@functools.cache
def _recorder(index: int) -> CudaGraphs:
    return CudaGraphs(torch.device("cuda", index))


class CudaGraphs:
    """All recordings of one GPU. They share the memory of what is between inputs and results: one at a time
    runs, and none needs what another left.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._lock = threading.RLock()
        self._stream: torch.cuda.Stream | None = None
        self._alive: weakref.WeakSet[torch.cuda.CUDAGraph] = weakref.WeakSet()

    @contextmanager
    def turn(self) -> Iterator[None]:
        with self._lock, torch.cuda.device(self._device):
            stream = torch.cuda.current_stream(self._device)
            if not self.is_busy():
                if self._stream is not None and stream != self._stream:
                    stream.wait_stream(self._stream)
                self._stream = stream
            yield

    def is_busy(self) -> bool:
        return bool(torch.cuda.is_current_stream_capturing())

    def record(self, function: Callable[..., Any], inputs: Sequence[Any]) -> tuple[Recording, Sequence[Any]]:
        graph = torch.cuda.CUDAGraph()
        # Other threads may allocate memory meanwhile, which the strictest mode takes for a fault.
        with torch.cuda.graph(graph, pool=self._pool(), capture_error_mode="thread_local"):
            results = function(*inputs)
        self._alive.add(graph)
        return graph, results

    def _pool(self) -> Any:
        """That of a recording that is alive. Without one its memory is gone, and its name with it."""
        alive = next(iter(self._alive), None)
        return torch.cuda.graph_pool_handle() if alive is None else alive.pool()
