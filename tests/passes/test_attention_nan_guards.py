"""rewrite-attention: rows without a live key whose NaN is made 0 below the softmax."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nan_to_num
from torch.nn.functional import dropout, softmax

from support.attention import PASSES, Site, assert_recovered, assert_refused, inputs
from support.rewriting import rewriting

T = torch.Tensor


def weights(q: T, k: T, keep: T) -> T:
    return softmax((q @ k.mT * 0.5).masked_fill(~keep, -math.inf), -1)


def replaced(q: T, k: T, v: T, keep: T) -> T:
    return nan_to_num(weights(q, k, keep)) @ v


def replaced_in_place(q: T, k: T, v: T, keep: T) -> T:
    return dropout(weights(q, k, keep).nan_to_num_(nan=0.0, posinf=1.0), 0.3, False) @ v


def filled(q: T, k: T, v: T, keep: T) -> T:
    p = weights(q, k, keep)
    return p.masked_fill(p.isnan(), 0) @ v


def chosen(q: T, k: T, v: T, keep: T) -> T:
    p = softmax(torch.where(keep, q @ k.mT, -math.inf).float(), -1)
    return torch.where(torch.isnan(p), torch.zeros_like(p), p).to(q.dtype) @ v


def unequal_to_itself(q: T, k: T, v: T, keep: T) -> T:
    p = weights(q, k, keep)
    return torch.where(p != p, 0.0, p) @ v


GUARDS = [replaced, replaced_in_place, filled, chosen, unequal_to_itself]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("site", GUARDS, ids=lambda f: f.__name__)
def test_rows_give_nothing(site: Site, dtype: torch.dtype) -> None:
    args = inputs(dtype)
    # Written in place, the softmax of eager has no gradient at all.
    found = assert_recovered(site, args, gradients=site is not replaced_in_place)
    assert found.call(*args)[0, :, :3].eq(0).all()


def test_where_no_row_is_nan_nothing_is_replaced() -> None:
    def site(q: T, k: T, v: T, keep: T) -> T:
        low = torch.finfo(q.dtype).min
        return nan_to_num(softmax((q @ k.mT).masked_fill(~keep, low), -1)) @ v

    found = assert_recovered(site, inputs())
    assert "dead_rows=none" in found.after[0]


def added(q: T, k: T, v: T, keep: T) -> T:
    return nan_to_num(softmax(q @ k.mT + torch.zeros(1).masked_fill(~keep, -math.inf), -1)) @ v


def test_a_sum_without_gradients() -> None:
    with torch.no_grad():
        assert_recovered(added, inputs(), gradients=False)


def test_not_a_sum_whose_rows_get_gradients_of_nan() -> None:
    args = [t.requires_grad_() if t.is_floating_point() else t for t in inputs()]
    assert_refused(added, args, "saw sums with a mask")


def test_of_the_result_it_stays() -> None:
    """NaN of V would be replaced as well."""

    def site(q: T, k: T, v: T, keep: T) -> T:
        return nan_to_num(weights(q, k, keep) @ v)

    found = rewriting(site, PASSES)
    args = inputs()
    args[2][1, 0, 0] = math.nan
    torch.testing.assert_close(found.call(*args), site(*args))
    assert "dead_rows=nan" in found.after[0]
    assert "nan_to_num" in found.after[0]


def another_number(q: T, k: T, v: T, keep: T) -> T:
    return nan_to_num(weights(q, k, keep), nan=0.25) @ v


def of_the_scores(q: T, k: T, v: T, keep: T) -> T:
    return softmax(nan_to_num((q @ k.mT).masked_fill(~keep, -math.inf)), -1) @ v


def the_others(q: T, k: T, v: T, keep: T) -> T:
    p = weights(q, k, keep)
    return p.masked_fill(~p.isnan(), 0) @ v


def of_another_tensor(q: T, k: T, v: T, keep: T) -> T:
    return weights(q, k, keep).masked_fill(q.sum(-1, keepdim=True).isnan(), 0) @ v


def read_by_another(q: T, k: T, v: T, keep: T) -> T:
    p = weights(q, k, keep)
    dead = p.isnan()
    return p.masked_fill(dead, 0) @ v + dead.sum()


NEAR_MISSES: dict[Site, str] = {
    another_number: "aten.nan_to_num.default",
    of_the_scores: "aten.nan_to_num.default",
    the_others: "that only the product with V reads",
    of_another_tensor: "wanted probabilities set to 0 by",
    read_by_another: "that only the product with V reads",
}


@pytest.mark.parametrize("site", NEAR_MISSES, ids=lambda f: f.__name__)
def test_near_miss(site: Site) -> None:
    assert_refused(site, inputs(), NEAR_MISSES[site])
