"""fold-causal-mask: masks made from sizes alone are proven causal and dropped; look-alikes stay."""

from __future__ import annotations

import math
import re
from collections.abc import Callable

import pytest
import torch
from torch.nn.functional import scaled_dot_product_attention as sdpa
from torch.utils.checkpoint import checkpoint

from support.causal_masks import (
    ALL,
    CAUSAL,
    NAME,
    NEAR_MISSES,
    PASSES,
    B,
    D,
    H,
    S,
    check,
    has_mask,
    inputs,
    lowest,
    packed,
    q_and_k,
    site,
)
from support.golden import assert_golden
from support.numerics import assert_closer, to_double
from support.reference import reference_mode
from support.rewriting import rewriting


@pytest.mark.parametrize("dynamic", [False, True])
@pytest.mark.parametrize("name", CAUSAL)
def test_fires_on_causal(name: str, dynamic: bool) -> None:
    plain = site(CAUSAL[name])
    found = rewriting(plain, PASSES, dynamic=dynamic)
    check(found, plain, inputs())
    assert found.applied(NAME) == 1, found.reasons(NAME)
    assert "causal, proven for all sizes and computed at" in found.reasons(NAME)
    assert "is_causal=True" in found.after[0]
    assert not has_mask(found)
    check(found, plain, inputs(S + 5))
    assert found.graphs == (1 if dynamic else 2)


@pytest.mark.parametrize("dynamic", [False, True])
@pytest.mark.parametrize("name", ALL)
def test_fires_on_all_true(name: str, dynamic: bool) -> None:
    plain = site(ALL[name])
    found = rewriting(plain, PASSES, dynamic=dynamic)
    check(found, plain, inputs())
    assert found.applied(NAME) == 1, found.reasons(NAME)
    assert "masks nothing, proven for all sizes" in found.reasons(NAME)
    assert "is_causal=True" not in found.after[0]
    assert not has_mask(found)


@pytest.mark.parametrize("dynamic", [False, True])
@pytest.mark.parametrize("name", NEAR_MISSES)
def test_near_miss(name: str, dynamic: bool) -> None:
    mask, reason = NEAR_MISSES[name]
    plain = site(mask)
    found = rewriting(plain, PASSES, dynamic=dynamic)
    args = inputs()
    torch.manual_seed(1)
    out = found.call(*args)
    torch.manual_seed(1)
    assert torch.equal(out, plain(*args))
    assert found.applied(NAME) == 0
    assert reason in found.reasons(NAME)


def test_fires_by_computing_what_has_no_rule() -> None:
    def mask(x: torch.Tensor) -> torch.Tensor:
        q, k = q_and_k(x)
        return (q * 3) % (3 * S) >= 3 * k

    static, dynamic = (rewriting(site(mask), PASSES, dynamic=each) for each in (False, True))
    check(static, site(mask), inputs())
    assert f"causal, computed at all its {S * S} entries" in static.reasons(NAME)
    check(dynamic, site(mask), inputs())
    assert "mask=" in dynamic.reasons(NAME)
    assert dynamic.applied(NAME) == 0


def test_fires_on_a_window_longer_than_the_sequence_if_that_is_known() -> None:
    def mask(x: torch.Tensor) -> torch.Tensor:
        q, k = q_and_k(x)
        return (k <= q) & (k > q - 12)

    static, dynamic = (rewriting(site(mask), PASSES, dynamic=each) for each in (False, True))
    check(static, site(mask), inputs())
    assert static.applied(NAME) == 1
    check(dynamic, site(mask), inputs())
    assert dynamic.applied(NAME) == 0
    check(dynamic, site(mask), inputs(15))


def test_fires_on_large_static_sizes_without_computing_the_mask(monkeypatch: pytest.MonkeyPatch) -> None:
    from fxopt.passes import mask_proof

    monkeypatch.setattr(mask_proof, "run", None)
    found = rewriting(site(CAUSAL["packed"]), PASSES)
    check(found, site(CAUSAL["packed"]), [torch.randn(1, 1, 300, D) for _ in range(3)])
    assert "too large to be computed as well" in found.reasons(NAME)


