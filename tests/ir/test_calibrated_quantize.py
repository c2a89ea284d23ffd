"""Calibrated rounding: outputs for the inputs it was given change less than by rounding to the nearest."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch

from fxopt.errors import OptionTypeError
from fxopt.integrations.calibrate import calibrate
from fxopt.integrations.prepare import prepare
from fxopt.ir.calibrated_quantize import quantize_calibrated
from fxopt.ir.quantize import quantize
from fxopt.ir.quantized_weight import QuantizedWeight

N, K, TOKENS = 48, 160, 400


def inputs() -> torch.Tensor:
    """Correlated, with some features much larger than others."""
    mixing = torch.randn(K, K) / K**0.5 + torch.eye(K) * 0.5
    return torch.randn(TOKENS, K) @ mixing * torch.logspace(-1.5, 0.5, K)[torch.randperm(K)]


def error(weight: torch.Tensor, found: QuantizedWeight, x: torch.Tensor) -> float:
    wanted = x @ weight.T
    return float((x @ found.dequantize().T - wanted).norm() / wanted.norm())


@pytest.mark.parametrize(
    ("name", "group"), [("int4", 32), ("int4", 64), ("int4", 0), ("nf4", 64), ("fp4", 64)]
)
def test_outputs_change_less(name: str, group: int) -> None:
    weight, x = torch.randn(N, K) * 0.1, inputs()
    plain = quantize(weight, name, group)
    found = quantize_calibrated(weight, x.T @ x, name, group)
    assert found.nbytes == plain.nbytes
    assert found.columns is None
    assert error(weight, found, x) < 0.7 * error(weight, plain, x)


def test_independent_inputs_leave_nothing_to_make_up_for() -> None:
    """With H = I only the choice of scales is left, which is never worse than the full range of a group."""
    weight = torch.randn(N, K) * 0.1
    plain = quantize(weight, "int4", 32)
    found = quantize_calibrated(weight, torch.eye(K), "int4", 32)
    errors = [float((each.dequantize() - weight).square().sum()) for each in (found, plain)]
    assert errors[0] <= errors[1] * 1.0001


@pytest.mark.parametrize("name", ["int8", "fp8_e4m3"])
def test_wide_formats(name: str) -> None:
    weight, x = torch.randn(N, K) * 0.1, inputs()
    found, plain = quantize_calibrated(weight, x.T @ x, name), quantize(weight, name)
    assert error(weight, found, x) <= error(weight, plain, x)


def test_features_that_are_never_seen() -> None:
    weight, x = torch.randn(N, K) * 0.1, inputs()
    x[:, 10:30] = 0
    found = quantize_calibrated(weight, x.T @ x, "int4", 32)
    assert found.dequantize().isfinite().all()
    assert error(weight, found, x) < 0.7 * error(weight, quantize(weight, "int4", 32), x)
    unseen = quantize_calibrated(weight, torch.zeros(K, K), "int4", 32)
    assert error(weight, unseen, inputs()) < 0.2


class Net(torch.nn.Module):
    """Two layers with the same input, one behind them, one that is never called."""

    def __init__(self) -> None:
        super().__init__()
        self.q, self.k, self.out, self.never = (torch.nn.Linear(8, 8) for _ in range(4))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        out: torch.Tensor = self.out(self.q(x) * self.k(x))
        return out


def test_second_moments_of_inputs() -> None:
    model = Net().train()
    batches = [torch.randn(2, 3, 8), torch.randn(5, 8)]
    found = calibrate(model, batches)
    rows = torch.cat([batch.reshape(-1, 8) for batch in batches])
    assert torch.allclose(found.hessians["q"], rows.T @ rows, rtol=1e-4, atol=1e-5)
    assert found.hessians["q"] is found.hessians["k"]
    with torch.no_grad():
        inner = model.q(rows) * model.k(rows)
    assert torch.allclose(found.hessians["out"], inner.T @ inner, rtol=1e-4, atol=1e-5)
    assert "never" not in found.hessians
    assert found.tokens == {"q": 11, "k": 11, "out": 11}
    assert model.training and not model.q._forward_pre_hooks


@pytest.mark.parametrize("wrap", [tuple, list, lambda each: {"x": each[0]}])
def test_batches_of_any_form(wrap: object) -> None:
    x = torch.randn(4, 8)
    found = calibrate(Net(), [wrap([x])])  # type: ignore[operator]
    torch.testing.assert_close(found.hessians["q"], x.T @ x)


def test_no_batch() -> None:
    with pytest.raises(ValueError, match="no batch"):
        calibrate(Net(), [])


@pytest.mark.parametrize("data", [{"x": torch.zeros(4, 8)}, "text", None, 3])
def test_what_has_no_batches(data: Any) -> None:
    with pytest.raises(OptionTypeError, match="data wants an iterable of batches"):
        calibrate(Net(), data)


def test_modes_of_all_modules_are_kept() -> None:
    model = Net().train()
    model.q.eval()
    calibrate(model, [torch.zeros(4, 8)])
    assert model.training
    assert not model.q.training


class Writes(Net):
    """Changes an input in place, and passes it by name."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        q = self.q(x)
        return self.out(q * self.k(input=x.mul_(2)))  # type: ignore[no-any-return]


def test_an_input_that_is_written_to() -> None:
    x = torch.randn(4, 8)
    found = calibrate(Writes(), [x.clone()])
    torch.testing.assert_close(found.hessians["q"], x.T @ x)
    torch.testing.assert_close(found.hessians["k"], 4 * x.T @ x)


@pytest.mark.parametrize(
    ("x", "note"),
    [(torch.full((4, 256), torch.nan), "were not finite"), (torch.zeros(0, 256), "on 0 tokens")],
)
def test_inputs_that_say_nothing(x: torch.Tensor, note: str) -> None:
    model = torch.nn.Sequential(torch.nn.Linear(256, 512))
    plain = prepare(copy.deepcopy(model), "int4")
    found: Any = prepare(model, "int4", calibration=calibrate(model, [x]))
    assert note in found.fxopt_linears[0].format
    assert torch.equal(found[0].codes, plain[0].codes)


def test_calibrations_that_do_not_fit() -> None:
    model = torch.nn.Sequential(torch.nn.Linear(256, 512))
    with pytest.raises(OptionTypeError, match=r"calibration wants what fxopt\.calibrate returns"):
        prepare(model, "int4", calibration={"0": 1})  # type: ignore[arg-type]
    seen = calibrate(torch.nn.Sequential(torch.nn.Linear(128, 512)), [torch.zeros(4, 128)])
    with pytest.raises(ValueError, match="0 has 256 input features, calibrated were 128"):
        prepare(model, "int4", calibration=seen)
