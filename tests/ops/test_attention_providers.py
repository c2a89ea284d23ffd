"""Who computes an attention, and why: the evidence of the choice at real sizes."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch.nn.functional import dropout, softmax
from torch.nn.functional import scaled_dot_product_attention as sdpa

from support.rewriting import rewriting

PASSES = ("eliminate-noops", "rewrite-attention", "fold-causal-mask", "recover-mask")
HEADS, DEPTH = 4, 64
Mask = Callable[[torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]


@pytest.fixture(autouse=True)
def _on_two_threads(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch, "get_num_threads", lambda: 2)


def causal(q: torch.Tensor, k: torch.Tensor, keep: torch.Tensor) -> torch.Tensor:
    return (k <= q) & keep


def window(q: torch.Tensor, k: torch.Tensor, keep: torch.Tensor) -> torch.Tensor:
    return (k <= q) & (k > q - 100)


def padding(q: torch.Tensor, k: torch.Tensor, keep: torch.Tensor) -> torch.Tensor:
    return keep


def given(mask: Mask) -> Callable[..., torch.Tensor]:
    def attend(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, keep: torch.Tensor) -> torch.Tensor:
        rows, columns = torch.arange(q.shape[2])[:, None], torch.arange(k.shape[2])
        return sdpa(q, k, v, attn_mask=mask(rows, columns, keep[:, None, None, :]))

    return attend


def spelled(cap: float = 0.0, p: float = 0.0, slopes: bool = False) -> Callable[..., torch.Tensor]:
    def attend(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, keep: torch.Tensor) -> torch.Tensor:
        rows, columns = torch.arange(q.shape[2])[:, None], torch.arange(k.shape[2])
        scores = q @ k.mT * 0.1
        if cap:
            scores = torch.tanh(scores / cap) * cap
        if slopes:
            scores = scores + k[0, :, :1, :1] * columns
        scores = scores + torch.where(columns <= rows, 0.0, torch.finfo(q.dtype).min)
        return dropout(softmax(scores, -1), p) @ v

    return attend


CHOICES: dict[str, tuple[Callable[..., torch.Tensor], int, bool, str]] = {
    "short": (given(causal), 128, False, "'sdpa', 'blocks: blocks would take"),
    "causal_and_padding": (given(causal), 512, False, "'blocks'"),
    "causal_and_padding_in_training": (given(causal), 512, True, "'blocks'"),
    "window": (given(window), 512, False, "'blocks'"),
    "padding": (given(padding), 512, False, "'blocks'"),
    "padding_of_short_sequences": (given(padding), 256, False, "'sdpa', 'blocks: blocks would take"),
    "plain_causal": (spelled(), 512, False, "'sdpa', \"blocks: the CPU's kernel knows this mask"),
    "plain_causal_in_training": (spelled(), 800, True, "'blocks'"),
    "plain_causal_and_short_in_training": (spelled(), 512, True, "'decomposed', 'blocks: 262144 scores"),
    "capped": (spelled(cap=5.0), 800, True, "'blocks'"),
    "capped_and_short": (spelled(cap=5.0), 256, False, "'decomposed', 'blocks: 65536 scores per head"),
    "dropped": (spelled(p=0.1), 512, True, "'blocks'"),
    "a_learned_bias": (spelled(slopes=True), 800, True, "'decomposed', 'blocks: blocks would read"),
    "a_bias_without_gradient": (spelled(slopes=True), 800, False, "'blocks'"),
}


@pytest.mark.parametrize("name", CHOICES)
def test_choice(name: str) -> None:
    attend, length, training, provider = CHOICES[name]
    q, k, v = (torch.randn(1, HEADS, length, DEPTH, requires_grad=training) for _ in range(3))
    found = rewriting(attend, PASSES)
    found.call(q, k, v, torch.ones(1, length, dtype=torch.bool))
    assert provider in found.providers[0], found.providers[0]
