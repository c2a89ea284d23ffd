"""A process of its own that measures on a GPU: what crashes, hangs or runs out of memory there leaves the
compilation whole.

It starts with the first question and ends with `close`. A question is a pickled tuple on its standard input,
a name and arguments; the answer is a pickled value on its standard output.
"""

from __future__ import annotations

import os
import pickle
import subprocess
import sys
import threading
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from fxopt.codegen.tune import CannotMeasure
from fxopt.options import environment_without
from fxopt.runtime.kernel_cache import KernelCache

PATIENCE = 300  # seconds after which an answer is not waited for


@dataclass
class MeasuringProcess:
    """Runs `module`, whose main calls `serve`, on the current CUDA device."""

    module: str
    cache: KernelCache
    _process: subprocess.Popen[bytes] | None = None

    def ask(self, *question: Any, patience: float = PATIENCE) -> Any:
        """The answer.

        Raises:
            CannotMeasure: the process said so, ended, or gave no answer for so many seconds.
        """
        if self._process is None:
            self._process = self._start()
        process = self._process
        assert process.stdin is not None
        assert process.stdout is not None
        hung = threading.Timer(patience, process.kill)
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

    def close(self) -> None:
        if self._process is not None:
            self._process.kill()
            self._process.communicate()
            self._process = None

    def _start(self) -> subprocess.Popen[bytes]:
        place = (str(self.cache.directory), str(self.cache.limit), str(torch.cuda.current_device()))
        return subprocess.Popen(
            [sys.executable, "-m", self.module, *place],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            env=environment_without("TRITON_INTERPRET"),
        )


def serve(answers: Mapping[str, Callable[..., Any]]) -> None:
    """Answer questions until there are no more.

    Args:
        answers: by the name of a question, what is called with the cache of kernels and its arguments.
    """
    directory, limit, device = sys.argv[1:]
    torch.cuda.set_device(int(device))
    cache = KernelCache(Path(directory), int(limit))
    questions, said = sys.stdin.buffer, os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)  # what is printed meanwhile is not an answer
    while True:
        try:
            name, *given = pickle.load(questions)
        except EOFError:
            return
        pickle.dump(_answer(answers[name], cache, given), said)
        said.flush()


def _answer(measure: Callable[..., Any], cache: KernelCache, given: Sequence[Any]) -> Any:
    try:
        answer = measure(cache, *given)
        torch.cuda.synchronize()  # raises what a kernel has done to the device, for all that follow
    except Exception as error:
        return CannotMeasure(f"{type(error).__name__}: {error}"[:500])
    return answer
