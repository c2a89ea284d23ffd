"""Attention in tiles under activation checkpointing, autocast and Inductor."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch.nn.functional import dropout, softmax
from torch.nn.functional import scaled_dot_product_attention as sdpa
from torch.utils.checkpoint import checkpoint

from fxopt.report.record import GraphRecord, collect

B, H, S, D = 2, 2, 70, 8


pytestmark = pytest.mark.usefixtures("blocks_at_any_size")


def attend(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, p: float = 0.0) -> torch.Tensor:
    rows, columns = torch.arange(S)[:, None], torch.arange(S)
    scores = torch.tanh(q @ k.mT * 0.4 / 3) * 3
    scores = scores.masked_fill((columns > rows) | (columns <= rows - 20), torch.finfo(scores.dtype).min)
    return dropout(softmax(scores.float(), -1).to(scores.dtype), p) @ v


def inputs(dtype: torch.dtype = torch.float32) -> list[torch.Tensor]:
    torch.manual_seed(0)
    return [torch.randn(B, H, S, D, dtype=dtype, requires_grad=True) for _ in range(3)]


def used_blocks(records: list[GraphRecord]) -> bool:
    return any(provider == "blocks" for record in records for _, provider, _ in record.providers)


@pytest.mark.parametrize("host", ["eager", "inductor"])
def test_checkpointing_draws_the_same_dropout_again(host: str) -> None:
    """With V = identity the result shows what was dropped; the gradient of V must be of the same weights."""

    def step(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        return checkpoint(attend, q, k, v, 0.3, use_reentrant=False)  # type: ignore[no-any-return]

    q, k, _ = inputs()
    v = torch.eye(S).expand(B, H, S, S).clone().requires_grad_()
    call = torch.compile(step, backend="fxopt", options={"host": host, "strict": True})
    with collect() as records:
        weights = call(q, k, v)
    assert used_blocks(records)
    grad = torch.randn_like(weights)
    (of_v,) = torch.autograd.grad(weights, v, grad)
    torch.testing.assert_close(of_v, weights.detach().mT @ grad)
    assert (weights == 0).double().mean() > 0.5


def test_autocast() -> None:
    call = torch.compile(attend, backend="fxopt", options={"host": "eager", "strict": True})

    def gradients(fn: object, args: list[torch.Tensor], enabled: bool) -> list[torch.Tensor]:
        with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
            out = fn(*args)  # type: ignore[operator]
        return [out, *torch.autograd.grad(out.double().square().sum(), args)]

    with collect() as records:
        got = gradients(call, inputs(), enabled=True)
    assert used_blocks(records)
    exact = gradients(exactly, [each.detach().double().requires_grad_() for each in inputs()], enabled=False)
    for found, eager, right in zip(got, gradients(attend, inputs(), enabled=True), exact, strict=True):
        assert found.dtype == eager.dtype
        assert (found - right).abs().max() <= 2 * (eager - right).abs().max()


def exactly(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    rows, columns = torch.arange(S)[:, None], torch.arange(S)
    scores = torch.tanh(q @ k.mT * 0.4 / 3) * 3
    scores = scores.masked_fill((columns > rows) | (columns <= rows - 20), torch.finfo(scores.dtype).min)
    return softmax(scores, -1) @ v


@pytest.mark.parametrize("host", ["eager", "inductor"])
def test_documents_may_be_written_before_the_backward(host: str) -> None:
    """A mask made of them is not changed by that, neither is what becomes of its formula."""

    def packed(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
        return sdpa(q, k, v, attn_mask=(ids[:, :, None] == ids[:, None])[:, None])

    def gradients(call: Callable[..., torch.Tensor]) -> list[torch.Tensor]:
        leaves, ids = inputs(), torch.arange(S).expand(B, S) // 30
        ids = ids.clone()
        out = call(*leaves, ids)
        ids.add_(torch.arange(S))
        return list(torch.autograd.grad(out.square().sum(), leaves))

    compiled = torch.compile(packed, backend="fxopt", options={"host": host})
    with collect() as found:
        for got, wanted in zip(gradients(compiled), gradients(packed), strict=True):
            torch.testing.assert_close(got, wanted)
    assert used_blocks(found)
