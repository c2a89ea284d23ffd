"""Attention over rows of 8 bits: all masks and modes, against keys and values that are computed first."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch

from fxopt.ir.ops import register_ops, row_attention
from fxopt.ir.ops.masking import MEAN, NAN, NONE, ZERO
from fxopt.ir.ops.quantized_attention import in_rows, quantized_attention
from fxopt.runtime import quantized_rows
from support.numerics import assert_closer

B, HQ, HKV, S, D = 2, 6, 2, 45, 8


@pytest.fixture(autouse=True, params=["torch", "c++"])
def _in_small_blocks(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of torch's, blocks of 16 rows, the last of them not full."""
    register_ops()
    quantized_rows.register_rows()
    monkeypatch.setattr(row_attention, "BLOCK_NUMBERS", 1)
    if request.param == "torch":
        monkeypatch.setattr(quantized_rows, "native", lambda: None)


def operands(
    count: int = 1, dtype: torch.dtype = torch.float32, rows: torch.dtype = torch.int8, width: int = D
) -> list[torch.Tensor]:
    given = [torch.randn(B, HQ, count, D).to(dtype)]
    for size in (D, width):
        given.append(torch.randint(-127, 127, (B, HKV, S, size)).to(torch.int8).to(rows))
        given.append(torch.rand(B, HKV, S, 1, dtype=torch.promote_types(dtype, torch.float32)) / 60)
    return given


