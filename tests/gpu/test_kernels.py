"""Emitted kernels on a GPU, against float64 by the rule."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch.nn import functional as F

from fxopt.ir.ops import register_ops
from fxopt.report.record import collect
from support.emitted import PROGRAMS
from support.numerics import assert_closer
from support.runs import infer, infer64, train, train64
from support.trees import map_tensors
from support.zoo import ZOO

register_ops()
MODELS = (
    "llama",
    "gemma2",
    "qwen3",
    "gpt2",
    "gpt_oss",
    "bert",
    "modernbert",
    "t5",
    "whisper",
    "vit",
    "swin",
    "mamba",
)


@pytest.mark.parametrize("name", sorted(PROGRAMS))
def test_a_program(name: str, device: str, options: dict[str, Any]) -> None:
    function, inputs = PROGRAMS[name]
    given = [value.to(device) for value in inputs]
    wide = [value.double() if value.is_floating_point() else value for value in given]
    compiled = torch.compile(function, backend="fxopt", options=options)
    if any(not value.isfinite().all() for value in given if value.is_floating_point()):
        torch.testing.assert_close(compiled(*given), function(*given), equal_nan=True)
        return
    assert_closer(function(*wide), compiled(*given), function(*given), strides=False)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", MODELS)
def test_a_training_step(name: str, dtype: torch.dtype, device: str, options: dict[str, Any]) -> None:
    model = ZOO[name].make_model(dtype=dtype).to(device)
    inputs = moved(ZOO[name].make_inputs(training=True, dtype=dtype), device)
    exact, eager = train64(model, inputs), train(model, model, inputs)
    with collect() as records:
        compiled = torch.compile(model, backend="fxopt", options=options)
        got = train(compiled, model, inputs)
    assert_closer(exact, got, eager, strides=False)
    assert sum(len(record.kernels) for record in records) > 5
    assert [record.failures for record in records if record.failures] == []


@pytest.mark.parametrize("name", MODELS)
def test_inference(name: str, device: str, options: dict[str, Any]) -> None:
    model = ZOO[name].make_model(dtype=torch.bfloat16).to(device)
    inputs = moved(ZOO[name].make_inputs(dtype=torch.bfloat16), device)
    compiled = torch.compile(model, backend="fxopt", options=options)
    got = infer(compiled, inputs)
    assert_closer(infer64(model, inputs), got, infer(model, inputs), strides=False)


def test_dropout_forward_is_dropout_backward(device: str, options: dict[str, Any]) -> None:
    x = torch.randn(64, 500, device=device, requires_grad=True)

    def function(x: torch.Tensor) -> torch.Tensor:
        return F.layer_norm(x, (500,)) * 0 + F.dropout(x * 2, 0.25)

    made = torch.compile(function, backend="fxopt", options=options)(x)
    (gradient,) = torch.autograd.grad(made.sum(), x)
    assert torch.equal(made == 0, gradient == 0)
    assert 0.23 < (made == 0).float().mean() < 0.27


def test_measured_kernels_are_never_slower(cuda: str, tmp_path: Any) -> None:
    """What was measured decides, once: a second compilation measures nothing."""
    x = torch.randn(4096, 4096, device=cuda, dtype=torch.bfloat16)

    def function(x: torch.Tensor) -> torch.Tensor:
        return F.layer_norm(x + 1, (4096,)) * 2

    reasons = []
    for _ in range(2):
        torch._dynamo.reset()
        options = {
            "tune_seconds": 60,
            "strict": True,
            "cache_dir": str(tmp_path),
            "force_disable_caches": True,
        }
        with collect() as records:
            compiled = torch.compile(function, backend="fxopt", options=options)
            assert_closer(function(x.double()), compiled(x), function(x))
        reasons.append([e.reason for r in records for e in r.evidence if e.rewrite == "emit-kernels"])
    assert reasons[0] == reasons[1] != []
    assert "measured" in reasons[0][0]


def moved(inputs: dict[str, Any], device: str) -> dict[str, Any]:
    result: dict[str, Any] = map_tensors(lambda value: value.to(device), inputs)
    return result
