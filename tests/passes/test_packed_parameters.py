"""One parameter with several quantized forms: a graph has inputs for each."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from support.quantizing import quantizing, rounded


class Autoencoder(nn.Module):
    """There and back by one weight."""

    def __init__(self) -> None:
        super().__init__()
        self.proj = nn.Linear(384, 512, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        out: torch.Tensor = self.proj(x).relu() @ self.proj.weight + self.proj(x.sin()) @ self.proj.weight
        return out


@pytest.mark.parametrize("scheme", ["int8", "int4"])
def test_a_weight_and_its_transpose(scheme: str) -> None:
    model = Autoencoder().requires_grad_(False)
    found, x = quantizing(model, scheme), torch.randn(3, 384)
    out = found.call(x)
    weight = model.proj.weight
    there, back = (rounded(each, scheme).dequantize() for each in (weight, weight.t()))
    wanted = (x @ there.t()).relu() @ back.t() + x.sin() @ there.t() @ back.t()
    assert float((out - wanted).norm() / wanted.norm()) < 1e-5
    assert len(found.applied) == 4


@pytest.mark.parametrize("turned", [False, True])
def test_writes_to_a_view_of_a_buffer_of_all_weights(turned: bool) -> None:
    """Through `.data`, which torch does not count: the middle that is looked at is that of the weight."""
    buffer = torch.randn(10 * 384 * 512) / 20
    weight = buffer[: 384 * 512].view(384, 512).t() if turned else buffer[: 384 * 512].view(512, 384)
    model = nn.Linear(384, 512)
    model.weight = nn.Parameter(weight, requires_grad=False)
    found, x = quantizing(model.requires_grad_(False), "int8"), torch.randn(3, 384)
    found.call(x)
    model.weight.data.mul_(3)
    wanted = model(x)
    assert float((found.call(x) - wanted).norm() / wanted.norm()) < 2e-2