def check(
    given: list[torch.Tensor], mask: torch.Tensor | None = None, causal: bool = False, **how: Any
) -> None:
    wide = [
        each.double() if each.dtype.is_floating_point and each.dtype.itemsize > 1 else each for each in given
    ]
    how = {"enable_gqa": True, **how}
    doubled = {name: each.double() if name == "sinks" else each for name, each in how.items()}
    widest = mask.double() if mask is not None and mask.is_floating_point() else mask
    assert_closer(
        quantized_attention(*wide, widest, 0.0, causal, **doubled),  # type: ignore[arg-type]
        in_rows(*given, mask, 0.0, causal, **how),  # type: ignore[arg-type]
        quantized_attention(*given, mask, 0.0, causal, **how),  # type: ignore[arg-type]
        strides=False,
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("rows", [torch.int8, torch.uint8, torch.float8_e4m3fn, torch.float8_e5m2])
def test_without_a_mask(dtype: torch.dtype, rows: torch.dtype) -> None:
    check(operands(3, dtype, rows))


def padding(count: int) -> torch.Tensor:
    """The first sequence has no key in a whole block."""
    live = torch.ones(B, 1, count, S, dtype=torch.bool)
    live[0, ..., :20] = False
    return live


@pytest.mark.parametrize("count", [1, 4])
@pytest.mark.parametrize("shape", [(1, 1), (B, 1), (B, HQ)])
def test_with_a_mask(count: int, shape: tuple[int, int]) -> None:
    live = padding(count)[: shape[0]].repeat(1, shape[1], 1, 1)
    if shape[1] > 1:
        live = live & (torch.rand(live.shape) < 0.6)
    check(operands(count), live)
    check(operands(count, torch.bfloat16), live)


@pytest.mark.parametrize("dead", [ZERO, NAN])
def test_rows_without_a_live_key(dead: str) -> None:
    live = padding(3)
    live[1, :, 1] = False
    check(operands(3), live, dead_rows=dead)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_masks_of_numbers(dtype: torch.dtype) -> None:
    lowest = torch.where(padding(3), 0.0, torch.finfo(dtype).min).to(dtype)
    if dtype is not torch.float16:
        lowest[1, :, 1] = torch.finfo(dtype).min
    check(operands(3, dtype), lowest, dead_rows=NONE)
    check(operands(3, dtype), lowest, dead_rows=MEAN)
    check(operands(3, dtype), lowest, dead_rows=NONE, mask_replaces=True)
    check(operands(3, dtype), torch.randn(B, HQ, 3, S).to(dtype))


def test_a_row_of_the_lowest_float16_is_the_mean() -> None:
    """Which absorbs a score of float16, as the model computes it, and would not absorb one of float32."""
    given = operands(1, torch.float16)
    lowest = torch.full((1, 1, 1, S), torch.finfo(torch.float16).min, dtype=torch.float16)
    out = in_rows(*given, lowest, enable_gqa=True, dead_rows=NONE)  # type: ignore[misc]
    mean = (given[3] * given[4]).mean(-2, keepdim=True).half()
    torch.testing.assert_close(out, mean.repeat_interleave(HQ // HKV, 1))


def test_float64() -> None:
    given = operands(3, torch.float64)
    torch.testing.assert_close(in_rows(*given, enable_gqa=True), quantized_attention(*given, enable_gqa=True))


def test_modes() -> None:
    check(operands(5), causal=True)
    check(operands(3), padding(3), sinks=torch.randn(HQ))
    check(operands(3), padding(3), score="5*tanh(s/5)")
    check(operands(3, width=5), padding(3))
    check(operands(3), scale=0.7)


def test_scales_of_other_shapes() -> None:
    given = operands(2)
    given[2], given[4] = torch.tensor(0.01), torch.rand(1, HKV, 1, D) / 60
    check(given)


def test_layouts() -> None:
    """Tokens outermost, as growing caches have them; sequences outermost."""
    for order in ((2, 0, 1, 3), (0, 2, 1, 3)):
        inverse = [order.index(each) for each in range(4)]
        given = operands(2)
        check(given[:1] + [each.permute(order).contiguous().permute(inverse) for each in given[1:]])


def test_one_block(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(row_attention, "BLOCK_NUMBERS", 2**17)
    check(operands(2))
    check(operands(2), padding(2))


def test_every_float8() -> None:
    """As torch converts them, one by one."""
    codes = torch.arange(256, dtype=torch.uint8).view(torch.float8_e4m3fn)
    finite = codes[~codes.float().isnan()]
    assert len(finite) == 254
    for rows in (finite, codes):
        out = row_attention.widen(rows, torch.tensor([0.37]), torch.empty(len(rows)))
        assert torch.equal(out.nan_to_num(), (rows.float() * 0.37).nan_to_num())
        assert torch.equal(out.isnan(), rows.float().isnan())


def test_the_keys_are_not_all_widened_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(quantized_rows, "native", lambda: None)
    seen: list[int] = []
    widen = row_attention.widen
    monkeypatch.setattr(
        row_attention, "widen", lambda rows, *others: seen.append(rows.shape[2]) or widen(rows, *others)
    )
    check(operands(2))
    assert seen
    assert max(seen) <= 16


@pytest.mark.parametrize("count", [1, 3])
def test_keys_that_no_query_sees_are_not_read(count: int) -> None:
    """As the room of a static cache behind its rows, and padding in front of them."""
    given, mask = operands(count), torch.zeros(B, 1, count, S, dtype=torch.bool)
    mask[0, ..., 7:30], mask[1, ..., 5:20] = True, True
    for scale in (given[2], given[4]):
        scale[..., :5, :], scale[..., 30:, :] = math.nan, math.nan
    out = in_rows(*given, mask, enable_gqa=True, dead_rows=ZERO)  # type: ignore[arg-type]
    live = [given[0], *(each[:, :, 5:30] for each in given[1:])]
    check(live, mask[..., 5:30], dead_rows=ZERO)
    assert torch.equal(out, in_rows(*live, mask[..., 5:30], enable_gqa=True, dead_rows=ZERO))  # type: ignore[arg-type]
    assert out.isfinite().all()


def test_no_key_that_any_query_sees() -> None:
    check(operands(), torch.zeros(B, 1, 1, S, dtype=torch.bool), dead_rows=ZERO)


@pytest.mark.parametrize("rows", [torch.int8, torch.float8_e4m3fn])
@pytest.mark.parametrize(("heads", "groups"), [(1, 1), (6, 6), (6, 2), (12, 2), (7, 1)])
@pytest.mark.parametrize("count", [1, 3])
def test_blocks_of_the_library(rows: torch.dtype, heads: int, groups: int, count: int) -> None:
    """Several blocks of 64 keys and a part of one; widths that fill no vector, one and several."""
    for width, keys in ((5, 1), (16, 64), (40, 65), (64, 200), (80, 191), (128, 130)):
        given = [torch.randn(B, heads, count, width)]
        for _ in range(2):
            given.append(torch.randint(-100, 100, (B, groups, keys, width)).to(torch.int8).to(rows))
            given.append(torch.rand(B, groups, keys, 1) / 60)
        check(given)
        live = torch.rand(B, heads, count, keys) < 0.5
        live[..., 0] = True
        check(given, live)


@pytest.mark.parametrize("threads", [1, 2, 5])
def test_parts_of_the_keys(threads: int) -> None:
    """One group, whose keys are cut into as many parts as there are threads."""
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        for keys in (1, 63, 300):
            given = [torch.randn(1, 4, 1, 64)]
            for _ in range(2):
                given.append(torch.randint(-100, 100, (1, 1, keys, 64)).to(torch.int8))
                given.append(torch.rand(1, 1, keys, 1) / 60)
            check(given)
            live = torch.arange(keys) >= keys // 3
            check(given, live[None, None, None])
    finally:
        torch.set_num_threads(before)


def test_scores_far_apart() -> None:
    """Weights that vanish, and a maximum that comes late."""
    given = operands(2)
    given[2] = given[2] * torch.linspace(0, 400, S)[:, None]
    check(given)


@pytest.mark.parametrize("place", range(5))
def test_not_a_number(place: int) -> None:
    given = operands(1)
    if given[place].dtype is torch.int8:
        given[place] = given[place].float().to(torch.float8_e4m3fn)
        given[place].view(torch.uint8)[0, 0, 3] = 0x7F
    else:
        given[place][0, 0, 0] = math.nan
    wanted, found = quantized_attention(*given, enable_gqa=True), in_rows(*given, enable_gqa=True)
    assert wanted.isnan().any()
    assert torch.equal(found.isnan(), wanted.isnan())


def test_what_the_library_does_not_read(monkeypatch: pytest.MonkeyPatch) -> None:
    """Torch computes it: a scale for each channel, capped scores, float64, other rows, transposed ones."""
    seen: list[int] = []
    monkeypatch.setattr(quantized_rows, "row_attention", lambda *_, **__: seen.append(1) or torch.zeros(1))
    how: dict[str, Any] = {"enable_gqa": True}
    cases: list[tuple[list[Any], dict[str, Any]]] = [
        (operands(), {"score": "5*tanh(s/5)"}),
        (operands(dtype=torch.float64), {}),
        (operands(rows=torch.uint8), {}),
    ]
    channels, turned = operands(), operands()
    channels[2] = torch.rand(1, HKV, 1, D)
    turned[1] = turned[1].mT.contiguous().mT
    for given, more in (*cases, (channels, {}), (turned, {})):
        in_rows(*given, **how, **more)
    assert len(seen) == 5
