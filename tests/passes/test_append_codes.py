"""fuse-append-attention over caches of 8 bits: new rows are rounded by the op, as the cache rounds them."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from fxopt.ir.row_codes import SMALLEST, dequantized, largest_of, quantized, write_rows
from support.decoding_layers import (
    FIRST,
    KERNELS,
    KV_HEADS,
    NEW,
    ROWS,
    B,
    D,
    Site,
    Tensor,
    attend,
    new_rows,
    turn,
)
from support.numerics import assert_closer
from support.rewriting import Rewritten, rewriting

NAME = "fuse-append-attention"
PASSES = ("eliminate-noops", "rewrite-attention", "remove-repeat-kv", "fold-kv-scales", "recover-mask", NAME)
REASON = "new keys are rotated, rounded to 8 bits, written and attended to by one kernel"
STORED = (torch.int8, torch.float8_e4m3fn)
Round = Callable[[Tensor, torch.dtype], tuple[Tensor, Tensor]]


def inputs(stored: torch.dtype, dtype: torch.dtype = torch.float32) -> list[Tensor]:
    """q, k, v, cos, sin, position, codes of keys and of values, their scales, mask."""
    plain = [each.to(dtype) for each in new_rows()]
    keys, values = (quantized(torch.randn(B, KV_HEADS, ROWS, D), stored) for _ in range(2))
    mask = torch.rand(B, 1, NEW, ROWS) > 0.3
    return [*plain, torch.tensor(FIRST), keys[0], values[0], keys[1], values[1], mask]


def stored_as(rounding: Round, later: int = 0) -> Site:
    """A layer whose cache rounds so, and whose scales go so many rows behind what they are of."""

    def site(
        q: Tensor, k: Tensor, v: Tensor, cos: Tensor, sin: Tensor, position: Tensor, key: Tensor,
        value: Tensor, key_scale: Tensor, value_scale: Tensor, mask: Tensor,
    ) -> Tensor:  # fmt: skip
        places = torch.arange(NEW) + position
        read = []
        for cache, scales, new in ((key, key_scale, turn(k, cos, sin)), (value, value_scale, v)):
            rows, of_rows = rounding(new, cache.dtype)
            write_rows(cache, places, rows)
            scales.index_copy_(2, places + later, of_rows)
            read.append(dequantized(cache, scales, q.dtype))
        return attend(turn(q, cos, sin), *read, mask)

    return site


def last_rows(q, k, v, cos, sin, position, key, value, key_scale, value_scale, mask):  # type: ignore[no-untyped-def] # noqa: ANN001, ANN201
    """As a growing cache has them."""
    read = []
    for cache, scales, new in ((key, key_scale, turn(k, cos, sin)), (value, value_scale, v)):
        rows, of_rows = quantized(new, cache.dtype)
        cache[:, :, ROWS - NEW :].copy_(rows)
        scales[:, :, ROWS - NEW :].copy_(of_rows)
        read.append(dequantized(cache, scales, q.dtype))
    return attend(turn(q, cos, sin), *read, mask)


def check(site: Site, stored: torch.dtype, dtype: torch.dtype = torch.float32) -> Rewritten:
    """The result is eager's, and what is in the caches its very bits."""
    given = inputs(stored, dtype)
    found = rewriting(site, PASSES, kernels=KERNELS)
    plain, rewritten = ([each.clone() for each in given] for _ in range(2))
    widened = [*(each.double() for each in given[:5]), *(each.clone() for each in given[5:])]
    with torch.no_grad():
        exact, eager, result = site(*widened), site(*plain), found.call(*rewritten)
    assert_closer([exact], [result], [eager], strides=False)
    for theirs, ours in zip(plain[6:10], rewritten[6:10], strict=True):
        assert torch.equal(theirs.view(torch.uint8), ours.view(torch.uint8))
    return found


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("stored", STORED)
@pytest.mark.parametrize("site", [stored_as(quantized), last_rows], ids=["at a position", "the last rows"])
def test_fires(site: Site, stored: torch.dtype, dtype: torch.dtype) -> None:
    found = check(site, stored, dtype)
    assert found.applied(NAME) == 1, found.reasons(NAME)
    assert REASON in found.reasons(NAME)
    assert "cached" in found.providers[0]
    assert not [line for line in found.after[0].splitlines() if "index_copy_" in line or ".copy_" in line]


def by_another_number(states: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    scales = (states.float().abs().amax(-1, keepdim=True) / 100.0).clamp_min(SMALLEST)
    return (states.float() / scales).round().clamp(-127.0, 127.0).to(dtype), scales


def by_the_mean(states: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    scales = (states.float().abs().mean(-1, keepdim=True) / 127.0).clamp_min(SMALLEST)
    return (states.float() / scales).round().clamp(-127.0, 127.0).to(dtype), scales


def by_all_heads(states: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    largest = states.float().abs().amax((1, 3), keepdim=True)
    scales = (largest / 127.0).clamp_min(SMALLEST)
    codes = (states.float() / scales).round().clamp(-127.0, 127.0).to(dtype)
    return codes, scales.expand(*states.shape[:3], 1)


def rounded_down(states: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    scales = (states.float().abs().amax(-1, keepdim=True) / largest_of(dtype)).clamp_min(SMALLEST)
    return (states.float() / scales).floor().clamp(-127.0, 127.0).to(dtype), scales


def cut_off(states: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    scales = (states.float().abs().amax(-1, keepdim=True) / largest_of(dtype)).clamp_min(SMALLEST)
    return (states.float() / scales).round().clamp(-64.0, 127.0).to(dtype), scales


def scales_of_other_rows(states: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    codes, _ = quantized(states, dtype)
    return codes, quantized(states + 1, dtype)[1]


WANTED = "new rows rounded to 8 bits by the largest of each"


@pytest.mark.parametrize(
    ("site", "reason"),
    [
        *((stored_as(each), WANTED) for each in (
            by_another_number, by_the_mean, by_all_heads, rounded_down, cut_off, scales_of_other_rows,
        )),
        (stored_as(quantized, later=1), "written to the same rows"),
    ],
)  # fmt: skip
def test_near_miss(site: Site, reason: str) -> None:
    found = check(site, torch.int8)
    assert found.applied(NAME) == 0
    assert reason in found.reasons(NAME)


def test_codes_that_are_read_elsewhere_are_rounded_there_too() -> None:
    site = stored_as(quantized)

    def reading(*given: Tensor) -> Tensor:
        rows, scales = quantized(turn(given[1], *given[3:5]), torch.int8)
        return site(*given) + (rows.float() * scales).sum().to(given[0].dtype)

    found = check(reading, torch.int8)
    assert found.applied(NAME) == 1
    assert REASON in found.reasons(NAME)
