"""Masks of attention that are written part by part become formulas; what stays is written in place."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch.nn.functional import scaled_dot_product_attention as sdpa

from support.golden import assert_golden
from support.numerics import assert_closer
from support.rewriting import rewriting

WRITES, MASK = "functionalize-writes", "recover-mask"
PASSES = (WRITES, "eliminate-noops", "rewrite-attention", MASK)
Tensor = torch.Tensor
Mask = Callable[[Tensor, Tensor], Tensor]
S = 12


def operands(rows: int = S) -> tuple[Tensor, ...]:
    keep = torch.ones(2, rows, dtype=torch.bool)
    keep[0, rows - 2 :] = False
    return (*(torch.randn(2, 3, rows, 8) for _ in range(3)), keep)


def attending(mask: Mask) -> Callable[..., Tensor]:
    """An attention that is masked by what `mask` makes of queries and padding."""

    def attention(q: Tensor, k: Tensor, v: Tensor, keep: Tensor) -> Tensor:
        return sdpa(q, k, v, attn_mask=mask(q, keep))

    return attention


def blank(q: Tensor) -> Tensor:
    return torch.zeros(q.shape[2], q.shape[2], dtype=torch.bool)


def global_tokens(q: Tensor, keep: Tensor) -> Tensor:
    mask = torch.ones_like(blank(q)).tril()
    mask[:, :4] = True
    mask[:2, :] = True
    return mask


def images(q: Tensor, keep: Tensor) -> Tensor:
    mask = torch.full([1, q.shape[2], q.shape[2]], torch.finfo(torch.float32).min, dtype=q.dtype)
    for first, last in ((0, 3), (3, 8), (8, 12)):
        mask[..., first:last, first:last] = 0
    return mask


def class_token(q: Tensor, keep: Tensor) -> Tensor:
    mask = keep[:, None, None, :].expand(-1, 1, q.shape[2], -1).clone()
    mask[:, :, :, 0] = True
    return mask


def from_the_end(q: Tensor, keep: Tensor) -> Tensor:
    mask = blank(q).logical_not_()
    mask[:-3, -2:] = False
    return mask


def strided(q: Tensor, keep: Tensor) -> Tensor:
    mask = torch.ones_like(blank(q)).tril()
    mask[:, 1::4] = True
    return mask


def through_a_row(q: Tensor, keep: Tensor) -> Tensor:
    """A view that is made before one write, and written and read after it."""
    mask = blank(q)
    wide = mask[None, None]
    part = mask[:5]
    part[:, :3] = True
    part |= torch.ones(5, q.shape[2], dtype=torch.bool).tril()
    mask[5:] = True
    return wide


def transposed(q: Tensor, keep: Tensor) -> Tensor:
    mask = blank(q)
    mask.t()[:4] = True
    mask[3:, :2] &= False
    return mask


def copied(q: Tensor, keep: Tensor) -> Tensor:
    mask = torch.zeros(2, 1, q.shape[2], q.shape[2], dtype=torch.bool)
    mask[:, :, :, :] = keep[:, None, None]
    mask[:, :, 3:] = torch.ones_like(blank(q)).tril()[3:]
    return mask


FORMULAS: dict[Mask, str] = {
    global_tokens: "k < 4 or k <= q or q < 2",
    images: "(k < 3 and q < 3) or (k < 8 and k >= 3 and q < 8 and q >= 3) or (k >= 8 and q >= 8)",
    class_token: "c0[b, k] or k == 0",
    from_the_end: "k < 10 or q >= 9",
    strided: "4*(k - 1)//4 == k - 1",
    through_a_row: "q >= 5",
    transposed: "(k >= 2 or q < 3) and k < 4",
    copied: "c0[b, k]",
}


@pytest.mark.parametrize("mask", FORMULAS, ids=lambda mask: mask.__name__)
def test_becomes_a_formula(mask: Mask) -> None:
    attention, given = attending(mask), operands()
    found = rewriting(attention, PASSES)
    exact = attention(*(each.double() for each in given[:3]), given[3])
    assert_closer(exact, found.call(*given), attention(*given))
    assert FORMULAS[mask] in found.reasons(MASK), found.reasons()
    torch._dynamo.reset()
    checked = torch.compile(
        attention, backend="fxopt", options={"host": "eager", "strict": True, "verify": "masks"}
    )
    checked(*given)  # raises, where an entry of the mask is not what the formula says


@pytest.mark.parametrize(
    "mask", [global_tokens, class_token, from_the_end, strided], ids=lambda m: m.__name__
)
def test_with_sizes_that_change(mask: Mask) -> None:
    attention = attending(mask)
    found = rewriting(attention, PASSES, dynamic=True)
    for rows in (S, S + 5, S + 1):
        given = operands(rows)
        assert torch.equal(found.call(*given), attention(*given))
    assert found.graphs == 1
    assert found.applied(MASK) == 1
    assert "scatter" not in found.reasons(MASK), "a formula, not the tensor"


@pytest.mark.parametrize("mask", FORMULAS, ids=lambda mask: mask.__name__)
def test_what_is_read_is_written_in_place(mask: Mask) -> None:
    """Too few scores for a kernel that uses the formula: nothing is copied for the sake of one."""
    given = operands()
    found = rewriting(attending(mask), PASSES)
    found.call(*given)
    assert "scatter" not in found.lowered[0], found.lowered[0]


def test_scores_that_learn_keep_their_gradients() -> None:
    def attention(x: Tensor, bias: Tensor) -> Tensor:
        mask = bias.tril()
        mask[:, :2] = 0.5
        mask[4:6] *= 3
        return torch.softmax(x @ x.mT * 0.3 + mask, -1) @ x

    found = rewriting(attention, PASSES)
    results = []
    start = torch.randn(2, 6, 8), torch.randn(6, 6)
    for call, dtype in ((attention, torch.float64), (found.call, torch.float32), (attention, torch.float32)):
        x, bias = (value.to(dtype, copy=True).requires_grad_() for value in start)
        out = call(x, bias)
        out.square().sum().backward()
        results.append((out.detach(), x.grad, bias.grad))
    assert_closer(*results)
    assert found.applied(WRITES) == 3, found.reasons()


def test_golden() -> None:
    found = rewriting(attending(global_tokens), (WRITES,))
    found.call(*operands())
    text = "->\n".join((found.before[0], found.after[0], found.lowered[0]))
    assert_golden(text, "functionalize_writes", "mask_in_parts")


def test_written_again_after_it_was_read() -> None:
    """Two attentions, two masks."""

    def both(q: Tensor, k: Tensor, v: Tensor, keep: Tensor) -> Tensor:
        mask = blank(q).logical_not()
        mask[:, :3] = False
        first = sdpa(q, k, v, attn_mask=mask)
        mask[:4, :] = True
        return first + sdpa(q, k, v, attn_mask=mask)

    given = operands()
    found = rewriting(both, PASSES)
    assert torch.equal(found.call(*given), both(*given))
    assert 'mask="k >= 3"' in found.reasons(MASK)
    assert 'mask="k >= 3 or q < 4"' in found.reasons(MASK)


def of_an_input(q: Tensor, keep: Tensor) -> Tensor:
    keep[:, :2] = True
    return keep[:, None, None]


def of_many_parts(q: Tensor, keep: Tensor) -> Tensor:
    mask = blank(q)
    mask[:, 0] = True
    for row in range(S):
        mask[row, row:] = True
    return mask


def of_overlapping_parts(q: Tensor, keep: Tensor) -> Tensor:
    """Windows of a row share entries."""
    row = torch.zeros(2 * S, dtype=torch.bool)
    row.unfold(0, S, 1)[:S, 3].fill_(True)
    row[:3] = True
    return row.unfold(0, S, 1)[:S]


def of_a_split(q: Tensor, keep: Tensor) -> Tensor:
    upper, lower = (mask := blank(q)).chunk(2)
    upper[:, :3] = True
    lower[:] = True
    return mask


def of_padded_rows(q: Tensor, keep: Tensor) -> Tensor:
    mask = torch.empty_strided((S, S), (S + 1, 1), dtype=torch.bool)
    mask.fill_(False)
    mask[:, :3] = True
    return mask


NEAR_MISSES: dict[Mask, str] = {
    of_an_input: "an input of it",
    of_many_parts: "12 parts or less, saw 13",
    of_overlapping_parts: "wanted a slice of a mask",
    of_a_split: "zeros is written by fill_",
    of_padded_rows: "without gaps in memory",
}


@pytest.mark.parametrize("mask", NEAR_MISSES, ids=lambda mask: mask.__name__)
def test_near_miss(mask: Mask) -> None:
    attention = attending(mask)
    given, again = operands(), operands()
    again = (*given[:3], given[3].clone())
    found = rewriting(attention, PASSES)
    assert torch.equal(found.call(*given), attention(*again))
    assert torch.equal(given[3], again[3]), "what is written to an input is part of the answer"
    assert NEAR_MISSES[mask] in found.reasons(), found.reasons()


def test_ends_that_data_decide_on_stay() -> None:
    """All writes are before the first product: the attention is one op, its mask the tensor."""

    def attention(x: Tensor, ends: Tensor) -> Tensor:
        mask = torch.full([1, S, S], torch.finfo(torch.float32).min, dtype=x.dtype)
        first, last = ends[0].item(), ends[1].item()
        mask[..., first:last, first:last] = 0
        return torch.softmax(x @ x.mT * 0.3 + mask, -1) @ x

    x, ends = torch.randn(2, S, 8), torch.tensor([3, 7])
    with torch._dynamo.config.patch(capture_scalar_outputs=True):
        found = rewriting(attention, PASSES)
        assert_closer(attention(x.double(), ends), found.call(x, ends), attention(x, ends))
    assert "which data decide on" in found.reasons(WRITES)
    assert found.applied("rewrite-attention") == 1
    assert found.applied(MASK) == 0


def test_what_is_no_mask_stays() -> None:
    def f(x: Tensor) -> Tensor:
        y = torch.zeros_like(x)
        y[:, :2] = x[:, :2]
        y[0] *= 2
        return y @ x.mT

    x = torch.randn(4, 4)
    found = rewriting(f, (WRITES,))
    assert torch.equal(found.call(x), f(x))
    assert found.before == found.after
