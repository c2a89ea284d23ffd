"""Weights that are quantized already are recognised in a graph, and nothing else is."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import nn

from fxopt.frontend.adopt import NAME
from fxopt.ir.contract import Status
from fxopt.ir.weight_formats import FORMATS
from fxopt.report.record import GraphRecord, collect
from support.compiled import all_handled, compile_fxopt
from support.packed_layouts import codes_of, in_halves, in_words, scales_of
from support.typed_weights import UnknownTensor, bytes_weight, int4_weight, int8_weight, layer_of

N, K, G = 48, 128, 32
AWQ = (0, 2, 4, 6, 1, 3, 5, 7)


class Held(nn.Module):
    """A product with a weight that is computed of buffers."""

    def __init__(self, dequantize: Callable[..., torch.Tensor], *buffers: torch.Tensor) -> None:
        super().__init__()
        self.dequantize = dequantize
        for place, each in enumerate(buffers):
            self.register_buffer(f"b{place}", each)
        self.count = len(buffers)

    def weight(self) -> torch.Tensor:
        return self.dequantize(*(getattr(self, f"b{place}") for place in range(self.count)))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return nn.functional.linear(x, self.weight())

    def exact(self) -> torch.Tensor:
        """The weight (N, K), computed in float64."""
        buffers = [getattr(self, f"b{place}") for place in range(self.count)]
        wide = [
            each.double() if each.is_floating_point() and each.element_size() > 1 else each
            for each in buffers
        ]
        return self.dequantize(*wide).double()


class Transposed(Held):
    """The same with a weight (K, N)."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.matmul(x, self.weight())

    def exact(self) -> torch.Tensor:
        return super().exact().t()


