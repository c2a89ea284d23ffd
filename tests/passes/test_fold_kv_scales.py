"""fold-kv-scales: attention over rows of 8 bits with scales reads the rows; what only resembles it stays."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch.nn.functional import scaled_dot_product_attention as sdpa

from fxopt.ir.contract import Verdict
from fxopt.ir.graph_facts import Kernels
from fxopt.ir.ops import quantized_attention
from support.golden import assert_golden
from support.numerics import assert_closer
from support.rewriting import Rewritten, rewriting

NAME = "fold-kv-scales"
PASSES = ("eliminate-noops", "rewrite-attention", "remove-repeat-kv", "recover-mask", NAME)
B, HQ, HKV, S, D = 2, 6, 2, 37, 8
Site = Callable[..., Any]


@pytest.fixture(autouse=True)
def _at_any_size(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(quantized_attention, "ROW_NUMBERS", 0)


def inputs(
    dtype: torch.dtype = torch.float32, rows: torch.dtype = torch.int8, count: int = 1
) -> list[torch.Tensor]:
    """Query, and rows and scales of keys and values."""
    given = [torch.randn(B, HQ, count, D).to(dtype)]
    for _ in range(2):
        given.append(torch.randint(-127, 128, (B, HKV, S, D)).to(torch.int8).to(rows))
        given.append(torch.rand(B, HKV, S, 1) / 60)
    return given


def grouped(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    k, v = (each[:, :, None].expand(-1, -1, HQ // HKV, -1, -1).flatten(1, 2) for each in (k, v))
    return sdpa(q, k, v, scale=0.3)


def cached(q: Any, k8: Any, ks: Any, v8: Any, vs: Any) -> torch.Tensor:
    return grouped(q, *((rows.to(s.dtype) * s).to(q.dtype) for rows, s in ((k8, ks), (v8, vs))))


def scale_first(q: Any, k8: Any, ks: Any, v8: Any, vs: Any) -> torch.Tensor:
    return grouped(q, ks.to(q.dtype) * k8.to(q.dtype), vs.to(q.dtype) * v8.to(q.dtype))


def spelled_out(q: Any, k8: Any, ks: Any, v8: Any, vs: Any) -> torch.Tensor:
    k, v = (
        (rows.to(s.dtype) * s).to(q.dtype).repeat_interleave(HQ // HKV, 1) for rows, s in ((k8, ks), (v8, vs))
    )
    return torch.softmax(q @ k.mT * 0.3, -1, dtype=torch.float32).to(q.dtype) @ v


def sequences_first(q: Any, k8: Any, ks: Any, v8: Any, vs: Any) -> torch.Tensor:
    k, v = (
        (rows.transpose(1, 2).to(q.dtype) * s.transpose(1, 2)).to(q.dtype).transpose(1, 2)
        for rows, s in ((k8, ks), (v8, vs))
    )
    return grouped(q, k, v)


def one_scale(q: Any, k8: Any, ks: Any, v8: Any, vs: Any) -> torch.Tensor:
    return grouped(q, *((rows.float() * s.flatten()[0]).to(q.dtype) for rows, s in ((k8, ks), (v8, vs))))


def of_channels(q: Any, k8: Any, ks: Any, v8: Any, vs: Any) -> torch.Tensor:
    return grouped(q, *((rows.float() * s[:, :, :D].mT).to(q.dtype) for rows, s in ((k8, ks), (v8, vs))))


SPELLINGS = [cached, scale_first, spelled_out, sequences_first, one_scale, of_channels]


def check(found: Rewritten, site: Site, args: list[torch.Tensor]) -> None:
    wide = [
        each.double() if each.dtype in (torch.float32, torch.bfloat16, torch.float16) else each
        for each in args
    ]
    with torch.no_grad():
        assert_closer(site(*wide), found.call(*args), site(*args), strides=False)


@pytest.mark.parametrize("site", SPELLINGS)
@pytest.mark.parametrize(
    ("rows", "dtype"), [(torch.int8, torch.float32), (torch.float8_e4m3fn, torch.bfloat16)]
)
def test_fires(site: Site, rows: torch.dtype, dtype: torch.dtype) -> None:
    found = rewriting(site, PASSES)
    check(found, site, inputs(dtype, rows))
    assert found.applied(NAME) == 1, found.reasons(NAME)
    assert "('quantized_attention', 'rows', '')" in found.providers
    assert f"float32[{B}, {HKV}, {S}, {D}]" not in found.lowered[0]
    assert f"bfloat16[{B}, {HKV}, {S}, {D}]" not in found.lowered[0]


def masked(q: Any, k8: Any, ks: Any, v8: Any, vs: Any, live: Any) -> torch.Tensor:
    k, v = ((rows.to(s.dtype) * s).to(q.dtype) for rows, s in ((k8, ks), (v8, vs)))
    k, v = (each[:, :, None].expand(-1, -1, HQ // HKV, -1, -1).flatten(1, 2) for each in (k, v))
    return sdpa(q, k, v, attn_mask=live)


def test_fires_under_a_mask_of_padding() -> None:
    live = torch.ones(B, 1, 1, S, dtype=torch.bool)
    live[0, ..., :9] = False
    found = rewriting(masked, PASSES)
    check(found, masked, [*inputs(count=3), live])
    assert found.applied(NAME) == 1, found.reasons(NAME)


def test_fires_at_all_lengths() -> None:
    found = rewriting(cached, PASSES, dynamic=True)
    for length in (37, 20, 11, 5):
        args = inputs()
        args[1:] = [each[:, :, :length].contiguous() for each in args[1:]]
        check(found, cached, args)
    assert found.applied(NAME) == found.graphs <= 2, found.reasons(NAME)


def test_fires_golden() -> None:
    found = rewriting(cached, PASSES)
    found.call(*inputs(torch.bfloat16))
    assert_golden(found.before[0], "fold_kv_scales", "cached_before")
    assert_golden(found.after[0], "fold_kv_scales", "cached_after")


def zero_points(q: Any, k8: Any, ks: Any, v8: Any, vs: Any) -> torch.Tensor:
    return grouped(q, (k8.float() - 3.0) * ks, (v8.float() - 3.0) * vs)


def only_keys(q: Any, k8: Any, ks: Any, v8: Any, vs: Any) -> torch.Tensor:
    return grouped(q, (k8.float() * ks).to(q.dtype), vs.expand(-1, -1, -1, D).to(q.dtype))


def divided(q: Any, k8: Any, ks: Any, v8: Any, vs: Any) -> torch.Tensor:
    return grouped(q, k8.float() / ks, v8.float() / vs)


def of_entries(q: Any, k8: Any, ks: Any, v8: Any, vs: Any) -> torch.Tensor:
    return grouped(q, k8.float() * ks.expand(-1, -1, -1, D).clone(), v8.float() * vs)


def a_number(q: Any, k8: Any, ks: Any, v8: Any, vs: Any) -> torch.Tensor:
    return grouped(q, (k8.float() * 0.01).to(q.dtype), v8.float() * vs)


def newest_apart(q: Any, k8: Any, ks: Any, v8: Any, vs: Any) -> torch.Tensor:
    new = q[:, :HKV]
    return grouped(q, torch.cat([k8.float() * ks, new], -2), torch.cat([v8.float() * vs, new], -2))


def spread_rows(q: Any, k8: Any, ks: Any, v8: Any, vs: Any) -> torch.Tensor:
    return grouped(q, k8[:, :, :1].float() * ks, v8[:, :, :1].float() * vs)


NEAR_MISSES: dict[Site, str] = {
    zero_points: "wanted rows times a scale in K, saw arithmetic with sub",
    only_keys: "wanted K and V of 8 bits, saw only K",
    divided: "wanted rows times a scale in K, saw aten.div.Tensor",
    of_entries: "wanted a scale for each row or channel in K, saw scales of shape (2, 2, 37, 8)",
    a_number: "wanted a scale that is a tensor of floating dtype in K, saw 0.01",
    newest_apart: "wanted rows times a scale in K, saw aten.cat.default",
    spread_rows: "wanted rows of the shape of their product in K, saw (2, 2, 1, 8)",
}


@pytest.mark.parametrize("site", NEAR_MISSES)
def test_near_miss(site: Site) -> None:
    found = rewriting(site, PASSES)
    check(found, site, inputs())
    assert found.applied(NAME) == 0
    assert NEAR_MISSES[site] in found.reasons(NAME)


def test_not_for_ordinary_keys() -> None:
    """Nothing is said about attention that has nothing to do with 8 bits."""
    found = rewriting(lambda q, k, v: sdpa(q, (k * 2).half().float(), v + 1), PASSES)
    found.call(*(torch.randn(B, HQ, 3, D) for _ in range(3)))
    assert found.statuses(NAME) == []


def written_rows(q: Any, k8: Any, ks: Any, v8: Any, vs: Any) -> torch.Tensor:
    k8 = k8.clone()
    k, v = k8.float() * ks, v8.float() * vs
    k8.zero_()
    return grouped(q, k, v) + k8.sum()


def written_scales(q: Any, k8: Any, ks: Any, v8: Any, vs: Any) -> torch.Tensor:
    vs = vs.clone()
    k, v = k8.float() * ks, v8.float() * vs
    vs.mul_(2)
    return grouped(q, k, v) + vs.sum()


@pytest.mark.parametrize("site", [written_rows, written_scales])
def test_not_across_a_write(site: Site) -> None:
    found = rewriting(site, PASSES)
    check(found, site, inputs())
    assert "written by" in found.reasons(NAME)


def test_unprofitable_for_many_queries() -> None:
    found = rewriting(cached, PASSES)
    check(found, cached, inputs(count=17))
    assert "17 queries share keys and values that are computed once" in found.reasons(NAME)


def test_unprofitable_for_few_keys(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(quantized_attention, "ROW_NUMBERS", 10**6)
    found = rewriting(cached, PASSES)
    check(found, cached, inputs())
    assert "pays from 1000000" in found.reasons(NAME)


def test_a_kernel_reads_few_keys_too(monkeypatch: pytest.MonkeyPatch) -> None:
    """On the devices of the host's kernels, and nowhere else."""
    monkeypatch.setattr(quantized_attention, "ROW_NUMBERS", 10**6)
    for device, applied in (("cpu", 1), ("cuda", 0)):
        kernels = Kernels(frozenset({device}), lambda node, facts: Verdict.no(""))
        found = rewriting(cached, PASSES, kernels=kernels)
        check(found, cached, inputs())
        assert found.applied(NAME) == applied, found.reasons(NAME)


def test_not_where_gradients_are_needed() -> None:
    found = rewriting(cached, PASSES)
    args = inputs()
    args[0].requires_grad_()
    found.call(*args).sum().backward()
    assert "it has no gradient" in found.reasons(NAME)
    assert args[0].grad is not None


def test_keys_that_are_read_elsewhere_are_computed_for_them() -> None:
    def site(q: Any, k8: Any, ks: Any, v8: Any, vs: Any) -> Any:
        k = k8.float() * ks
        return grouped(q, k, v8.float() * vs), k

    found = rewriting(site, PASSES)
    check(found, site, inputs())
    assert found.applied(NAME) == 1, found.reasons(NAME)
