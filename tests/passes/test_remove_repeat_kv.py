"""remove-repeat-kv: repeated heads become grouped attention; other repetitions stay."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch.nn.functional import scaled_dot_product_attention as sdpa
from torch.nn.functional import softmax

from support.golden import assert_golden
from support.numerics import assert_closer
from support.rewriting import rewriting

NAME = "remove-repeat-kv"
PASSES = ("eliminate-noops", "rewrite-attention", NAME)
B, HKV, G, S, D = 2, 2, 3, 7, 4
Site = Callable[..., Any]


def repeat_kv(x: torch.Tensor, groups: int = G) -> torch.Tensor:
    batch, heads, rows, depth = x.shape
    x = x[:, :, None, :, :].expand(batch, heads, groups, rows, depth)
    return x.reshape(batch, heads * groups, rows, depth)


def llama(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    k, v = repeat_kv(k), repeat_kv(v)
    return softmax(q @ k.transpose(2, 3) * 0.5, dim=-1, dtype=torch.float32).to(q.dtype) @ v


def fused(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    return sdpa(q, repeat_kv(k), repeat_kv(v), scale=0.5, is_causal=True)


def interleaved(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    return sdpa(q, k.repeat_interleave(G, dim=1), v.repeat_interleave(G, dim=1))


def rows_first(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    def repeat(x: torch.Tensor) -> torch.Tensor:
        x = x.transpose(1, 2)
        return x.unsqueeze(3).expand(B, S, HKV, G, D).reshape(B, S, HKV * G, D).transpose(1, 2)

    return sdpa(q, repeat(k), repeat(v))


SPELLINGS: dict[str, Site] = {f.__name__: f for f in (llama, fused, interleaved, rows_first)}


def inputs(dtype: torch.dtype = torch.float32) -> list[torch.Tensor]:
    return [torch.randn(B, heads, S, D).to(dtype) for heads in (HKV * G, HKV, HKV)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", SPELLINGS)
def test_fires(name: str, dtype: torch.dtype) -> None:
    site = SPELLINGS[name]
    found = rewriting(site, PASSES)
    args = inputs(dtype)
    out = found.call(*args)
    assert found.applied(NAME) == 1, found.reasons(NAME)
    assert "expand" not in found.after[0] and "repeat" not in found.after[0]
    assert_closer(site(*[t.double() for t in args]), out, site(*args), strides=False)


@pytest.mark.parametrize("name", SPELLINGS)
def test_fires_with_eagers_gradients(name: str) -> None:
    site = SPELLINGS[name]
    found = rewriting(site, PASSES)

    def gradients(call: Site, tensors: list[torch.Tensor]) -> list[torch.Tensor]:
        leaves = [t.clone().requires_grad_() for t in tensors]
        call(*leaves).pow(2).sum().backward()
        return [leaf.grad for leaf in leaves if leaf.grad is not None]

    args = inputs()
    exact = gradients(site, [t.double() for t in args])
    assert_closer(exact, gradients(found.call, args), gradients(site, args), strides=False)


def test_fires_with_dynamic_shapes() -> None:
    found = rewriting(fused, PASSES, dynamic=True)
    for size in (5, 8, 12):
        q, k, v = (torch.randn(2, heads, size, D) for heads in (6, 2, 2))
        exact = fused(q.double(), k.double(), v.double())
        assert_closer(exact, found.call(q, k, v), fused(q, k, v), strides=False)
    assert found.graphs == 1
    assert found.applied(NAME) == 1, found.reasons(NAME)


def test_fires_golden() -> None:
    found = rewriting(fused, PASSES)
    found.call(*inputs())
    assert_golden(found.before[0], "remove_repeat_kv", "fused_before")
    assert_golden(found.after[0], "remove_repeat_kv", "fused_after")


def tiled(x: torch.Tensor) -> torch.Tensor:
    return x[:, None].expand(B, G, HKV, S, D).reshape(B, G * HKV, S, D)


def other_order(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    return sdpa(q, tiled(k), tiled(v))


def only_keys(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    return sdpa(q, repeat_kv(k), torch.cat([v, v, v], dim=1))


def repeated_rows(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    k, v = (t.unsqueeze(3).expand(B, HKV, S, G, D).reshape(B, HKV, S * G, D) for t in (k, v))
    return sdpa(q[:, :HKV], k, v)


@pytest.mark.parametrize("site", [other_order, only_keys, repeated_rows])
def test_near_miss(site: Site) -> None:
    found = rewriting(site, PASSES)
    args = inputs()
    assert torch.equal(found.call(*args), site(*args))
    assert found.applied(NAME) == 0


def written_cache(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    k, v = k.clone(), v.clone()
    wide_k, wide_v = repeat_kv(k), repeat_kv(v)
    k.zero_()
    return sdpa(q, wide_k, wide_v) + k.sum()


def test_not_across_a_write_to_the_keys() -> None:
    found = rewriting(written_cache, PASSES)
    args = inputs()
    assert torch.equal(found.call(*args), written_cache(*args))
    assert "written by" in found.reasons(NAME)


def appended_cache(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    """Written in front of the repetition, as a growing cache is."""
    k, v = k.clone(), v.clone()
    k[:, :, 3:].copy_(q[:, :2, 3:])
    return sdpa(q, repeat_kv(k), repeat_kv(v)) + k.sum()


def test_a_write_in_front_of_the_repetition_is_part_of_it() -> None:
    found = rewriting(appended_cache, PASSES)
    args = inputs()
    assert torch.equal(found.call(*args), appended_cache(*args))
    assert found.applied(NAME) == 1


def test_keys_that_are_read_elsewhere_keep_their_copy() -> None:
    def site(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> Any:
        wide = repeat_kv(k)
        return sdpa(q, wide, repeat_kv(v)), wide.sum()

    found = rewriting(site, PASSES)
    args = inputs()
    for mine, theirs in zip(found.call(*args), site(*args), strict=True):
        assert_closer(theirs.double(), mine, theirs, strides=False)
    assert found.applied(NAME) == 1


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize(
    ("rows", "keys"),
    [((2, 4), (2, 1)), ((4,), (1,)), ((2, 4), (1, 4)), ((2, 4), (1, 1)), ((1, 4), (2, 1)), ((2, 1), (2, 4))],
)
def test_whatever_broadcasts(rows: tuple[int, ...], keys: tuple[int, ...], masked: bool) -> None:
    def attend(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, keep: torch.Tensor) -> torch.Tensor:
        return sdpa(q, k, v, attn_mask=keep) if masked else sdpa(q, k, v, is_causal=True)

    torch.manual_seed(0)
    args = [torch.randn(*rows, S, D), torch.randn(*keys, S, D), torch.randn(*keys, S, D)]
    keep = torch.rand(*torch.broadcast_shapes(rows, keys), S, S) < 0.8
    for training in (False, True):

        def computed(site: Site, dtype: torch.dtype, training: bool = training) -> list[torch.Tensor]:
            leaves = [each.detach().to(dtype).requires_grad_(training) for each in args]
            out = site(*leaves, keep)
            return [out.detach(), *(torch.autograd.grad(out.sin().sum(), leaves) if training else ())]

        got = computed(rewriting(attend, PASSES).call, torch.float32)
        assert_closer(computed(attend, torch.float64), got, computed(attend, torch.float32), strides=False)


@pytest.mark.parametrize(
    ("rows", "keys", "training", "dtype", "grouped"),
    [
        ((2, 4), (2, 1), False, torch.float32, True),
        ((4,), (1,), False, torch.float32, True),
        ((2, 4), (2, 1), True, torch.bfloat16, True),
        ((2, 4), (2, 1), True, torch.float32, False),
        ((2, 4), (2, 4), False, torch.float32, False),
        ((2, 1), (2, 1), False, torch.float32, False),
        ((2, 1), (2, 4), False, torch.float32, False),
    ],
)
def test_one_head_of_keys_is_a_group(
    rows: tuple[int, ...], keys: tuple[int, ...], training: bool, dtype: torch.dtype, grouped: bool
) -> None:
    q, k = (torch.randn(*lead, 20, 8, dtype=dtype, requires_grad=training) for lead in (rows, keys))
    found = rewriting(lambda q, k: sdpa(q, k, k), PASSES)
    found.call(q, k)
    assert ("enable_gqa=True" in found.after[-1]) == grouped, found.after[-1]
    assert ("'broadcast'" in found.providers[-1]) == (rows == (2, 1) and keys == (2, 4))
    if grouped and not training:
        assert "decomposed" in found.providers[-1], "one call of a kernel costs more than so few scores"


def test_more_scores_of_one_head_are_a_kernels() -> None:
    q, k = torch.randn(2, 4, 64, 8), torch.randn(2, 1, 64, 8)
    found = rewriting(lambda q, k: sdpa(q, k, k, is_causal=True), PASSES)
    assert_closer(
        sdpa(q.double(), k.double(), k.double(), is_causal=True),
        found.call(q, k),
        sdpa(q, k, k, is_causal=True),
    )
    assert "'sdpa'" in found.providers[-1], found.providers
