"""Masks that are causal, that show everything, and that only look so; and how a site is checked."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch.nn.functional import scaled_dot_product_attention as sdpa

from support.numerics import assert_closer, to_double
from support.reference import reference_mode
from support.rewriting import Rewritten

NAME = "fold-causal-mask"
PASSES = ("eliminate-noops", "rewrite-attention", NAME)
B, H, S, D = 2, 3, 9, 4

Mask = Callable[[torch.Tensor], torch.Tensor]


def lowest() -> float:
    return torch.finfo(torch.float32).min


def q_and_k(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    place = torch.arange(x.shape[2])
    return place[:, None], place[None, :]


def packed(x: torch.Tensor) -> torch.Tensor:
    """As transformers builds it when it is given neither a mask nor positions."""
    batch, length = x.shape[0], x.shape[2]
    position = (torch.arange(length) + 0).unsqueeze(0).expand(batch, -1)
    document = (torch.diff(position, prepend=position[:, :1] - 1, dim=-1) != 1).cumsum(-1)
    b = torch.arange(batch)[:, None, None, None]
    q, k = torch.arange(length)[None, None, :, None], torch.arange(length)[None, None, None, :]
    same = q.new_ones((), dtype=torch.bool) & (document[b, q] == document[b, k])
    return (same & (position[b, k] <= position[b, q])).expand(batch, -1, length, length)


def documents(x: torch.Tensor) -> torch.Tensor:
    q, k = q_and_k(x)
    return (k <= q) & (q // 4 == k // 4)


CAUSAL: dict[str, Mask] = {
    "packed": packed,
    "le": lambda x: torch.le(*reversed(q_and_k(x))),
    "not_gt": lambda x: ~torch.gt(*reversed(q_and_k(x))),
    "ge_rank_4": lambda x: torch.ge(*q_and_k(x))[None, None].expand(x.shape[0], x.shape[1], -1, -1),
    "half_the_lowest": lambda x: torch.where(q_and_k(x)[1] <= q_and_k(x)[0], 0.0, lowest()) * 0.5,
    "tril": lambda x: torch.ones(x.shape[2], x.shape[2], dtype=torch.bool).tril(),
    "triu_inverted": lambda x: torch.ones(x.shape[2], x.shape[2]).triu(1) == 0,
    "below_next": lambda x: q_and_k(x)[1] < q_and_k(x)[0] + 1,
    "difference": lambda x: q_and_k(x)[0] - q_and_k(x)[1] >= 0,
    "equal_or_less": lambda x: (q_and_k(x)[1] == q_and_k(x)[0]) | (q_and_k(x)[1] < q_and_k(x)[0]),
    "window_of_all": lambda x: (
        (q_and_k(x)[1] <= q_and_k(x)[0]) & (q_and_k(x)[1] > q_and_k(x)[0] - x.shape[2])
    ),
    "flipped": lambda x: q_and_k(x)[0].flip(0) <= q_and_k(x)[1].flip(1),
    "cat": lambda x: (
        torch.cat([torch.arange(x.shape[2] + 1)[:1], torch.arange(1, x.shape[2])])[None] <= q_and_k(x)[0]
    ),
    "where_literals": lambda x: torch.where(
        q_and_k(x)[1] <= q_and_k(x)[0], torch.tensor(0.0), torch.tensor(lowest())
    ),
    "where_lowest": lambda x: torch.where(q_and_k(x)[1] <= q_and_k(x)[0], torch.zeros(()), lowest()),
    "filled_infinite": lambda x: torch.zeros(x.shape[2], x.shape[2]).masked_fill(
        q_and_k(x)[1] > q_and_k(x)[0], -math.inf
    ),
    "full_triu": lambda x: torch.full((x.shape[2], x.shape[2]), -math.inf).triu(1),
    "inverted_times_lowest": lambda x: (1.0 - (q_and_k(x)[1] <= q_and_k(x)[0]).float()) * lowest(),
}

ALL: dict[str, Mask] = {
    "not_negative": lambda x: (q_and_k(x)[0] >= 0) & q_and_k(x)[1].new_ones((), dtype=torch.bool),
    "ones": lambda x: torch.ones(x.shape[2], x.shape[2], dtype=torch.bool),
    "ones_like": lambda x: torch.ones_like(x[:1, :1, :, :1], dtype=torch.bool),
    "zeros": lambda x: torch.zeros(x.shape[0], 1, 1, x.shape[2]),
    "wide": lambda x: (q_and_k(x)[1] - q_and_k(x)[0]) < x.shape[2],
}

NEAR_MISSES: dict[str, tuple[Mask, str]] = {
    "one_ahead": (lambda x: q_and_k(x)[1] <= q_and_k(x)[0] + 1, 'saw mask="k <= q + 1'),
    "strictly_before": (
        lambda x: (q_and_k(x)[1] < q_and_k(x)[0]) | (q_and_k(x)[1] == 0),
        'saw mask="k < q or k == 0',
    ),
    "anticausal": (lambda x: q_and_k(x)[0] <= q_and_k(x)[1], 'saw mask="k >= q'),
    "window": (
        lambda x: (q_and_k(x)[1] <= q_and_k(x)[0]) & (q_and_k(x)[1] > q_and_k(x)[0] - 4),
        'saw mask="k <= q and k > q - 4',
    ),
    "prefix": (
        lambda x: (q_and_k(x)[1] <= q_and_k(x)[0]) | (q_and_k(x)[1] < 3),
        'saw mask="k < 3 or k <= q',
    ),
    "one_hole": (
        lambda x: (q_and_k(x)[1] <= q_and_k(x)[0]) & ~((q_and_k(x)[0] == 7) & (q_and_k(x)[1] == 2)),
        'saw mask="(k != 2 or q != 7) and k <= q',
    ),
    "first_batch_only": (
        lambda x: (q_and_k(x)[1] <= q_and_k(x)[0]) | (torch.arange(x.shape[0]) > 0)[:, None, None, None],
        'saw mask="b > 0 or k <= q',
    ),
    "one_head_only": (
        lambda x: (q_and_k(x)[1] <= q_and_k(x)[0]) | (torch.arange(x.shape[1]) == 1)[:, None, None],
        'saw mask="h == 1 or k <= q',
    ),
    "documents": (documents, "(k)//4 == (q)//4 and k <= q"),
    "bias": (
        lambda x: torch.where(q_and_k(x)[1] <= q_and_k(x)[0], 0.0, -1e4),
        'mask="True" score="s + c0[q, k]"',
    ),
    "lowest_of_half": (
        lambda x: torch.where(q_and_k(x)[1] <= q_and_k(x)[0], 0.0, torch.finfo(torch.float16).min),
        'score="s + c0[q, k]"',
    ),
    "raised": (
        lambda x: torch.where(q_and_k(x)[1] <= q_and_k(x)[0], 1.0, -math.inf),
        'mask="k <= q" score="s + 1"',
    ),
    "raised_by_literal": (
        lambda x: torch.where(q_and_k(x)[1] <= q_and_k(x)[0], torch.tensor(1.0), -math.inf),
        'mask="k <= q" score="s + 1"',
    ),
    "written_literal": (
        lambda x: torch.where(
            q_and_k(x)[1] <= q_and_k(x)[0], torch.tensor(0.0).add_(x[0, 0, 0, 0]), -math.inf
        ),
        "s + c0",
    ),
    "slopes": (lambda x: (q_and_k(x)[1] - q_and_k(x)[0]).float() * 0.5, 'score="s + 0.5*k - 0.5*q"'),
    "random": (lambda x: torch.rand(x.shape[2], x.shape[2]) > 0.5, 'saw mask="c0[q, k]"; c0 is gt'),
    "data": (
        lambda x: (q_and_k(x)[1] <= q_and_k(x)[0]) & (x[0, 0, :, 0] < 9),
        'saw mask="c0[k] and k <= q"; c0 is lt',
    ),
    "int_remainder": (lambda x: q_and_k(x)[1] % 5 <= q_and_k(x)[0], "remainder"),
}


def site(mask: Mask) -> Callable[..., torch.Tensor]:
    def attend(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        return sdpa(q, k, v, attn_mask=mask(q))

    return attend


def inputs(length: int = S, dtype: torch.dtype = torch.float32) -> list[torch.Tensor]:
    return [torch.randn(B, H, length, D, dtype=dtype) for _ in range(3)]


def check(found: Rewritten, plain: Callable[..., Any], args: list[torch.Tensor]) -> None:
    with reference_mode():
        reference = plain(*to_double(args))
    assert_closer(reference, found.call(*args), plain(*args))


def has_mask(found: Rewritten) -> bool:
    """Some value of the last graph is as large as the scores."""
    return f"{S}, {S}]" in found.after[-1]
