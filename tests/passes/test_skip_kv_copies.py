"""skip-kv-copies: attention reads what was copied; copies for another reason, or of other rows, stay."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch.nn.functional import scaled_dot_product_attention as sdpa

from fxopt.measure.models import build
from fxopt.measure.shrink import Scale
from support.golden import assert_golden
from support.numerics import assert_closer
from support.rewriting import rewriting

NAME = "skip-kv-copies"
PASSES = ("eliminate-noops", "simplify-cat", "rewrite-attention", "remove-repeat-kv", NAME)
B, H, S, D = 2, 3, 7, 4
Site = Callable[..., Any]


def heads(x: torch.Tensor) -> torch.Tensor:
    return x.view(B, -1, H, D).transpose(1, 2)


def contiguous(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> Any:
    return sdpa(heads(q), heads(k).contiguous(), heads(v).contiguous())


def cached(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> Any:
    keys, values = (torch.cat([x.new_empty(0), heads(x.sin())], -2) for x in (k, v))
    return sdpa(heads(q), keys, values, is_causal=True), keys, values


def only_values(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> Any:
    return sdpa(heads(q), heads(k), heads(v).contiguous())


def written_out(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> Any:
    keys, values = heads(k).contiguous(), heads(v).contiguous()
    return torch.softmax(heads(q) @ keys.mT * 0.5, -1) @ values


SPELLINGS: dict[str, Site] = {f.__name__: f for f in (contiguous, cached, only_values, written_out)}


def inputs(rows: int = S) -> list[torch.Tensor]:
    return [torch.randn(B, rows, H * D) for _ in range(3)]


@pytest.mark.parametrize("name", SPELLINGS)
def test_fires(name: str) -> None:
    site = SPELLINGS[name]
    found = rewriting(site, PASSES)
    args = inputs()
    out = found.call(*args)
    assert found.applied(NAME) == 1, found.reasons(NAME)
    assert_closer(site(*[t.double() for t in args]), out, site(*args), strides=False)


@pytest.mark.parametrize("name", SPELLINGS)
def test_fires_with_eagers_gradients(name: str) -> None:
    site = SPELLINGS[name]
    found = rewriting(site, PASSES)

    def gradients(call: Site, tensors: list[torch.Tensor]) -> list[torch.Tensor]:
        leaves = [t.clone().requires_grad_() for t in tensors]
        out = call(*leaves)
        results = out if isinstance(out, tuple) else (out,)
        sum(each.pow(2).sum() for each in results).backward()  # type: ignore[union-attr]
        return [leaf.grad for leaf in leaves if leaf.grad is not None]

    args = inputs()
    exact = gradients(site, [t.double() for t in args])
    assert_closer(exact, gradients(found.call, args), gradients(site, args))
    assert found.applied(NAME) == 1


def test_fires_with_dynamic_shapes() -> None:
    found = rewriting(contiguous, PASSES, dynamic=True)
    for rows in (5, 8, 12):
        args = inputs(rows)
        exact = contiguous(*[t.double() for t in args])
        assert_closer(exact, found.call(*args), contiguous(*args))
    assert found.graphs == 1
    assert found.applied(NAME) == 1, found.reasons(NAME)


def test_fires_golden() -> None:
    found = rewriting(cached, PASSES)
    found.call(*inputs())
    assert_golden(found.before[0] + "->\n" + found.after[0], NAME.replace("-", "_"), "cached")


def test_results_that_are_copies_stay_copies() -> None:
    found = rewriting(cached, PASSES)
    args = inputs()
    for mine, theirs in zip(found.call(*args), cached(*args), strict=True):
        assert mine.stride() == theirs.stride()


def columns_of_keys(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> Any:
    """Entries of a row that lie far apart."""
    keys = k.view(B, H, D, S).transpose(2, 3).contiguous()
    return sdpa(heads(q), keys, heads(v))


def one_head_for_all(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> Any:
    keys = heads(k)[:, :1].expand(B, H, S, D).contiguous()
    return sdpa(heads(q), keys, heads(v))


def not_copied(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> Any:
    return sdpa(heads(q).contiguous(), heads(k), heads(v))


@pytest.mark.parametrize("site", [columns_of_keys, one_head_for_all, not_copied])
def test_near_miss(site: Site) -> None:
    found = rewriting(site, PASSES)
    args = inputs()
    assert_closer(site(*[t.double() for t in args]), found.call(*args), site(*args))
    assert found.applied(NAME) == 0


def test_not_across_a_write_to_the_keys() -> None:
    def site(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> Any:
        keys = k.sin()
        copied = heads(keys).contiguous()
        keys.zero_()
        return sdpa(heads(q), copied, heads(v)) + keys.sum()

    found = rewriting(site, PASSES)
    args = inputs()
    assert torch.equal(found.call(*args), site(*args))
    assert found.applied(NAME) == 0
    assert "written by" in found.reasons(NAME)


def test_not_of_a_copy_that_is_cut_from_autograd() -> None:
    def site(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> Any:
        k = k.sin()
        with torch.no_grad():
            keys = heads(k).contiguous()
        return sdpa(heads(q), keys, heads(v))

    found = rewriting(site, PASSES)
    args = [t.requires_grad_() for t in inputs()]
    mine, theirs = (torch.autograd.grad(f(*args).sum(), args, allow_unused=True) for f in (found.call, site))
    assert mine[1] is None and theirs[1] is None
    assert torch.allclose(mine[0], theirs[0], rtol=1e-4, atol=1e-6)
    assert found.applied(NAME) == 0
    assert "autograd" in found.reasons(NAME)


def test_keys_beyond_the_first_cache_are_read_from_their_copy() -> None:
    def site(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> Any:
        q, k, v = (x.view(1, -1, 2, 64).transpose(1, 2) for x in (q, k, v))
        return sdpa(q, k.contiguous(), v.contiguous())

    for rows, applied in ((64, 1), (65, 0)):
        found = rewriting(site, PASSES)
        found.call(*[torch.randn(1, rows, 128) for _ in range(3)])
        assert found.applied(NAME) == applied, found.reasons(NAME)


def test_fires_in_the_first_step_of_a_decoder() -> None:
    subject = build("llama", Scale(layers=2))
    model = subject.model.eval()
    found = rewriting(lambda **given: model(**given).logits, PASSES)
    with torch.no_grad():
        out, eager = found.call(**subject.kwargs), model(**subject.kwargs).logits
    with torch.no_grad():
        exact = subject.double()
        assert_closer(exact.model(**exact.kwargs).logits, out, eager)
    assert found.applied(NAME) == 2, found.reasons(NAME)
