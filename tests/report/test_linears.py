"""The report's table of linear layers: formats, sizes, noise, and why a layer is dense."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import fxopt

K, N = 384, 512
PLAIN = {"host": "eager", "strict": True}


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up, self.gate, self.lm_head = nn.Linear(K, N), nn.Linear(K, N), nn.Linear(N, K)
        self.experts = nn.Parameter(torch.randn(2, N, N))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        hidden = self.up(x) * torch.sigmoid(self.gate(x))
        out: torch.Tensor = self.lm_head(hidden + torch.bmm(hidden.expand(2, -1, -1), self.experts).sum(0))
        return out


@pytest.fixture
def report() -> Any:
    with torch.no_grad():
        options = {"host": "eager", "strict": True, "quantize": "int4"}
        return fxopt.explain.with_options(options=options)(Net(), torch.randn(3, K))


def test_notes(report: Any) -> None:
    notes = {note.name: note for note in report.graphs[0].linears}
    up = notes["up"]
    assert (up.format, up.source, up.route) == (
        "int4 of groups of 32",
        "a parameter",
        "fxopt::qlinear (product)",
    )
    assert up.bytes_before == 4 * N * K
    assert up.bytes_after == N * K // 2 + 2 * 2 * N * K // 32
    assert 20 < up.decibels < 26
    assert notes["lm_head"].reason == "it makes the logits"
    experts = notes["experts"]
    assert (experts.bytes_before, experts.reason) == (2 * N * N * 4, "")
    assert experts.route == "fxopt::expert_linear (product of experts)"


def test_text(report: Any) -> None:
    text = str(report)
    assert "3 of 4 linear layers quantized, 4.5 -> 1.4 MB" in text
    assert "int4 of groups of 32 by fxopt::qlinear" in text
    assert "dense: it makes the logits" in text
    assert "  up: int4 of groups of 32, a parameter by fxopt::qlinear" not in text
    assert "  up: int4 of groups of 32, a parameter by fxopt::qlinear" in str(report.verbose())


def test_json_and_html(report: Any, tmp_path: Path) -> None:
    (graph,) = report.to_dict()["graphs"]
    assert {each["name"] for each in graph["linears"]} >= {"up", "gate", "lm_head"}
    assert "Linear layers" in report.to_html(tmp_path / "page.html").read_text()


def test_nothing_is_said_without_quantized_weights() -> None:
    with torch.no_grad():
        report = fxopt.explain.with_options(options=PLAIN)(Net(), torch.randn(3, K))
    assert "linear layers" not in str(report)
    assert report.to_dict()["graphs"][0]["linears"] == []


def test_prepared_modules() -> None:
    with torch.no_grad():
        model = fxopt.prepare(Net(), "fp8-dynamic")
        report = fxopt.explain.with_options(options=PLAIN)(model, torch.randn(3, K))
    notes = {note.name: note for note in report.graphs[0].linears}
    up = notes["up"]
    assert (up.format, up.source) == ("fp8_e4m3, fp8 activations", "QuantizedLinear")
    assert (up.bytes_before, up.bytes_after) == (4 * N * K, N * K + 4 * N)


class Other(nn.Module):
    """A layer whose weight is used as a test says, and one that is called."""

    def __init__(self, product: Callable[[Any, torch.Tensor], torch.Tensor]) -> None:
        super().__init__()
        self.up, self.down, self.product = nn.Linear(K, N), nn.Linear(K, K), product

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.product(self, self.down(x))


OTHER_PRODUCTS: dict[str, Callable[[Any, torch.Tensor], torch.Tensor]] = {
    "einsum": lambda m, x: torch.einsum("bk,nk->bn", x, m.up.weight),
    "mv": lambda m, x: torch.mv(m.up.weight, x[0]),
    "left": lambda m, x: m.up.weight @ x.t(),
    "a_bias_of_two_dimensions": lambda m, x: torch.addmm(x[:, :1], x, m.up.weight.t()),
    "baddbmm": lambda m, x: torch.baddbmm(x[None, :, :1], x[None], m.up.weight.t()[None]),
    "bilinear": lambda m, x: nn.functional.bilinear(x[:, :1], x, m.up.weight[:, None]),
    "table": lambda m, x: (x + m.up.weight[: x.shape[0]]).sin(),
}


@pytest.mark.parametrize("case", OTHER_PRODUCTS)
def test_weights_that_other_products_read_are_told(case: str) -> None:
    with torch.no_grad():
        options = {"host": "eager", "strict": True, "quantize": "int8"}
        report = fxopt.explain.with_options(options=options)(Other(OTHER_PRODUCTS[case]), torch.randn(3, K))
    dense = {note.name: note.reason for note in report.graphs[0].linears if not note.is_quantized}
    assert dense == ({} if case == "table" else {"up": "no product that fxopt knows reads it"})
