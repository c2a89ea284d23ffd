"""recover-mask: digits, strides, gradients and dtypes of what becomes of a formula."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy
import pytest
import torch
from torch.nn.functional import scaled_dot_product_attention as sdpa
from torch.nn.functional import softmax

from fxopt.errors import InternalError
from fxopt.report.record import collect
from support.numerics import assert_closer
from support.reference import reference_mode
from support.rewriting import rewriting

pytestmark = pytest.mark.usefixtures("blocks_at_any_size")

NAME = "recover-mask"
PASSES = ("eliminate-noops", "rewrite-attention", "fold-causal-mask", "remove-repeat-kv", NAME)
B, H, S, D = 2, 4, 130, 8
Site = Callable[..., torch.Tensor]


def qkv(dtype: torch.dtype = torch.float32, length: int = S) -> list[torch.Tensor]:
    torch.manual_seed(0)
    return [torch.randn(B, H, length, D, dtype=torch.float64).to(dtype) for _ in range(3)]


def doubled(args: list[torch.Tensor]) -> list[torch.Tensor]:
    return [each.double() if each.is_floating_point() else each for each in args]


def gradients(call: Site, args: list[torch.Tensor], rows: slice = slice(None)) -> list[torch.Tensor]:
    leaves = [each.detach().clone().requires_grad_(each.is_floating_point()) for each in args]
    out = call(*leaves)[:, :, rows]
    (out * torch.linspace(-1, 1, out.numel(), dtype=out.dtype).view(out.shape)).sum().backward()
    return [leaf.grad for leaf in leaves if leaf.grad is not None]


def places(q: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    return torch.arange(q.shape[2])[:, None], torch.arange(q.shape[2])


SLOPES = torch.tensor([0.7, 0.33, 0.11, 0.05])
DISTANCES: dict[str, Callable[[torch.Tensor, torch.Tensor], torch.Tensor]] = {
    "slopes": lambda far, slopes: far * slopes[:, None, None],
    "a number": lambda far, slopes: far * 0.3,
    "a quotient": lambda far, slopes: far / 3,
    "an offset": lambda far, slopes: (far - 0.37) * slopes[:, None, None],
    "both": lambda far, slopes: far * 0.3 * slopes[:, None, None] + far * 0.01,
}


@pytest.mark.parametrize("name", DISTANCES)
def test_distances_keep_their_digits(name: str) -> None:
    """``(k - q)*c0[h]``: both products are large where the distance is small."""

    def attend(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, slopes: torch.Tensor) -> torch.Tensor:
        i, j = places(q)
        added = DISTANCES[name](j - i, slopes).expand(H, q.shape[2], q.shape[2])
        return sdpa(q, k, v, attn_mask=added.masked_fill((j > i) | (j <= i - 40), -math.inf).to(q.dtype))

    found = rewriting(attend, PASSES)
    args = [*qkv(length=2000), SLOPES]
    with torch.no_grad():
        got, eager = found.call(*args), attend(*args)
        with reference_mode():
            exact = attend(*doubled(args))
    assert_closer(exact, got, eager)
    assert "('attention', 'blocks', '')" in found.providers, found.reasons(NAME)


def padded(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, keep: torch.Tensor) -> torch.Tensor:
    scores = (q @ k.mT * 0.3).masked_fill(~keep[:, None, None], torch.finfo(q.dtype).min)
    return softmax(scores, -1) @ v


def padding() -> torch.Tensor:
    keep = torch.ones(B, S, dtype=torch.bool)
    keep[0, 90:] = False
    return keep


@pytest.mark.parametrize("trains", [False, True])
def test_the_result_has_eagers_strides(trains: bool) -> None:
    found = rewriting(padded, PASSES)
    args = [each.requires_grad_(trains) for each in qkv()] + [padding()]
    assert found.call(*args).stride() == padded(*args).stride()
    assert "blocks" in found.providers[-1]


def test_a_reader_that_needs_eagers_strides() -> None:
    def viewed(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, keep: torch.Tensor) -> torch.Tensor:
        return padded(q, k, v, keep).view(B * H, S, D).sin()

    found = rewriting(viewed, PASSES)
    args = [*qkv(), padding()]
    torch.testing.assert_close(found.call(*args), viewed(*args))
    assert "blocks" in found.providers[-1]


def biased(fill: float) -> Site:
    def attend(
        q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, bias: torch.Tensor, keep: torch.Tensor
    ) -> torch.Tensor:
        i, j = places(q)
        dead = ~(keep[:, None, None] & (j <= i))
        return softmax((q @ k.mT * 0.3 + bias).masked_fill(dead, fill), -1) @ v

    return attend


@pytest.mark.parametrize("fill", [-math.inf, torch.finfo(torch.float32).min])
def test_a_fill_over_a_bias_stops_the_gradient_of_rows_without_a_key(fill: float) -> None:
    """Left padding: the result is NaN after -inf; where no loss reads it, only V gets a NaN."""
    keep = torch.ones(B, S, dtype=torch.bool)
    keep[0, :15] = False
    args = [*qkv(), torch.randn(B, H, S, S), keep]
    found = rewriting(biased(fill), PASSES)
    live = slice(20, None)
    with reference_mode():
        exact = gradients(biased(fill), doubled(args), live)
    wanted, got = gradients(biased(fill), args, live), gradients(found.call, args, live)
    for place in (0, 1, 3):
        assert bool(wanted[place].isfinite().all())
        assert_closer(exact[place], got[place], wanted[place])
    assert torch.equal(got[2].isnan(), wanted[2].isnan())
    assert found.applied("rewrite-attention") >= 1


@pytest.mark.parametrize("fill", [torch.finfo(torch.float64).min, -1e9])
def test_float64(fill: float) -> None:
    def attend(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, keep: torch.Tensor) -> torch.Tensor:
        return softmax((q @ k.mT).masked_fill(~keep[:, None, None], fill), -1) @ v

    found = rewriting(attend, PASSES)
    args = [*qkv(torch.float64), padding()]
    assert_closer(in_extended_precision(*args), found.call(*args), attend(*args))


def in_extended_precision(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, keep: torch.Tensor
) -> torch.Tensor:
    """The attention over the keys that are kept, in numbers wider than float64 where the machine has them."""
    wide_q, wide_k, wide_v = (each.numpy().astype(numpy.longdouble) for each in (q, k, v))
    scores = numpy.einsum("bhqd,bhkd->bhqk", wide_q, wide_k)
    shares = numpy.exp(scores - scores.max(-1, keepdims=True)) * keep.numpy()[:, None, None]
    result = numpy.einsum("bhqk,bhkd->bhqd", shares / shares.sum(-1, keepdims=True), wide_v)
    return torch.from_numpy(result.astype(numpy.float64))


def test_what_has_no_text_is_captured() -> None:
    """A Gaussian of the distance: a square and a quotient."""

    def attend(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, sigma: torch.Tensor) -> torch.Tensor:
        i, j = places(q)
        return sdpa(q, k, v, attn_mask=(-((j - i) ** 2) / (2 * sigma[:, None, None] ** 2))[None])

    found = rewriting(attend, PASSES)
    args = [*qkv(), SLOPES * 30]
    torch.testing.assert_close(found.call(*args), attend(*args))
    assert found.graphs == 1


def test_a_literal_made_in_the_forward() -> None:
    def attend(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        i, j = places(q)
        slopes = torch.tensor([0.5, 0.25, 0.125, 0.0625])
        added = ((j - i) * slopes[:, None, None]).masked_fill(j > i, -math.inf)
        return sdpa(q, k, v, attn_mask=added)

    found = rewriting(attend, PASSES)
    torch.testing.assert_close(found.call(*qkv()), attend(*qkv()))
    assert found.applied(NAME) == 1, found.reasons(NAME)
    assert "c0 is a literal (" in found.reasons(NAME), "no name that the user never wrote"


def test_repetitions_counted_by_a_symbol() -> None:
    def attend(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        times = q.size(1) // k.size(1)
        k, v = k.repeat_interleave(times, 1), v.repeat_interleave(times, 1)
        return softmax(q @ k.mT, -1) @ v

    found = rewriting(attend, PASSES, dynamic=True)
    q, k, v = qkv()
    torch.testing.assert_close(found.call(q, k[:, :2], v[:, :2]), attend(q, k[:, :2], v[:, :2]))
    assert "ERROR" not in str(found.statuses())


@pytest.mark.parametrize(("needs", "formula"), [(False, "not c0[b, k]"), (True, "not c0[(h)//2, k]")])
def test_key_padding_of_multihead_attention(needs: bool, formula: str) -> None:
    """It goes through a tensor of 0 and -inf, in which sequences and heads are merged and split again."""
    module = torch.nn.MultiheadAttention(16, 2, batch_first=True).eval()

    def attend(x: torch.Tensor, drop: torch.Tensor) -> Any:
        return module(x, x, x, key_padding_mask=drop, need_weights=needs)[0]

    x, drop = torch.randn(B, 20, 16), torch.zeros(B, 20, dtype=torch.bool)
    drop[0, 14:] = True
    how = {"host": "eager", "strict": True, "verify": "masks"}
    with torch.no_grad(), collect() as found:
        try:
            got = torch.compile(attend, backend="fxopt", options=how)(x, drop)
        except InternalError as error:  # pragma: no cover
            pytest.fail(str(error))
        torch.testing.assert_close(got, attend(x, drop))
    reasons = str([entry.reason for record in found for entry in record.evidence])
    assert f'mask="{formula}"; c0 is l_drop_; compared entry by entry' in reasons


def test_verified_when_a_float_mask_excludes_by_itself() -> None:
    """A mask that is captured whole, as a bias, holds -inf."""

    def attend(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, slopes: torch.Tensor) -> torch.Tensor:
        i, j = places(q)
        added = -(j - i).abs().sqrt() * slopes[:, None, None]
        return sdpa(q, k, v, attn_mask=added.masked_fill((i * j) % 3 == 1, -math.inf))

    how = {"host": "eager", "strict": True, "verify": "masks"}
    args = [*qkv(), SLOPES]
    with torch.no_grad(), collect() as found:
        got = torch.compile(attend, backend="fxopt", options=how)(*args)
    torch.testing.assert_close(got, attend(*args))
    assert "compared entry by entry" in str([entry for record in found for entry in record.evidence])


@pytest.mark.parametrize("shared", [False, True])
@pytest.mark.parametrize("lead", [(), (3,), (2, 3), (2, 2, 3), (2, 1, 2, 2)])
def test_scaled_dot_product_attention_of_any_rank(lead: tuple[int, ...], shared: bool) -> None:
    def attend(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, keep: torch.Tensor) -> torch.Tensor:
        i, j = torch.arange(S)[:, None], torch.arange(S)
        return sdpa(q, k, v, attn_mask=(j <= i) & keep[..., None, :])

    torch.manual_seed(0)
    own = [1 if shared else size for size in lead]
    args = [*(torch.randn(*lead, S, D) for _ in range(3)), torch.ones(*own, S, dtype=torch.bool)]
    args[3][..., -9:] = False
    found = rewriting(attend, PASSES)
    torch.testing.assert_close(found.call(*args), attend(*args))
    assert found.applied(NAME) == 1, found.reasons()


def test_not_scaled_dot_product_attention_of_rank_5_over_several_batches() -> None:
    q, k = torch.randn(2, 2, 3, 9, 8), torch.randn(1, 2, 3, 9, 8)
    found = rewriting(lambda q, k: sdpa(q, k, k), PASSES)
    torch.testing.assert_close(found.call(q, k), sdpa(q, k, k))
    assert "wanted Q, K and V of rank 5 in the same known batches" in found.reasons("rewrite-attention")


def test_gradients_of_keys_that_heads_share() -> None:
    """Multi-query attention: the sum over heads is as exact as eager's."""

    def attend(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, keep: torch.Tensor) -> torch.Tensor:
        i, j = places(q)
        scores = torch.einsum("bhid,bjd->bhij", q, k) * 0.35
        scores = scores.masked_fill(~(keep[:, None, None] & (j <= i)), torch.finfo(q.dtype).min)
        return torch.einsum("bhij,bjd->bhid", softmax(scores, -1), v)

    torch.manual_seed(4)
    keep = torch.ones(B, 640, dtype=torch.bool)
    keep[0, 400:] = False
    args = [torch.randn(B, 3, 640, D), torch.randn(B, 640, D), torch.randn(B, 640, D), keep]
    found = rewriting(attend, PASSES)
    with reference_mode():
        exact = gradients(attend, doubled(args))
    assert_closer(exact[1:], gradients(found.call, args)[1:], gradients(attend, args)[1:])
    assert "blocks" in found.providers[-1]
