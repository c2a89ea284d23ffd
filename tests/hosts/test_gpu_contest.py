"""A semantic op with kernels against the same without: what is compiled, checked and timed, without a GPU."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from fxopt.codegen.lone_call import LoneCall
from fxopt.codegen.timing import ROUNDS
from fxopt.codegen.tune import CannotMeasure
from fxopt.hosts.gpu_contest import GpuArena, alone
from fxopt.hosts.kernels import contest_devices
from fxopt.options import Options
from fxopt.runtime.kernel_cache import KernelCache
from support.programs import findings


@pytest.fixture(scope="module")
def found() -> dict[str, Any]:
    result: dict[str, Any] = findings("support.contested", interpreted=True)
    return result


@pytest.mark.parametrize(("name", "results"), [("inference", 1), ("training", 3)])
def test_both_compute_the_same_and_take_turns(found: dict[str, Any], name: str, results: int) -> None:
    one = found[name]
    assert one["problems"] == []
    assert one["rounds"] == [ROUNDS, ROUNDS]
    assert len(one["apart"]) == results
    assert max(one["apart"]) < 1e-5
    assert max(one["apart"]) > 0, "a kernel does not round as the host does"


def test_a_kernel_that_is_wrong_is_not_timed(found: dict[str, Any]) -> None:
    assert found["wrong"]["problems"] == ["attention_forward: it is wrong"]
    assert found["wrong"]["rounds"] == [0, 0]


def test_where_no_kernel_is_made_nothing_is_timed(found: dict[str, Any]) -> None:
    assert found["none"] == {"problems": ["no kernel was made"], "rounds": [0, 0], "apart": []}


def test_options_of_a_call_alone_are_those_of_the_compilation() -> None:
    given = {"tune_seconds": 9.0, "gemm": "never", "disable": ("fuse-rms-norm",), "max_autotune": True}
    options = Options.parse("max-autotune", given)
    again = Options.parse(options={**alone(options), "kernels": "always"})
    assert (again.mode, again.gemm, again.disable) == ("max-autotune", "never", ("fuse-rms-norm",))
    assert again.host_config["max_autotune"] is True
    assert again.host_config["triton.cudagraphs"] is False
    assert again.replay == "never"


@pytest.mark.parametrize(
    ("host", "given"),
    [
        ("inductor", {}),
        ("inductor", {"kernels": "always", "tune_seconds": 5.0}),
        ("inductor", {"kernels": "never", "tune_seconds": 5.0}),
        ("inductor", {"disable": ("emit-kernels",), "tune_seconds": 5.0}),
        ("eager", {"tune_seconds": 5.0}),
    ],
)
def test_nothing_is_measured_unless_it_decides(
    host: str, given: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("fxopt.hosts.kernels._runs_kernels", lambda device: True)
    inputs = [torch.empty(1, device="meta")]
    assert contest_devices(host, Options(**given), inputs) == frozenset()
    assert contest_devices("inductor", Options(tune_seconds=5.0), inputs) == {"cuda"}


@pytest.mark.skipif(torch.cuda.is_available(), reason="asks for a device that is not there")
def test_without_a_device_it_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    arena = GpuArena(KernelCache(tmp_path), device="none")
    with pytest.raises(CannotMeasure, match="the measuring process ended with 1"):
        arena.contest(LoneCall("attention", (), ()), {}, 1.0)
    arena.close()
