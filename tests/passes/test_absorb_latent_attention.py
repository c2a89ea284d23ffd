"""absorb-latent-attention: attention over latents, where few queries read many of them; what must stay."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch.nn.functional import linear
from torch.nn.functional import scaled_dot_product_attention as sdpa

from fxopt.ir.contract import Status
from fxopt.ir.ops import attention_providers
from support.golden import assert_golden
from support.latent import DK, DV, SITES, B, H, S, Site, deepseek, expanded, inputs
from support.numerics import assert_closer
from support.reference import reference_mode
from support.rewriting import Rewritten, rewriting
from support.rounding import perturbed

NAME = "absorb-latent-attention"
PASSES = (
    "functionalize-writes", "concatenate-parts", "eliminate-noops", "rewrite-attention", "remove-repeat-kv",
    "recover-mask", NAME,
)  # fmt: skip


def check(site: Site, call: Callable[..., Any], args: list[torch.Tensor]) -> None:
    with torch.no_grad():
        got, eager = call(*args), site(*args)
        others = perturbed(lambda: site(*args))
        with reference_mode():
            exact = site(*(each.double() if each.is_floating_point() else each for each in args))
    assert_closer(exact, got, eager, roundings=others, strides=False)


def has_no_tensor_of_heads_and_keys(found: Rewritten) -> bool:
    return not any(f"{H}, {S}, {width}]" in found.lowered[0] for width in (DK, DV, DK + DV))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", SITES)
def test_fires(name: str, dtype: torch.dtype) -> None:
    site = SITES[name]
    found = rewriting(site, PASSES)
    check(site, found.call, inputs(dtype))
    assert found.applied(NAME) == 1, found.reasons(NAME)
    assert "linear" not in found.after[0]
    assert has_no_tensor_of_heads_and_keys(found), found.lowered[0]


@pytest.mark.parametrize("name", ["deepseek", "own_rests"])
def test_fires_over_a_static_cache_whose_live_keys_alone_are_read(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(attention_providers, "DENSE_NUMBERS", 0)
    found = rewriting(SITES[name], PASSES)
    args = inputs(rows=3)
    check(SITES[name], found.call, args)
    assert found.applied(NAME) == 1
    assert "('attention', 'decode', '')" in found.providers
    args[1][:, :, -2:], args[2][0, :, :3] = torch.nan, torch.nan
    if name == "deepseek":  # of keys that no query sees nothing is read
        assert found.call(*args)[1:].isfinite().all()


def test_fires_with_a_growing_number_of_keys() -> None:
    found = rewriting(deepseek, PASSES, dynamic=None)
    for keys in (S, S + 1, 64):
        args = inputs(keys=keys)
        torch._dynamo.maybe_mark_dynamic(args[1], 2)
        check(deepseek, found.call, args)
    assert found.graphs == 2
    assert found.applied(NAME) == 2, found.reasons(NAME)


def test_fires_golden() -> None:
    found = rewriting(deepseek, PASSES)
    with torch.no_grad():
        found.call(*inputs())
    assert_golden(found.before[0], "absorb_latent_attention", "deepseek_before")
    assert_golden(found.after[0], "absorb_latent_attention", "deepseek_after")


# What stays


def plain(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, r: torch.Tensor, live: torch.Tensor
) -> torch.Tensor:
    key = torch.cat([k, r.expand(-1, H, -1, -1)], -1)
    return sdpa(q, key, v, attn_mask=live)


def biased(q: Any, c: Any, r: Any, w: Any, live: Any) -> torch.Tensor:
    made = linear(c, w, w[:, 0]).view(B, -1, H, DK + DV).transpose(1, 2)
    return plain(q, *made.split([DK, DV], -1), r, live)


def kept(q: Any, c: Any, r: Any, w: Any, live: Any) -> Any:
    k, v = expanded(c, w)
    return plain(q, k, v, r, live), v


def read_otherwise(q: Any, c: Any, r: Any, w: Any, live: Any) -> torch.Tensor:
    k, v = expanded(c, w)
    return plain(q, k, v, r, live) + v.sum()


def latents_written(q: Any, c: Any, r: Any, w: Any, live: Any) -> torch.Tensor:
    c = c.clone()
    k, v = expanded(c, w)
    c.zero_()
    return plain(q, k, v, r, live) + c.sum()


def keys_written(q: Any, c: Any, r: Any, w: Any, live: Any) -> torch.Tensor:
    k, v = expanded(c, w)
    v[:, :, 0] = 1.0
    return plain(q, k, v, r, live)


def normed_values(q: Any, c: Any, r: Any, w: Any, live: Any) -> torch.Tensor:
    k, v = expanded(c, w)
    return plain(q, k, torch.tanh(v), r, live)


REFUSED: dict[str, tuple[Site, str]] = {
    "biased": (biased, "with a bias"),
    "kept": (kept, "is computed anyway, for output"),
    "read_otherwise": (read_otherwise, "is computed anyway, for sum"),
    "latents_written": (latents_written, "written by zero_"),
    "keys_written": (keys_written, "written by"),
    "normed_values": (normed_values, "V made of latents"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_near_miss(name: str) -> None:
    site, reason = REFUSED[name]
    refused(site, reason, inputs())


def refused(site: Site, reason: str, args: list[torch.Tensor]) -> Rewritten:
    found = rewriting(site, PASSES)
    with torch.no_grad():
        assert_same(found.call(*args), site(*args))
    assert found.applied(NAME) == 0
    assert reason in found.reasons(NAME), found.reasons(NAME)
    return found


def assert_same(got: Any, wanted: Any) -> None:
    for mine, theirs in zip(
        torch.utils._pytree.tree_leaves(got), torch.utils._pytree.tree_leaves(wanted), strict=True
    ):
        assert_closer(theirs.double(), mine, theirs, strides=False)


def other_columns(q: Any, c: Any, r: Any, w: Any, live: Any) -> torch.Tensor:
    """The numbers of a head are no neighbours."""
    made = linear(c, w).view(B, -1, DK + DV, H).permute(0, 3, 1, 2)
    return plain(q, *made.split([DK, DV], -1), r, live)


def other_rows(q: Any, c: Any, r: Any, w: Any, live: Any) -> torch.Tensor:
    """Without the first token."""
    k, v = (each[:, :, 1:] for each in expanded(c, w))
    return plain(q, k, v, r[:, :, 1:], live[..., 1:])


def not_linear(q: Any, c: Any, r: Any, w: Any, live: Any) -> torch.Tensor:
    made = linear(c, w).relu().view(B, -1, H, DK + DV).transpose(1, 2)
    return plain(q, *made.split([DK, DV], -1), r, live)


@pytest.mark.parametrize("site", [other_columns, other_rows, not_linear])
def test_no_candidate(site: Site) -> None:
    found, args = rewriting(site, PASSES), inputs()
    with torch.no_grad():
        assert_same(found.call(*args), site(*args))
    assert found.statuses(NAME) == []


def test_many_queries_expand() -> None:
    found = refused(deepseek, "queries: ", inputs(rows=40, keys=40))
    assert found.statuses(NAME) == [Status.UNPROFITABLE]


def test_an_unknown_number_of_queries_expands() -> None:
    found, args = rewriting(deepseek, PASSES, dynamic=None), inputs(rows=3)
    torch._dynamo.mark_dynamic(args[0], 2)
    torch._dynamo.mark_dynamic(args[4], 2)
    with torch.no_grad():
        assert_same(found.call(*args), deepseek(*args))
    assert "wanted a known number of queries" in found.reasons(NAME)


def test_half_precision_expands() -> None:
    found = rewriting(deepseek, PASSES)
    with torch.no_grad():
        found.call(*inputs(torch.float16))
    assert "saw torch.float16" in found.reasons(NAME)


def test_training_expands() -> None:
    found, args = rewriting(deepseek, PASSES), inputs()
    args[3].requires_grad_()
    assert_same(found.call(*args).detach(), deepseek(*args).detach())
    assert "gradients may be wanted" in found.reasons(NAME)


def test_autocast_expands() -> None:
    def site(*args: torch.Tensor) -> torch.Tensor:
        with torch.autocast("cpu", torch.bfloat16):
            return deepseek(*args)

    refused(site, "saw autocast", inputs())
