"""The layout of quantized weights: packing is exact, parts mean what they say, codes are the nearest."""

from __future__ import annotations

import pytest
import torch

from fxopt.ir.quantize import NotFinite, quantize
from fxopt.ir.quantized_weight import QuantizedWeight, pack_nibbles, signal_to_noise, unpack_nibbles
from fxopt.ir.weight_formats import FORMATS

N, K = 24, 160
# name, group size, decibels that rounding normal numbers leaves at least
CASES = [
    ("int8", 0, 40), ("int8", 32, 42), ("fp8_e4m3", 0, 31), ("int4", 32, 21), ("int4", 64, 20),
    ("int4", 0, 19), ("nf4", 64, 20), ("nf4", 48, 20), ("fp4", 64, 17), ("fp4_e2m1", 16, 19),
]  # fmt: skip


def dense(rows: int = N, columns: int = K) -> torch.Tensor:
    return torch.randn(rows, columns, generator=torch.Generator().manual_seed(0)) * 0.03


@pytest.mark.parametrize("count", [1, 15, 16, 31, 32, 33, 160])
def test_packing_of_nibbles_is_exact(count: int) -> None:
    codes = torch.randint(0, 16, (5, count), dtype=torch.uint8)
    packed = pack_nibbles(codes)
    assert packed.shape == (5, -(-count // 32) * 16)
    assert torch.equal(unpack_nibbles(packed, count), codes)


def test_nibbles_lie_as_described() -> None:
    packed = pack_nibbles(torch.arange(64)[None] % 16)
    place = torch.arange(16)
    assert torch.equal(packed[0, :16].long(), place | (place << 4))
    only = torch.zeros(1, 64, dtype=torch.uint8)
    only[0, 32 + 16 + 3] = 9
    assert pack_nibbles(only)[0].nonzero().flatten().tolist() == [16 + 3]
    assert int(pack_nibbles(only)[0, 19]) == 9 << 4


@pytest.mark.parametrize(("name", "group", "decibels"), CASES)
def test_rounding_keeps_the_signal(name: str, group: int, decibels: int) -> None:
    weight = dense()
    found = quantize(weight, name, group)
    assert found.shape == (N, K)
    assert signal_to_noise(weight, found.dequantize()) >= decibels


@pytest.mark.parametrize(("name", "group", "_"), CASES)
def test_rounding_is_to_the_nearest_code(name: str, group: int, _: int) -> None:
    weight = dense(4, 96)
    found = quantize(weight, name, group)
    error = (weight - found.dequantize()).abs()
    kind = FORMATS[name]
    if kind.storage is torch.float8_e4m3fn:
        every = torch.arange(256, dtype=torch.uint8).view(torch.float8_e4m3fn)
        codes = every[every.float().isfinite()]
    elif kind.bits == 8:
        codes = torch.arange(-127, 128, dtype=torch.int8)
    else:
        codes = torch.arange(16, dtype=torch.uint8)
    for code in codes:
        others = found.unpacked().clone()
        others.copy_(code)
        stored = pack_nibbles(others) if kind.bits == 4 else others
        instead = found.replaced(codes=stored).dequantize()
        assert bool((error <= (weight - instead).abs() + 1e-7).all()), float(code)


@pytest.mark.parametrize(("name", "group", "_"), [case for case in CASES if case[0] != "int4"])
def test_weights_of_the_format_are_kept(name: str, group: int, _: int) -> None:
    once = quantize(dense(), name, group)
    kept = once.dequantize()
    again = quantize(kept, name, group).dequantize()
    assert torch.allclose(kept, again, rtol=1e-6, atol=0)


@pytest.mark.parametrize("name", ["int4", "int8"])
@pytest.mark.parametrize("integer", [True, False])
def test_zero_points_are_offsets(name: str, integer: bool) -> None:
    """(q - z) * s, computed in float64, for scales of 16 bits."""
    top = 16 if name == "int4" else 256
    codes = torch.randint(0, top, (N, K), dtype=torch.uint8)
    scales = torch.rand(N, K // 32).half() / 10
    zeros = torch.randint(0, top, (N, K // 32)).float()
    if not integer:
        zeros = (zeros + torch.rand(N, K // 32)).half().float()
    found = QuantizedWeight.from_codes(name, codes, scales, group_size=32, zeros=zeros)
    wide = [each.double().repeat_interleave(32, 1) for each in (zeros, scales)]
    wanted = (codes.double() - wide[0]) * wide[1]
    assert torch.allclose(
        found.dequantize(torch.float64), wanted, rtol=0, atol=2e-7 * float(wanted.abs().max())
    )
    if integer:
        assert torch.equal(found.dequantize(torch.float64), wanted)


def test_columns_are_put_back() -> None:
    weight, order = dense(), torch.randperm(K)
    plain = quantize(weight[:, order].contiguous(), "int4", 32)
    found = plain.replaced(columns=order)
    assert torch.equal(found.dequantize()[:, order], plain.dequantize())
    assert signal_to_noise(weight, found.dequantize()) > 20


@pytest.mark.parametrize("columns", [33, 100, 130])
@pytest.mark.parametrize("name", ["int4", "nf4", "int8"])
def test_short_last_group(name: str, columns: int) -> None:
    weight = dense(8, columns)
    found = quantize(weight, name, 32)
    assert found.scales.shape == (8, -(-columns // 32))
    last = weight[:, columns // 32 * 32 :]
    alone = quantize(last.contiguous(), name, 0)
    assert torch.equal(found.dequantize()[:, columns // 32 * 32 :], alone.dequantize())


def test_degenerate_groups() -> None:
    weight = dense()
    weight[0] = 0
    weight[1] = 0.25
    for name in FORMATS:
        found = quantize(weight, name).dequantize()
        assert found.isfinite().all()
        assert not found[0].any()
        assert torch.allclose(found[1], weight[1], rtol=2**-7)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_refuses_what_is_not_finite(bad: float) -> None:
    weight = dense()
    weight[2, 3] = bad
    with pytest.raises(NotFinite):
        quantize(weight, "int8")


def test_refuses_numbers_whose_distance_is_not_finite() -> None:
    weight = dense()
    weight[2, 3:5] = torch.tensor([3e38, -3e38])
    with pytest.raises(NotFinite, match="too far apart"):
        quantize(weight, "int4")
    assert quantize(weight, "int8").dequantize().isfinite().all()


@pytest.mark.parametrize(
    "change",
    [
        {"scales": torch.ones(N, 2)},
        {"codes": torch.zeros(N, K, dtype=torch.uint8)},
        {"offsets": torch.ones(N, 2)},
        {"columns": torch.arange(K - 1)},
        {"in_features": K + 1},
    ],
)
def test_refuses_tensors_that_do_not_fit(change: dict[str, object]) -> None:
    with pytest.raises(ValueError, match="wanted"):
        quantize(dense(), "int8").replaced(**change)


def test_bytes_and_identity() -> None:
    found = quantize(dense(), "int4", 32)
    assert found.nbytes == N * K // 2 + 2 * N * (K // 32) * 2
    assert found.to("cpu") is found
    assert found.same_as(quantize(dense(), "int4", 32))
    assert not found.same_as(quantize(dense() * 1.1, "int4", 32))
    assert not found.same_as(found.replaced(offsets=None))