def rectangular(offset: bool) -> Callable[..., torch.Tensor]:
    def attend(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        row = torch.arange(q.shape[2])[:, None] + (k.shape[2] - q.shape[2] if offset else 0)
        return sdpa(q, k, v, attn_mask=torch.arange(k.shape[2])[None, :] <= row)

    return attend


@pytest.mark.parametrize("dynamic", [False, True])
def test_fires_on_fewer_queries_only_where_they_are_the_first(dynamic: bool) -> None:
    q, k, v = torch.randn(B, H, 4, D), torch.randn(B, H, S, D), torch.randn(B, H, S, D)
    first, last = (rewriting(rectangular(offset), PASSES, dynamic=dynamic) for offset in (False, True))
    check(first, rectangular(False), [q, k, v])
    assert first.applied(NAME) == 1
    check(last, rectangular(True), [q, k, v])
    assert last.applied(NAME) == 0
    offset = r"q \+ n1 - n0|q \+ n0 - n1" if dynamic else r"q \+ 5"
    assert re.search(f'saw mask="k <= ({offset})"', last.reasons(NAME))


def test_near_miss_mask_given_as_input() -> None:
    def attend(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        return sdpa(q, k, v, attn_mask=mask[:S, :S])

    found = rewriting(attend, PASSES)
    check(found, attend, [*inputs(), torch.ones(20, 20, dtype=torch.bool).tril()])
    assert 'saw mask="c0[q, k]"; c0 is l_mask_' in found.reasons(NAME)


class Buffered(torch.nn.Module):
    """A triangle kept as a buffer, which may be changed between two calls."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("triangle", torch.ones(S, S, dtype=torch.bool).tril())

    def forward(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        return sdpa(q, k, v, attn_mask=self.triangle)


def test_near_miss_buffer_that_is_changed_later() -> None:
    module = Buffered()
    found = rewriting(module, PASSES)
    args = inputs()
    assert torch.equal(found.call(*args), module(*args))
    module.triangle.fill_(True)
    assert torch.equal(found.call(*args), module(*args))
    assert found.applied(NAME) == 0


def written_before(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    mask = torch.ones(S, S, dtype=torch.bool).tril()
    mask[:, 0] = False
    mask[0, 3] = True
    return sdpa(q, k, v, attn_mask=mask)


def written_base(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    place = torch.arange(S)
    mask = place[None, :] <= place[:, None]
    view = mask[None, None]
    mask.logical_not_()
    mask.fill_diagonal_(True)
    return sdpa(q, k, v, attn_mask=view)


def written_source(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    place = torch.arange(S)
    row = place[:, None]
    place.add_(1)
    return sdpa(q, k, v, attn_mask=torch.arange(S)[None, :] <= row)


def written_by_slices(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    mask = torch.full((S, S), -math.inf)
    mask[:5].zero_()
    mask[5:, 1:].zero_()
    return sdpa(q, k, v, attn_mask=mask)


def triangle_in_place(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    return sdpa(q, k, v, attn_mask=torch.ones(S, S, dtype=torch.bool).tril_())


@pytest.mark.parametrize(
    ("attend", "reason"),
    [
        (written_before, "is written by"),
        (written_base, "is written by"),
        (written_source, "is written by"),
        (written_by_slices, "is written by"),
        (triangle_in_place, "tril_"),
    ],
)
def test_near_miss_written(attend: Callable[..., torch.Tensor], reason: str) -> None:
    found = rewriting(attend, PASSES)
    args = inputs()
    assert torch.equal(found.call(*args), attend(*args))
    assert found.applied(NAME) == 0
    assert reason in found.reasons(NAME)


def test_fires_where_the_mask_is_written_or_read_later() -> None:
    def attend(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        mask = torch.ones(S, S, dtype=torch.bool).tril()
        out = sdpa(q, k, v, attn_mask=mask)
        mask[0] = True
        return out, sdpa(q, k, v, attn_mask=mask)

    found = rewriting(attend, PASSES)
    args = inputs()
    with reference_mode():
        reference = attend(*to_double(args))
    assert_closer(reference, found.call(*args), attend(*args))
    assert found.applied(NAME) == 1
    assert "is written by" in found.reasons(NAME)
    assert has_mask(found)


def test_fires_in_eager_spelling_of_two_layers() -> None:
    def layers(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        mask = torch.where(packed(q), torch.zeros(()), lowest())
        for _ in range(2):
            w = torch.softmax(q @ k.transpose(2, 3) * 0.5 + mask, -1, dtype=torch.float32).to(q.dtype)
            q = w @ v
        return q

    found = rewriting(layers, PASSES, dynamic=True)
    check(found, layers, inputs())
    assert found.applied(NAME) == 2
    assert not has_mask(found)
    check(found, layers, inputs(1 + S))
    assert found.graphs == 1


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_fires_with_the_lowest_number_of_a_narrow_dtype(dtype: torch.dtype) -> None:
    def mask(x: torch.Tensor) -> torch.Tensor:
        keep = q_and_k(x)[1] <= q_and_k(x)[0]
        return torch.where(keep, torch.zeros((), dtype=x.dtype), torch.finfo(x.dtype).min)

    found = rewriting(site(mask), PASSES)
    check(found, site(mask), inputs(dtype=dtype))
    assert found.applied(NAME) == 1


def test_gradients_are_eagers() -> None:
    plain = site(CAUSAL["packed"])
    found = rewriting(plain, PASSES)

    def gradients(call: Callable[..., torch.Tensor], args: list[torch.Tensor]) -> list[torch.Tensor]:
        leaves = [arg.clone().requires_grad_() for arg in args]
        return list(torch.autograd.grad(call(*leaves).square().sum(), leaves))

    args = inputs()
    with reference_mode():
        reference = gradients(plain, to_double(args))
    assert_closer(reference, gradients(found.call, args), gradients(plain, args))
    assert found.applied(NAME) == 1


def test_fires_inside_of_checkpoints_that_share_the_mask() -> None:
    def layer(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        return sdpa(q, k, v, attn_mask=mask)

    def model(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        mask = packed(q)
        for _ in range(2):
            q = checkpoint(layer, q, k, v, mask, use_reentrant=False)
        return q

    found = rewriting(model, PASSES)
    check(found, model, inputs())
    assert found.applied(NAME) == 2, found.reasons(NAME)


def test_not_inside_of_a_checkpoint_that_writes_the_mask() -> None:
    def layer(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        return sdpa(q, k, v, attn_mask=mask)

    def model(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        mask = torch.ones(S, S, dtype=torch.bool).tril()
        q = checkpoint(layer, q, k, v, mask, use_reentrant=False)
        mask[0] = True
        return checkpoint(layer, q, k, v, mask, use_reentrant=False)

    found = rewriting(model, PASSES)
    args = inputs()
    assert torch.equal(found.call(*args), model(*args))
    assert found.applied(NAME) == 0
    assert "is written by" in found.reasons(NAME)


def test_fires_where_the_mask_was_made_without_grad_and_outside_of_autocast() -> None:
    def attend(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        with torch.no_grad():
            mask = CAUSAL["where_lowest"](q)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            return sdpa(q, k, v, attn_mask=mask.to(torch.bfloat16))

    found = rewriting(attend, PASSES)
    args = [arg.requires_grad_() for arg in inputs()]
    out, wanted = found.call(*args), attend(*args)
    assert out.dtype == wanted.dtype == torch.bfloat16
    check(found, attend, [arg.detach() for arg in args])
    assert found.applied(NAME) >= 1, found.reasons(NAME)


def test_fires_golden() -> None:
    found = rewriting(site(packed), PASSES, dynamic=True)
    found.call(*inputs())
    assert_golden(found.before[0], "fold_causal_mask", "packed_before")
    assert_golden(found.after[0], "fold_causal_mask", "packed_after")
