"""GPUs that kernels are not made for: the refusal is typed, and graphs compile without kernels."""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch.fx import symbolic_trace

from fxopt.codegen.compile import compile_kernel
from fxopt.codegen.emit import emit_kernels
from fxopt.errors import UnsupportedTarget
from fxopt.hosts.inductor_kernels import emitter
from fxopt.ir.contract import Status
from fxopt.ir.target import Target
from fxopt.options import Options
from support import kernels


def test_kernels_are_not_compiled_by_a_back_end_that_was_not_tried() -> None:
    target = replace(Target.named("sm_90"), name="gfx942", backend="hip", warp_size=64)
    with pytest.raises(UnsupportedTarget, match="target 'gfx942' is compiled by Triton's back end 'hip'"):
        compile_kernel(kernels.add(), target)


@pytest.mark.parametrize("emits", ["inductor", "eager"])
def test_on_an_amd_gpu_kernels_are_left_out_with_a_reason(
    monkeypatch: pytest.MonkeyPatch, emits: str
) -> None:
    monkeypatch.setattr(torch.version, "hip", "6.4")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    found = SimpleNamespace(gcnArchName="gfx942:sramecc+")
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: found)
    gm = symbolic_trace(torch.nn.ReLU())
    options = Options.parse(options={"kernels": "always", "tune_seconds": 1, "strict": True}, environ={})
    if emits == "eager":
        _, evidence = emit_kernels(gm, options, call=True)
    else:
        notes: Any = SimpleNamespace(evidence=[], kernels=[])
        emit = emitter(options, notes)
        assert emit is not None
        emit(gm.graph)
        evidence = notes.evidence
    (one,) = evidence
    assert one.status is Status.DISABLED
    assert "'gfx942' is an AMD GPU" in one.reason
