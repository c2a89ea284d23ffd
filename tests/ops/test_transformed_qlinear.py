"""Quantized layers inside of transforms of `torch.func`, and differentiated forward."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import func, nn

import fxopt
from fxopt.integrations.quantized_module import QuantizedLinear
from fxopt.ir.ops import register_ops
from fxopt.ir.quantize import quantize, quantize_parameter
from support.compiled import compile_fxopt
from support.quantizable import distance

K, N = 384, 512
Transform = Callable[[Any, torch.Tensor], torch.Tensor]

TRANSFORMS: dict[str, Transform] = {
    "jvp": lambda f, x: func.jvp(f, (x,), (x.sin(),))[1],
    "vjp": lambda f, x: func.vjp(f, x)[1](torch.ones(3, N))[0],
    "grad": lambda f, x: func.grad(lambda each: f(each).square().sum())(x),
    "jacfwd": lambda f, x: func.jacfwd(f)(x[0]),
    "vmap": lambda f, x: func.vmap(f)(x),
    "vmap_of_grad": lambda f, x: func.vmap(func.grad(lambda each: f(each).square().sum()))(x),
}


@pytest.mark.parametrize("scheme", ["int8", "int8-dynamic", "nf4"])
@pytest.mark.parametrize("name", TRANSFORMS)
def test_is_that_of_the_rounded_weight(name: str, scheme: str) -> None:
    """Rounded tokens count as themselves in gradients: the values alone differ by it."""
    model: Any = fxopt.prepare(nn.Sequential(nn.Linear(K, N)), scheme)
    weight, bias, x = model[0].quantized.dequantize(), model[0].bias, torch.randn(3, K)
    wanted = TRANSFORMS[name](lambda each: nn.functional.linear(each, weight, bias), x)
    compiled = compile_fxopt(lambda given: TRANSFORMS[name](model, given))
    for found in (TRANSFORMS[name](model, x), compiled(x)):
        assert distance(found, wanted) < (2e-2 if scheme == "int8-dynamic" else 1e-5)
    torch._dynamo.reset()


@pytest.mark.parametrize("name", TRANSFORMS)
def test_features_apart(name: str) -> None:
    """Rounding one feature of three tokens, or of one, is another rounding: values differ by it."""
    dense = nn.Linear(K, N)
    layer = QuantizedLinear(quantize(dense.weight.detach(), "int8"), "int8", dense.bias, threshold=6.0)
    x = torch.randn(3, K)
    x[1, 7] = 20.0
    wanted = TRANSFORMS[name](
        lambda each: nn.functional.linear(each, layer.quantized.dequantize(), layer.bias), x
    )
    compiled = compile_fxopt(lambda given: TRANSFORMS[name](layer, given))
    for found in (TRANSFORMS[name](layer, x), compiled(x)):
        assert distance(found, wanted) < 2e-2
    torch._dynamo.reset()


@pytest.mark.parametrize("scheme", ["int8", "nf4"])
def test_jvp_and_gradient_of_experts(scheme: str) -> None:
    register_ops()
    weight = quantize_parameter(torch.randn(4, 48, 96), scheme, transposed=False)
    kinds = {"format": weight.format.name, "group_size": weight.group_size, "activation": "", "count": 4}
    dense = weight.dequantize().view(4, 48, 96)
    experts, x = torch.tensor([3, 0, 0, 2, 1]), torch.randn(5, 96)

    def product(given: torch.Tensor) -> Any:
        parts = (weight.codes, weight.scales, weight.offsets)
        return torch.ops.fxopt.expert_linear(given, experts, *parts, **kinds)

    def plain(given: torch.Tensor) -> torch.Tensor:
        return torch.einsum("snk,sk->sn", dense[experts], given)

    for name in ("jvp", "grad"):
        found, wanted = (TRANSFORMS[name](each, x) for each in (product, plain))
        assert distance(found, wanted) < 1e-5


@pytest.mark.parametrize("context", ["torch.device('meta')", "torch.inference_mode()"])
def test_tables_do_not_depend_on_where_they_are_made_first(context: str) -> None:
    code = f"import torch\nfrom fxopt.ir.weight_formats import NF4\nwith {context}:\n    NF4.table\n"
    code += "table = NF4.table\nassert not table.is_inference() and table.device.type == 'cpu'"
    subprocess.run([sys.executable, "-c", code], check=True)
