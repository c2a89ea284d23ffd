"""Kernels of a model for a GPU that is not here."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest
import torch
from torch import nn

import fxopt
from fxopt.errors import UnsupportedTarget
from fxopt.report.record import collect


class Layer(nn.Module):
    """A norm, a gate and a residual sum, in one dtype."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.RMSNorm(32)
        self.gate, self.up, self.down = (nn.Linear(32, 32, bias=False) for _ in range(3))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        normed = self.norm(x)
        return x + self.down(nn.functional.silu(self.gate(normed)) * self.up(normed))


@pytest.mark.parametrize("target", ["sm_80", "sm_90", "sm_100"])
def test_kernels_of_a_layer(target: str) -> None:
    with torch.no_grad():
        found = fxopt.cross_compile(Layer().bfloat16(), torch.randn(4, 32).bfloat16(), target=target)
    assert len(found.kernels) == 2, str(found)
    for kernel in found.kernels:
        (one,) = kernel.compiled
        assert one.problems() == ()
        assert f".target {target}" in one.ptx
        assert one.cubin[:4] == b"\x7fELF"
        assert kernel.seconds > 0
        ast.parse(kernel.source)


def test_backward_and_files(tmp_path: Path) -> None:
    found = fxopt.cross_compile(nn.Sequential(Layer(), Layer()), torch.randn(4, 32), target="h200")
    assert len(found.kernels) > 4, "those of the backward graph are among them"
    assert max(kernel.count for kernel in found.kernels) == 2, "equal layers have equal kernels"
    assert "H200" in str(found)
    written = found.save(tmp_path / "kernels")
    assert len(written) == len(set(written)) == 3 * len(found.kernels)
    assert all(path.stat().st_size for path in written)


def test_the_option_makes_kernels_and_the_model_runs_here() -> None:
    layer, x = Layer(), torch.randn(4, 32)
    with collect() as records, torch.no_grad():
        got = torch.compile(layer, backend="fxopt", options={"target": "sm_90"})(x)
        torch.testing.assert_close(got, layer(x))
    assert [len(record.kernels) for record in records] == [2]


def test_a_target_that_cannot_be_compiled_for_is_refused() -> None:
    with pytest.raises(UnsupportedTarget, match="AMD"):
        fxopt.cross_compile(Layer(), torch.randn(4, 32), target="gfx942")


def test_a_model_without_regions_has_no_kernels() -> None:
    with torch.no_grad():
        assert fxopt.cross_compile(nn.Linear(4, 4), torch.randn(2, 4), target="sm_90").kernels == ()
