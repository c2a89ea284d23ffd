"""PyTorch's products of float8 with a static weight: fxopt's on a processor, left where they are not."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import fx, nn
from torch._subclasses import FakeTensorMode
from torch.nn.functional import ScalingType, scaled_mm

from fxopt.frontend.adopt import NAME
from fxopt.frontend.scaled_products import scaled_site
from fxopt.ir.contract import Status
from fxopt.ir.sources import CannotConvert
from fxopt.report.record import collect
from support.compiled import all_handled, compile_fxopt

N, K = 48, 128


class Scaled(nn.Module):
    """Tokens that are rounded to float8 with a scale each, or one for all, and a static weight."""

    def __init__(self, rowwise: bool, bias: bool, new: bool, dtype: torch.dtype = torch.bfloat16) -> None:
        super().__init__()
        self.rowwise, self.new, self.dtype = rowwise, new, dtype
        self.register_buffer("codes", (torch.randn(N, K) * 20).to(torch.float8_e4m3fn))
        self.register_buffer("scale", torch.rand(1, N) / 100 if rowwise else torch.tensor(0.013))
        self.register_buffer("bias", torch.randn(N, dtype=dtype) if bias else None)

    def rounded(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        largest = x.abs().amax(-1, keepdim=True) if self.rowwise else x.abs().amax()
        scale = largest.float() / 448
        return (x / scale).to(torch.float8_e4m3fn), scale

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        codes, scale = self.rounded(x)
        if not self.new:
            return torch._scaled_mm(codes, self.codes.t(), scale, self.scale, self.bias, out_dtype=self.dtype)
        kind = ScalingType.RowWise if self.rowwise else ScalingType.TensorWise
        kinds = {"bias": self.bias, "output_dtype": self.dtype}
        out: torch.Tensor = scaled_mm(codes, self.codes.t(), scale, kind, self.scale, kind, **kinds)
        return out

    def exact(self, x: torch.Tensor) -> torch.Tensor:
        codes, scale = self.rounded(x)
        wide = codes.double() @ self.codes.double().t() * scale.double() * self.scale.double()
        return wide if self.bias is None else wide + self.bias.double()


@pytest.fixture
def slow_rival(monkeypatch: pytest.MonkeyPatch) -> None:
    """Which product is faster is not asked of a machine that runs tests."""
    monkeypatch.setattr("fxopt.frontend.adopt.faster_rival", lambda *_: None)


@pytest.mark.usefixtures("slow_rival")
@pytest.mark.parametrize("new", [False, True])
@pytest.mark.parametrize("rowwise", [False, True])
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_products_of_float8(rowwise: bool, bias: bool, new: bool, dtype: torch.dtype) -> None:
    """As near to float64 as PyTorch's own product is, for few and for many tokens."""
    model = Scaled(rowwise, bias, new, dtype)
    with all_handled() as records:
        compiled = compile_fxopt(model)
        for tokens in (3, 1, 70):
            x = torch.randn(tokens, K)
            wanted, eager, found = model.exact(x), model(x), compiled(x)
            assert found.dtype is dtype and found.shape == eager.shape
            allowed = 1.05 * (eager.double() - wanted).norm() + 1e-6 * wanted.norm()
            assert (found.double() - wanted).norm() <= allowed
    assert all(record.applied(NAME) for record in records)


def test_a_faster_product_of_float8_stays(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("fxopt.frontend.adopt.faster_rival", lambda *_: "it is faster")
    model, x = Scaled(True, True, False), torch.randn(3, K)
    with collect() as records:
        assert torch.equal(compile_fxopt(model)(x), model(x))
    assert [(each.status, each.reason) for each in records[0].evidence if each.rewrite == NAME] == [
        (Status.UNPROFITABLE, "it is faster")
    ]


def test_the_rival_is_pytorchs_product() -> None:
    """What is timed beside fxopt's product runs, and gives the same."""
    model = Scaled(True, False, False, torch.float32)
    left, weight = torch.randn(3, K).to(torch.float8_e4m3fn), model.codes.t()
    site = scaled_site(_scaled_node(left, weight, torch.rand(3, 1), model.scale))
    assert site.rival is not None
    values = [weight, model.scale]
    dense = site.convert(values).weight.dequantize()
    torch.testing.assert_close(site.rival(values, left.float()), left.float() @ dense.t())


def _scaled_node(*operands: torch.Tensor, **kwargs: Any) -> fx.Node:
    graph = fx.Graph()
    nodes = [graph.placeholder(f"x{place}") for place in range(len(operands))]
    for node, value in zip(nodes, operands, strict=True):
        node.meta["val"] = value
    call = graph.call_function(torch.ops.aten._scaled_mm.default, tuple(nodes), {"out_dtype": torch.float32})
    call.kwargs = {**call.kwargs, **kwargs}
    call.meta["val"] = torch.empty(operands[0].shape[0], operands[1].shape[1])
    return call


def test_near_misses_of_float8() -> None:
    left, right = torch.randn(3, K).to(torch.float8_e4m3fn), torch.randn(K, N).to(torch.float8_e4m3fn)
    one = torch.ones(())
    with pytest.raises(CannotConvert, match="scales of blocks"):
        scaled_site(_scaled_node(left, right, torch.rand(3, K // 128), torch.rand(K // 128, 2)))
    with pytest.raises(CannotConvert, match="scales of blocks"):
        scaled_site(_scaled_node(left, right, one, torch.rand(N, 1)))
    with pytest.raises(CannotConvert, match="a result that is scaled"):
        scaled_site(_scaled_node(left, right, one, one, scale_result=one))
    with FakeTensorMode():
        on_gpu = [torch.empty(3, K, device="cuda", dtype=left.dtype), torch.empty(K, N, device="cuda")]
    with pytest.raises(CannotConvert, match="a GPU multiplies float8 itself"):
        scaled_site(_scaled_node(*on_gpu, one, one))


def test_a_weight_of_float8_that_is_given_stays() -> None:
    model = Scaled(False, False, False)

    def product(x: torch.Tensor, codes: torch.Tensor) -> torch.Tensor:
        given, scale = model.rounded(x)
        return torch._scaled_mm(given, codes.t(), scale, model.scale, out_dtype=torch.bfloat16)

    x = torch.randn(3, K)
    with collect() as records:
        assert torch.equal(compile_fxopt(product)(x, model.codes.clone()), product(x, model.codes))
    (entry,) = [each for each in records[0].evidence if each.rewrite == NAME]
    assert entry.status is Status.ILLEGAL and "differs from call to call" in entry.reason
