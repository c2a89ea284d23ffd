"""rewrite-attention: dtypes that the model chose for its scores are kept, or the site is left alone."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch.nn.functional import softmax

from support.numerics import assert_closer
from support.reference import reference_mode
from support.rewriting import rewriting

NAME = "rewrite-attention"
PASSES = ("eliminate-noops", NAME)
B, H, S, D = 2, 3, 16, 32
Site = Callable[..., torch.Tensor]


def upcast(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    """GPT-Neo: Q and K are widened, their product is float32."""
    scores = q.float() @ k.float().transpose(-2, -1) * D**-0.5
    return softmax(scores, -1).to(v.dtype) @ v


def upcast_exactly(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    return softmax(q @ k.transpose(-2, -1) * D**-0.5, -1) @ v


def gradients(call: Site, *args: torch.Tensor) -> list[torch.Tensor]:
    leaves = [t.detach().clone().requires_grad_() for t in args]
    out = call(*leaves)
    (out * torch.linspace(-1, 1, out.numel(), dtype=out.dtype).view(out.shape)).sum().backward()
    return [out.detach(), *(leaf.grad for leaf in leaves if leaf.grad is not None)]


@pytest.mark.parametrize("rows", [S, 96])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_fires_on_widened_scores_and_keeps_them_wide(dtype: torch.dtype, rows: int) -> None:
    found = rewriting(upcast, PASSES)
    q, k, v = ((torch.randn(B, H, rows, D) * factor).to(dtype) for factor in (3.0, 3.0, 1.0))
    with reference_mode():
        exact = gradients(upcast_exactly, q.double(), k.double(), v.double())
    assert_closer(exact, gradients(found.call, q, k, v), gradients(upcast, q, k, v), strides=False)
    assert found.applied(NAME) == 1, found.reasons(NAME)
    assert "wide_scores=True" in found.after[0]


@pytest.mark.parametrize("masked", [False, True])
def test_fires_on_scores_that_only_a_scaled_query_keeps_in_float16(masked: bool) -> None:
    """OPT scales Q first. The product of the unscaled ones would overflow."""

    def site(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        scores = (q * D**-0.5) @ k.transpose(-2, -1)
        if masked:
            low = torch.finfo(q.dtype).min
            live = torch.ones(S, S, dtype=torch.bool).tril()
            scores = scores + torch.where(live, torch.zeros((), dtype=q.dtype), low)
        return softmax(scores, -1) @ v

    found = rewriting(site, PASSES)
    q, k, v = ((torch.randn(B, H, S, D) * factor).half() for factor in (90.0, 90.0, 1.0))
    assert (q @ k.mT).isinf().any()
    assert not site(q, k, v).isnan().any()
    with reference_mode():
        exact = site(q.double(), k.double(), v.double())
    assert_closer(exact, found.call(q, k, v), site(q, k, v), strides=False)
    assert found.applied(NAME) == 1


def narrow_value(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    v = v.bfloat16()
    return softmax(q @ k.mT, -1).to(v.dtype) @ v


def bool_probabilities(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    return softmax(q @ k.mT, -1).bool().float() @ v


def integer_probabilities(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    return softmax(q @ k.mT * 9, -1).to(torch.int32).float() @ v


def integer_scores(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    return softmax((q @ k.mT).int() + torch.zeros(S, S), -1) @ v


def rounded_probabilities(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    return softmax(q @ k.mT, -1).to(torch.float8_e4m3fn).float() @ v


NEAR_MISSES = [narrow_value, bool_probabilities, integer_probabilities, integer_scores, rounded_probabilities]


@pytest.mark.parametrize("site", NEAR_MISSES, ids=lambda f: f.__name__)
def test_not_where_a_cast_is_part_of_the_answer(site: Site) -> None:
    found = rewriting(site, PASSES)
    args = [torch.randn(B, H, S, D) for _ in range(3)]
    assert torch.equal(found.call(*args), site(*args))
    assert found.applied(NAME) == 0