def _halves_written(packed: torch.Tensor, zero: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    """HQQ: both halves are written into a temporary; zero points are floating."""
    rows = packed.shape[0]
    codes = torch.empty(2 * rows, packed.shape[1], dtype=scale.dtype)
    codes[:rows] = (packed & 240) >> 4
    codes[rows:] = packed & 15
    return ((codes - zero) * scale).reshape(N, K)


def _awq(words: torch.Tensor, zeros: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    """AWQ: words of eight outputs in an order of their own, (K, N)."""
    shifts = torch.tensor([4 * AWQ.index(place) for place in range(8)])
    codes = ((words[..., None] >> shifts) & 15).flatten(-2)
    points = ((zeros[..., None] >> shifts) & 15).flatten(-2)
    return (codes - points.repeat_interleave(G, 0)) * scale.repeat_interleave(G, 0)


def _of_table(codes: torch.Tensor, table: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    values = table[codes.long()].to(scale.dtype).view(N, -1, G)
    return (values * scale[..., None]).reshape(N, K)


def _cast(codes: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    return codes.to(scale.dtype) * scale


def _computed(dtype: torch.dtype) -> dict[str, tuple[nn.Module, str]]:
    codes = codes_of(N, K)
    scale, zero = scales_of(N * K // G, 1, dtype=dtype), scales_of(N * K // G, 1, dtype=dtype, seed=9) * 200
    groups = scales_of(K // G, N, dtype=dtype)
    words = in_words(codes.t().contiguous(), 4, AWQ)
    zeros = in_words(codes_of(K // G, N, seed=4), 4, AWQ)
    bytes_ = (codes_of(N, K, 8).int() - 128).to(torch.int8)
    floats = torch.randn(N, K).to(torch.float8_e4m3fn)
    table = FORMATS["nf4"].table
    packed = in_halves(codes.view(-1, G), high_first=True)
    return {
        "halves written apart": (Held(_halves_written, packed, zero, scale), "int4"),
        "words in AWQ's order": (Transposed(_awq, words, zeros, groups), "int4"),
        "a table of values": (Held(_of_table, codes, table, scales_of(N, K // G, dtype=dtype)), "nf4"),
        "bytes": (Held(_cast, bytes_, scales_of(N, 1, dtype=dtype)), "int8"),
        "bytes without scales": (Held(lambda codes: codes.to(dtype), bytes_), "int8"),
        "8-bit floats": (Held(_cast, floats, scales_of(N, 1, dtype=dtype)), "fp8_e4m3"),
    }


def _typed(dtype: torch.dtype) -> dict[str, tuple[nn.Module, str]]:
    zeros = torch.arange(-8, 8, dtype=torch.int8).repeat(N // 16)[:, None]
    with_zeros = int8_weight(N, K, dtype)
    shifted = type(with_zeros)(
        {**{name: getattr(with_zeros, name) for name in with_zeros._held}, "zero_point": zeros},
        with_zeros._values, (N, K), dtype,
    )  # fmt: skip
    return {
        "Int8Tensor": (layer_of(int8_weight(N, K, dtype)), "int8"),
        "Int8Tensor with zero points": (layer_of(shifted, bias=False), "int8"),
        "Int4Tensor": (layer_of(int4_weight(N, K, dtype=dtype)), "int4"),
        "WeightQBytesTensor": (layer_of(bytes_weight(N, K, dtype)), "fp8_e4m3"),
    }


def _int4pack(dtype: torch.dtype) -> nn.Module:
    packed = torch.ops.aten._convert_weight_to_int4pack_for_cpu(codes_of(N, K).int(), 1)
    both = torch.stack((scales_of(K // G, N), scales_of(K // G, N, seed=2)), -1).to(dtype)

    class Packed(Held):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            rows = x.reshape(-1, K)
            return torch.ops.aten._weight_int4pack_mm_for_cpu(rows, self.b0, G, self.b1).view(
                *x.shape[:-1], N
            )

    def widened(_: torch.Tensor, both: torch.Tensor) -> torch.Tensor:
        scale, zero = both.permute(2, 1, 0).repeat_interleave(G, 2)
        return (codes_of(N, K).double() - 8) * scale + zero

    return Packed(widened, packed, both)


def _int8pack(dtype: torch.dtype) -> nn.Module:
    class Packed(Held):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return torch.ops.aten._weight_int8pack_mm(x.reshape(-1, K), self.b0, self.b1).view(
                *x.shape[:-1], N
            )

    codes = (codes_of(N, K, 8).int() - 128).to(torch.int8)
    return Packed(lambda codes, scale: codes * scale[:, None], codes, scales_of(N, dtype=dtype))


def _cases(dtype: torch.dtype) -> dict[str, tuple[nn.Module, str]]:
    ops = {"int4pack": (_int4pack(dtype), "int4"), "int8pack": (_int8pack(dtype), "int8")}
    return {**_typed(dtype), **_computed(dtype), **ops}


CASES = list(_cases(torch.float32))
GATES = {torch.float32: 1e-5, torch.bfloat16: 5e-3}


def noted(records: list[GraphRecord]) -> list[tuple[Status, str]]:
    return [(each.status, each.reason) for one in records for each in one.evidence if each.rewrite == NAME]


def exact(model: Any, x: torch.Tensor) -> torch.Tensor:
    """The product in float64 with the weight of the library's formula, computed in float64."""
    weight = model.exact() if isinstance(model, Held) else model.weight.dequantize(torch.float64)
    found = x.double() @ weight.T
    return found if getattr(model, "bias", None) is None else found + model.bias.double()


@pytest.mark.parametrize("dtype", GATES)
@pytest.mark.parametrize("case", CASES)
def test_adopts(case: str, dtype: torch.dtype) -> None:
    model, name = _cases(dtype)[case]
    x = torch.randn(2, 5, K).to(dtype)
    with torch.no_grad(), all_handled() as records:
        found = compile_fxopt(model)(x)
    notes = noted(records)
    assert [status for status, _ in notes] == [Status.APPLIED], notes
    assert f": {name} {N} x {K}" in notes[0][1]
    assert ("qlinear" in [op for op, *_ in records[0].providers]) and found.dtype is dtype
    wanted = exact(model, x)
    error = float((found.double() - wanted).norm() / wanted.norm())
    assert error <= GATES[dtype], error


@dataclass(frozen=True)
class PerRow:
    """torchao's name for a scale for each token."""


@dataclass(frozen=True)
class Options:
    """Those of torchao's quantizer of activations."""

    granularity: PerRow = PerRow()
    mapping_type: None = None


def test_rounded_activations_are_rounded() -> None:
    layer = layer_of(int8_weight(N, K, act_quant_kwargs=Options()))
    x = torch.randn(4, K)
    with torch.no_grad(), all_handled() as records:
        found = compile_fxopt(layer)(x)
        wanted = layer(x)
    assert noted(records)[0][1].endswith("activations rounded to int8")
    error = float((found - wanted).norm() / wanted.norm())
    assert 1e-4 < error < 2e-2, "rounding to 8 bits shows, and no more than that"


@pytest.mark.parametrize("way", ["written", "written below", "written behind", "replaced", "memory replaced"])
def test_weights_that_change_are_not_stale(way: str) -> None:
    layer = layer_of(int8_weight(N, K))
    compiled, x = compile_fxopt(layer), torch.randn(3, K)
    with torch.no_grad():
        compiled(x)
        if way == "written":
            layer.weight.scale.mul_(2)
        elif way == "written below":
            layer.weight.qdata.copy_(layer.weight.qdata.flip(0))
        elif way == "written behind":
            layer.weight.scale.data.mul_(2)
        elif way == "replaced":
            layer.weight = layer_of(int8_weight(N, K)).weight
            layer.weight.scale.add_(1)
        else:
            layer.weight.scale.data = layer.weight.scale * 3
        torch.testing.assert_close(compiled(x), layer(x))


def test_weights_are_made_once_for_all_graphs() -> None:
    from fxopt.runtime.held_weights import STORE

    STORE.clear()
    layer = layer_of(int4_weight(N, K))
    compiled = compile_fxopt(layer)
    with torch.no_grad(), all_handled() as records:
        compiled(torch.randn(1, K))
        compiled(torch.randn(7, K))
        compiled(torch.randn(2, 3, K))
    assert len(records) >= 2
    assert len(STORE) == 1
    del layer, compiled
    torch._dynamo.reset()


def test_bytes_share_the_memory_of_the_library() -> None:
    from fxopt.ir.sources.typed import convert

    weight = int8_weight(N, K)
    assert convert(weight).weight.codes.data_ptr() == weight.qdata.data_ptr()


class Reads(nn.Module):
    """Something else than a product with the weight."""

    def __init__(self, weight: torch.Tensor) -> None:
        super().__init__()
        self.layer = layer_of(weight)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.layer(x) + (x @ self.layer.weight.t())


TYPED_NEAR_MISSES: dict[str, tuple[Callable[[], nn.Module], str]] = {
    "a class that is not known": (lambda: layer_of(int8_weight(N, K, kind=UnknownTensor)), "UnknownTensor"),
    "activations that are scaled first": (
        lambda: layer_of(int8_weight(N, K, act_pre_scale=2.0)), "activations are scaled first",
    ),
    "activations with a given scale": (
        lambda: layer_of(int8_weight(N, K, act_quant_scale=2.0)), "scale that is given",
    ),
    "another reader": (lambda: Reads(int8_weight(N, K)), "reads it"),
    "attributes that are missing": (
        lambda: layer_of(_without(int8_weight(N, K), "block_size")), "of another version",
    ),
}  # fmt: skip


def _without(weight: Any, name: str) -> Any:
    delattr(weight, name)
    del weight._values[name]
    return weight


@pytest.mark.parametrize("case", TYPED_NEAR_MISSES)
def test_refuses_typed_weights(case: str) -> None:
    make, reason = TYPED_NEAR_MISSES[case]
    model, x = make(), torch.randn(3, K)
    with torch.no_grad(), collect() as records:
        found = torch.compile(model, backend="fxopt", options={"host": "eager"})(x)
        torch.testing.assert_close(found, model(x))
    refusals = [why for record in records for _, why in record.refusals]
    assert len(refusals) == 1 and reason in refusals[0], refusals
    assert not any(record.failures for record in records)


class Given(nn.Module):
    """The codes are an argument of the call."""

    def forward(self, x: torch.Tensor, codes: torch.Tensor) -> torch.Tensor:
        return nn.functional.linear(x, codes.to(x.dtype))


class Written(Held):
    """The codes change in each call."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.b0.add_(1)
        return super().forward(x)


class OfActivations(Held):
    """The weight depends on the activations."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return nn.functional.linear(x, self.b0.to(x.dtype) * x.amax())


def _codes(seed: int = 0) -> torch.Tensor:
    return (codes_of(N, K, 8, seed).int() - 128).to(torch.int8)


COMPUTED_NEAR_MISSES: dict[str, tuple[Callable[[], nn.Module], str | None]] = {
    "codes that are given": (Given, None),
    "codes that are written": (lambda: Written(lambda c: c.float(), _codes()), None),
    "a weight of activations": (lambda: OfActivations(lambda c: c.float(), _codes()), None),
    "a dense weight": (lambda: Held(lambda w: w * 2, torch.randn(N, K)), None),
    "a scale for each column": (
        lambda: Held(lambda c, s: c.float() * s, _codes(), scales_of(1, K)), "share a scale",
    ),
    "a weight that is no line": (
        lambda: Held(lambda c, s: c.float() ** 2 * s, _codes(), scales_of(N, 1)), "no linear function",
    ),
    "codes of more bits": (
        lambda: Held(lambda c: c.float(), torch.randint(0, 999, (N, K), dtype=torch.int32)), "no codes",
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", COMPUTED_NEAR_MISSES)
def test_leaves_other_products_alone(case: str) -> None:
    make, reason = COMPUTED_NEAR_MISSES[case]
    model = make()
    inputs = [torch.randn(3, K), *([_codes()] if case == "codes that are given" else [])]
    again = copy.deepcopy(model)
    with torch.no_grad(), all_handled() as records:
        torch.testing.assert_close(compile_fxopt(model)(*inputs), again(*inputs))
    notes = noted(records)
    assert [status for status, _ in notes] == ([] if reason is None else [Status.ILLEGAL]), notes
    assert reason is None or reason in notes[0][1]


def test_can_be_disabled() -> None:
    model, _ = _computed(torch.float32)["bytes"]
    with torch.no_grad(), all_handled() as records:
        compile_fxopt(model, disable=(NAME,))(torch.randn(3, K))
    assert [status for status, _ in noted(records)] == [Status.DISABLED]
    assert not records[0].providers


def test_gradients_of_activations_pass_through() -> None:
    layer = layer_of(int8_weight(N, K))
    x = torch.randn(3, K, requires_grad=True)
    with all_handled() as records:
        compile_fxopt(layer)(x).square().sum().backward()
    assert noted(records)[0][0] is Status.APPLIED
    own = x.detach().clone().requires_grad_()
    layer(own).square().sum().backward()
    torch.testing.assert_close(x.grad, own.grad, rtol=1e-4, atol=1e-4)
