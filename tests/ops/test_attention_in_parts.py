"""``fxopt::attention`` of queries and keys in two parts is that of the parts side by side."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from fxopt.ir.ops import register_ops
from fxopt.ir.ops.attention import attention
from fxopt.ir.ops.decode_attention import in_decode
from fxopt.ir.ops.decomposed_attention import decomposed
from fxopt.ir.ops.masking import MEAN, NAN, ZERO
from support.numerics import assert_closer
from support.rounding import perturbed

PROVIDERS: dict[str, Callable[..., torch.Tensor]] = {
    "body": attention, "decomposed": decomposed, "decode": in_decode,
}  # fmt: skip
B, H, ROWS, KEYS, D, E = 2, 6, 3, 21, 8, 4


def operands(heads: int, rests: int, dtype: torch.dtype) -> list[torch.Tensor]:
    """Q, K and V, the rests of Q and K, and a mask that leaves a row without a key."""
    shapes = ((H, ROWS, D), (heads, KEYS, D), (heads, KEYS, 5), (H, ROWS, E), (rests, KEYS, E))
    live = torch.rand(B, 1, ROWS, KEYS) > 0.4
    live[..., 15:], live[0, :, 1] = False, False
    return [*(torch.randn(B, *shape).to(dtype) for shape in shapes), live]


def joined(q: Any, k: Any, v: Any, more_q: Any, more_k: Any, live: Any, **how: Any) -> torch.Tensor:
    """The parts side by side, keys and values repeated for the query heads."""
    k, more_k, v = (each.repeat_interleave(H // each.shape[1], 1) for each in (k, more_k, v))
    return decomposed(torch.cat([q, more_q], -1), torch.cat([k, more_k], -1), v, live, **how)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("heads", "rests"), [(1, 1), (1, 3), (1, 6), (2, 2), (6, 6)])
@pytest.mark.parametrize("name", PROVIDERS)
def test_parts_are_joined(name: str, heads: int, rests: int, dtype: torch.dtype) -> None:
    register_ops()
    given = operands(heads, rests, dtype)
    q, k, v, more_q, more_k, live = given
    low = torch.where(live, 0.0, torch.finfo(dtype).min).to(dtype)
    for dead_rows, mask in ((ZERO, live), (NAN, live), (MEAN, low)):
        how: dict[str, Any] = {"dead_rows": dead_rows, "scale": None}
        parts = {"query_rest": more_q, "key_rest": more_k, "enable_gqa": True}
        got = PROVIDERS[name](q, k, v, mask, **how, **parts)
        exact = joined(*(each.double() for each in given[:-1]), mask, **how)
        others = perturbed(lambda how=how, mask=mask: joined(*given[:-1], mask, **how))
        assert_closer(exact, got, joined(*given[:-1], mask, **how), roundings=others, strides=False)


def test_a_score_formula_sees_the_sum() -> None:
    q, k, v, more_q, more_k, live = operands(1, 1, torch.float32)
    how: dict[str, Any] = {"score": "5*tanh(s/5)", "scale": 0.7, "dead_rows": ZERO}
    parts = {"query_rest": more_q, "key_rest": more_k, "enable_gqa": True}
    wanted = joined(q, k, v, more_q, more_k, live, **how)
    exact = joined(*(each.double() for each in (q, k, v, more_q, more_k)), live, **how)
    for call in PROVIDERS.values():
        assert_closer(exact, call(q, k, v, live, **how, **parts), wanted, strides=False)
