"""Weights packed by hand as each library does: the codes come out bit for bit, and the weight as defined."""

from __future__ import annotations

import pytest
import torch

from fxopt.ir.quantized_weight import QuantizedWeight
from fxopt.ir.sources import CannotConvert, affine, bitsandbytes, compressed_tensors, gptq, hqq, quanto
from fxopt.ir.sources.tinygemm import from_int4pack
from fxopt.ir.weight_formats import FORMATS
from support.packed_layouts import (
    codes_of,
    for_cpu_4bit,
    in_bytes,
    in_halves,
    in_words,
    scales_of,
)

N, K, G = 64, 128, 32
AWQ = (0, 2, 4, 6, 1, 3, 5, 7)


def spread(table: torch.Tensor, columns: int = K) -> torch.Tensor:
    return table.double().repeat_interleave(columns // table.shape[1], 1)


def check(
    found: QuantizedWeight,
    name: str,
    codes: torch.Tensor,
    wanted: torch.Tensor,
    places: torch.Tensor | None = None,
) -> None:
    """`codes` are fxopt's own, in the order of the input features."""
    assert found.format is FORMATS[name]
    own = found.unpacked()
    if found.columns is not None:
        own = torch.empty_like(own).index_copy_(1, found.columns, own)
    assert torch.equal(own.view(torch.uint8), codes.view(torch.uint8))
    error = (found.dequantize(torch.float64) - wanted.double()).norm() / wanted.double().norm()
    assert error <= 1e-7, error


def test_bitsandbytes_int8() -> None:
    codes = (codes_of(N, K, 8).int() - 128).to(torch.int8)
    absmax = scales_of(N)
    found = bitsandbytes.from_int8(codes, absmax)
    check(found, "int8", codes, codes.double() * absmax.double()[:, None] / 127)
    assert found.codes.data_ptr() == codes.data_ptr()


@pytest.mark.parametrize("kind", ["nf4", "fp4"])
@pytest.mark.parametrize(("columns", "group"), [(128, 64), (96, 32), (32, 32), (80, 16)])
def test_bitsandbytes_4bit(kind: str, columns: int, group: int) -> None:
    codes = codes_of(N, columns)
    absmax = scales_of(N * columns // 64)
    packed = in_bytes(codes, high_first=True)[: N * columns // 2]
    found = bitsandbytes.from_4bit(packed[:, None], (N, columns), absmax, 64, kind)
    assert found.group_size == group
    flat = FORMATS[kind].table.double()[codes.long().flatten()] * absmax.double().repeat_interleave(64)
    check(found, kind, codes, flat.view(N, columns))


def test_bitsandbytes_4bit_in_another_storage() -> None:
    codes, absmax = codes_of(N, K), scales_of(N * K // 64)
    packed = in_bytes(codes, high_first=True)[: N * K // 2]
    plain = bitsandbytes.from_4bit(packed, (N, K), absmax, 64, "nf4")
    stored = bitsandbytes.from_4bit(packed.view(torch.bfloat16)[:, None], (N, K), absmax, 64, "nf4")
    assert stored.same_as(plain)


def test_bitsandbytes_4bit_for_cpu() -> None:
    codes, absmax = codes_of(N, K), scales_of(K // 64, N, dtype=torch.bfloat16)
    found = bitsandbytes.from_cpu_4bit(for_cpu_4bit(codes), absmax, 64, "nf4")
    check(found, "nf4", codes, FORMATS["nf4"].table.double()[codes.long()] * spread(absmax.t()))


def test_bitsandbytes_scales_that_are_quantized() -> None:
    codes, table = codes_of(1, 600, 8)[0], torch.linspace(-1, 1, 256)
    absmax, offset = scales_of(3), torch.tensor(0.125)
    found = bitsandbytes.nested_absmax(codes, table, absmax, offset, 256)
    wanted = [table[code] * absmax[place // 256] + offset for place, code in enumerate(codes.tolist())]
    assert torch.equal(found, torch.stack(wanted))


def test_bitsandbytes_tables_are_told_apart() -> None:
    for name in ("nf4", "fp4"):
        assert bitsandbytes.kind_of_table(FORMATS[name].table.clone()) == name
    with pytest.raises(CannotConvert, match="neither"):
        bitsandbytes.kind_of_table(torch.linspace(-1, 1, 16))


@pytest.mark.parametrize("block", [(1, K), (1, G), (16, 32), (48, 48), (N, K)])
def test_blocks_of_int8(block: tuple[int, int]) -> None:
    codes = (codes_of(N, K, 8).int() - 128).to(torch.int8)
    table = (-(-N // block[0]), -(-K // block[1]))
    scales, zeros = scales_of(*table), codes_of(*table, 7).to(torch.int8) - 60
    wide = scales.double().repeat_interleave(block[0], 0)[:N].repeat_interleave(block[1], 1)[:, :K]
    shift = zeros.double().repeat_interleave(block[0], 0)[:N].repeat_interleave(block[1], 1)[:, :K]
    check(affine.from_blocks(codes, scales, block), "int8", codes, codes.double() * wide)
    found = affine.from_blocks(codes, scales, block, zeros)
    check(found, "int8", codes, (codes.double() - shift) * wide)
    assert affine.from_blocks(codes, scales, block, torch.zeros_like(zeros)).offsets is None


def test_blocks_of_int8_that_hold_4_bits() -> None:
    codes, scales = codes_of(N, K).to(torch.int8) - 8, scales_of(N, K // G)
    zeros = codes_of(N, K // G, seed=3).to(torch.int8) - 8
    found = affine.from_blocks(codes, scales, (1, G), zeros, bits=4)
    check(found, "int4", codes + 8, (codes.double() - spread(zeros)) * spread(scales))
    with pytest.raises(CannotConvert, match="more"):
        affine.from_blocks(codes * 2, scales, (1, G), bits=4)


@pytest.mark.parametrize("block", [(1, K), (16, 32)])
def test_blocks_of_float8(block: tuple[int, int]) -> None:
    codes = torch.randn(N, K).to(torch.float8_e4m3fn)
    scales = scales_of(N // block[0], K // block[1])
    wide = scales.double().repeat_interleave(block[0], 0).repeat_interleave(block[1], 1)
    check(affine.from_blocks(codes, scales, block), "fp8_e4m3", codes, codes.double() * wide)


def test_quanto_bytes() -> None:
    codes, scale = (codes_of(N, K, 8).int() - 128).to(torch.int8), scales_of(N, 1)
    check(quanto.from_bytes(codes, scale, 0), "int8", codes, codes.double() * scale.double())
    single = torch.tensor(0.25)
    check(quanto.from_bytes(codes, single, None), "int8", codes, codes.double() * 0.25)


@pytest.mark.parametrize("floating", [True, False])
def test_quanto_bits(floating: bool) -> None:
    codes, scale = codes_of(N, K), scales_of(N * K // G, 1)
    shift = scales_of(N * K // G, 1, seed=5) if floating else codes_of(N * K // G, 1, seed=5)
    packed = in_halves(codes.view(-1, G), high_first=False)
    found = quanto.from_bits(packed, scale, shift, shape=(N, K), bits=4, group_size=G, axis=0)
    table = codes.double().view(-1, G)
    wanted = (
        table * scale.double() - shift.double() if floating else (table - shift.double()) * scale.double()
    )
    check(found, "int4", codes, wanted.view(N, K))


def test_quanto_bits_with_an_odd_number_of_groups() -> None:
    codes, scale, shift = codes_of(3, 64), scales_of(3, 1), scales_of(3, 1, seed=5)
    padded = torch.cat((codes, torch.zeros_like(codes[:1])))
    packed = in_halves(padded, high_first=False)
    found = quanto.from_bits(packed, scale, shift, shape=(3, 64), bits=4, group_size=64, axis=0)
    check(found, "int4", codes, codes.double() * scale.double() - shift.double())


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("group", [G, None])
def test_hqq_with_zero_points_that_are_floating(bits: int, group: int | None) -> None:
    codes = codes_of(N, K, bits)
    table = codes.view(-1, group or K)
    scale, zero = scales_of(len(table), 1), scales_of(len(table), 1, seed=7) * 100
    packed = in_halves(table, high_first=True) if bits == 4 else table
    found = hqq.from_hqq(packed, scale, zero, shape=(N, K), bits=bits, group_size=group, axis=1)
    own = codes if bits == 4 else codes ^ 128
    check(found, "int4" if bits == 4 else "int8", own, ((table - zero.double()) * scale.double()).view(N, K))


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("zeros_format", [1, 2])
@pytest.mark.parametrize("ordered", ["none", "natural", "activation order"])
def test_gptq(bits: int, zeros_format: int, ordered: str) -> None:
    codes, scales = codes_of(N, K, bits), scales_of(K // G, N, dtype=torch.float16)
    zeros = codes_of(K // G, N, bits - 1, seed=3)
    index = torch.arange(K) // G
    if ordered == "activation order":
        index = index[torch.randperm(K, generator=torch.Generator().manual_seed(2))]
    words = in_words(codes.t(), bits, None).new_zeros(0)
    words = in_words(codes, bits).t().contiguous()
    stored = in_words(zeros, bits)
    given = None if ordered == "none" else index.int()
    found = gptq.from_gptq(words, stored, scales, given, bits=bits, group_size=G, zeros_format=zeros_format)
    points = zeros.double() + (zeros_format == 1)
    wanted = (codes.double().t() - points[index]) * scales.double()[index]
    own = codes if bits == 4 else codes ^ 128
    check(found, "int4" if bits == 4 else "int8", own, wanted.t())
    assert (found.columns is not None) == (ordered == "activation order")


def test_gptq_with_one_group() -> None:
    codes, scales, zeros = codes_of(N, K), scales_of(1, N), codes_of(1, N, 3)
    words, stored = in_words(codes, 4).t().contiguous(), in_words(zeros, 4)
    found = gptq.from_gptq(words, stored, scales, None, bits=4, group_size=-1, zeros_format=2)
    check(found, "int4", codes, ((codes.double().t() - zeros.double()) * scales.double()).t())


def test_awq() -> None:
    codes, scales = codes_of(N, K), scales_of(K // G, N, dtype=torch.float16)
    zeros = codes_of(K // G, N, seed=3)
    words, stored = in_words(codes.t().contiguous(), 4, AWQ), in_words(zeros, 4, AWQ)
    found = gptq.from_awq(words, stored, scales, bits=4, group_size=G)
    index = torch.arange(K) // G
    check(found, "int4", codes, ((codes.double().t() - zeros.double()[index]) * scales.double()[index]).t())


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("columns", [128, 120])
@pytest.mark.parametrize("asymmetric", [True, False])
def test_compressed_tensors_words(bits: int, columns: int, asymmetric: bool) -> None:
    codes, scales = codes_of(N, columns, bits), scales_of(N, columns // 8)
    zeros = codes_of(N, columns // 8, bits, seed=3)
    stored = in_words(zeros.t().contiguous(), bits).t().contiguous() if asymmetric else None
    words = in_words(codes, bits)
    found = compressed_tensors.from_words(
        words, scales, torch.tensor([N, columns]), bits=bits, group_size=8, zeros=stored
    )
    middle = spread(zeros, columns) if asymmetric else 1 << (bits - 1)
    own = codes if bits == 4 else codes ^ 128
    check(found, "int4" if bits == 4 else "int8", own, (codes.double() - middle) * spread(scales, columns))
    assert (found.offsets is not None) == asymmetric


def test_compressed_tensors_groups_in_their_own_order() -> None:
    codes, scales = codes_of(N, K), scales_of(N, K // G)
    index = (torch.arange(K) // G)[torch.randperm(K, generator=torch.Generator().manual_seed(2))]
    found = compressed_tensors.from_words(
        in_words(codes, 4), scales, (N, K), bits=4, group_size=G, group_index=index
    )
    check(found, "int4", codes, (codes.double() - 8) * scales.double()[:, index])


def test_compressed_tensors_4_bit_floats() -> None:
    codes = codes_of(N, K)
    packed = in_bytes(codes, high_first=False)[: N * K // 2].view(N, K // 2)
    values = FORMATS["fp4_e2m1"].table.double()[codes.long()]
    scales = scales_of(N, K // 16, lowest=1.0).to(torch.float8_e4m3fn)
    found = compressed_tensors.from_nvfp4(packed, scales, torch.tensor([8.0]))
    check(found, "fp4_e2m1", codes, values * spread(scales.float()) / 8)
    exponents = codes_of(N, K // 32, 3, seed=4) + 120
    found = compressed_tensors.from_mxfp4(packed, exponents)
    check(found, "fp4_e2m1", codes, values * spread(2.0 ** (exponents.double() - 127)))


@pytest.mark.parametrize("shape", [(N, K), (60, 120), (96, 64)])
def test_int4_as_pytorch_packs_it(shape: tuple[int, int]) -> None:
    rows, columns = -(-shape[0] // 16) * 16, -(-shape[1] // G) * G
    codes = codes_of(rows, columns)
    packed = torch.ops.aten._convert_weight_to_int4pack_for_cpu(codes.int(), 1)
    both = torch.stack((scales_of(columns // G, rows), scales_of(columns // G, rows, seed=2)), -1)
    found = from_int4pack(packed, both.bfloat16(), shape, G)
    scale, zero = both.bfloat16().double().permute(2, 1, 0)
    wanted = (codes.double() - 8) * spread(scale, columns) + spread(zero, columns)
    check(found, "int4", codes[: shape[0], : shape[1]].contiguous(), wanted[: shape[0], : shape[1]])


def test_int4_in_tiles() -> None:
    """The layout of GPUs: lane t of 8 x 32 codes has row t / 4, columns 2 (t % 4) + 0, 1, 8, 9, and 16 on."""

    def pack(codes: torch.Tensor) -> torch.Tensor:
        tiles = codes.int().view(N // 8, 8, K // 128, 4, 2, 2, 4, 2)
        lanes = tiles.permute(0, 2, 1, 6, 3, 4, 5, 7).reshape(N // 8, K // 128, 32, 4, 8).long()
        order = torch.tensor([0, 2, 4, 6, 1, 3, 5, 7])
        words = (lanes[..., order] << (4 * torch.arange(8))).sum(-1)
        return torch.where(words >= 2**31, words - 2**32, words).int()

    codes = codes_of(N, K)
    both = torch.stack((scales_of(K // G, N), scales_of(K // G, N, seed=2)), -1)
    found = from_int4pack(pack(codes), both, (N, K), G, pack)
    scale, zero = both.double().permute(2, 1, 0)
    check(found, "int4", codes, (codes.double() - 8) * spread(scale) + spread(zero))
    with pytest.raises(CannotConvert, match="does not reproduce"):
        from_int4pack(pack(codes), both, (N, K), G, lambda codes: pack(codes) & 0x77777777)


def _zeros(*shape: int, dtype: torch.dtype = torch.uint8) -> torch.Tensor:
    return torch.zeros(shape, dtype=dtype)


REFUSED = {
    "another axis": (
        lambda: hqq.from_hqq(
            _zeros(N, G), _zeros(1, N), _zeros(1, N), shape=(N, 64), bits=4, group_size=G, axis=0
        ),
        "neighbouring columns share no scale",
    ),
    "three bits": (
        lambda: hqq.from_hqq(_zeros(1), _zeros(1), _zeros(1), shape=(N, K), bits=3, group_size=G, axis=1),
        "codes of 3 bits",
    ),
    "groups over the ends of rows": (
        lambda: quanto.from_bits(
            _zeros(1), _zeros(1), _zeros(1), shape=(N, K), bits=4, group_size=96, axis=0
        ),
        "run over the ends",
    ),
    "blocks over the ends of rows": (
        lambda: bitsandbytes.from_4bit(_zeros(N * 25), (N, 50), scales_of(N * 50 // 64), 64, "nf4"),
        "run over the ends",
    ),
    "an unknown format": (
        lambda: bitsandbytes.from_4bit(_zeros(N * 32), (N, 64), scales_of(N), 64, "af4"),
        "not known: af4",
    ),
    "bytes that are missing": (
        lambda: bitsandbytes.from_4bit(_zeros(N * 32 - 1), (N, 64), scales_of(N), 64, "nf4"),
        "bytes",
    ),
    "a zero point that may be two": (
        lambda: gptq.from_gptq(
            _zeros(16, N, dtype=torch.int32), _zeros(1, N // 8, dtype=torch.int32) - 1, scales_of(1, N), None,
            bits=4, group_size=-1, zeros_format=1,
        ),
        "all bits set",
    ),
    "groups of several sizes": (
        lambda: gptq.from_gptq(
            _zeros(16, N, dtype=torch.int32), _zeros(4, N // 8, dtype=torch.int32), scales_of(4, N),
            torch.arange(K).clamp(max=99) // 33, bits=4, group_size=G, zeros_format=2,
        ),
        "have not 32 columns",
    ),
    "scales of another shape": (
        lambda: affine.from_blocks(_zeros(N, K, dtype=torch.int8), scales_of(N, 3), (1, G)),
        "wanted",
    ),
    "other floats": (
        lambda: affine.from_blocks(_zeros(N, K).to(torch.float8_e5m2), scales_of(N, 1), (1, K)),
        "codes of torch.float8_e5m2",
    ),
    "a packed weight of another device": (
        lambda: from_int4pack(_zeros(N, K // 4, dtype=torch.int16), scales_of(K // G, N, 2), (N, K), G),
        "on cpu",
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", REFUSED)
def test_refuses(case: str) -> None:
    make, reason = REFUSED[case]
    with pytest.raises(CannotConvert, match=reason):
        make()
