"""What is kept about a mask does not outlive the operations that made the mask."""

from __future__ import annotations

import torch
from torch.nn.functional import softmax

from fxopt.report.record import collect
from support.attention import B, H, S, inputs
from support.compiled import compile_fxopt


def two_layers(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    """The bias of the second layer is made of what the first one returns."""
    causal = torch.ones(S, S, dtype=torch.bool).tril()
    for _ in range(2):
        bias = torch.einsum("bhqd,hkd->bhqk", q, k[0]).roll(1, -1)
        w = (q @ k.mT + bias).masked_fill(~causal, torch.finfo(q.dtype).min)
        q = softmax(w, -1) @ v
    return q


def test_masks_made_of_an_attention_that_has_been_replaced() -> None:
    q, k, v, _ = inputs()
    with collect() as records:
        out = compile_fxopt(two_layers)(q, k, v)
    assert out.shape == (B, H, S, q.shape[-1])
    assert torch.allclose(out, two_layers(q, k, v), atol=1e-5)
    assert len(records[0].applied("rewrite-attention")) == 2
    assert [entry for entry in records[0].evidence if entry.status.name == "ERROR"] == []
