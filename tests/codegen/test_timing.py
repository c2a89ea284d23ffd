"""The process that times kernels, as far as it goes without a GPU."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from fxopt.codegen.timing import GpuTimer, interleaved
from fxopt.codegen.tune import CannotMeasure
from fxopt.runtime.kernel_cache import KernelCache
from support import kernels


def test_all_take_turns_and_drift_cancels() -> None:
    now = [0.0]

    def sampler() -> float:
        now[0] += 1.0
        return now[0]

    first, none, second = interleaved([sampler, None, sampler], 4)
    assert (first, none, second) == ((1.0, 4.0, 5.0, 8.0), (), (2.0, 3.0, 6.0, 7.0))
    assert sum(first) == sum(second)


@pytest.mark.skipif(torch.cuda.is_available(), reason="asks for a device that is not there")
def test_a_process_that_ends_is_said_so_and_replaced(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    timer = GpuTimer(KernelCache(tmp_path), {}, device="none")
    with pytest.raises(CannotMeasure, match="the measuring process ended with 1"):
        timer.samples([kernels.add()])
    assert timer._process._process is None
    timer.close()
