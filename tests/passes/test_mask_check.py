"""``verify="masks"``: formulas are compared with the tensors they came from, and a wrong one is not used."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import sympy
import torch
from torch._dynamo.exc import BackendCompilerFailed
from torch.nn.functional import embedding
from torch.nn.functional import scaled_dot_product_attention as sdpa

from fxopt.ir.contract import Status
from fxopt.ir.formula import K
from fxopt.passes import mask_program
from fxopt.report.record import collect

B, H, S, D = 2, 3, 24, 8
keep = torch.ones(B, S, dtype=torch.int64)
keep[0, :5] = 0
Mask = Callable[[torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]


def padded(q: torch.Tensor, k: torch.Tensor, table: torch.Tensor) -> torch.Tensor:
    return (k <= q) & (k > q - 7) & keep.bool()[:, None, None, :]


def biased(q: torch.Tensor, k: torch.Tensor, table: torch.Tensor) -> torch.Tensor:
    bucket = torch.log2((k - q).abs() + 1.0).to(torch.int64)
    bias = embedding(bucket, table).permute(2, 0, 1)[None]
    return bias + torch.where(padded(q, k, table), 0.0, torch.finfo(torch.float32).min)


def attend(mask: Mask) -> Callable[..., torch.Tensor]:
    def call(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, table: torch.Tensor) -> torch.Tensor:
        return sdpa(
            q, k, v, attn_mask=mask(torch.arange(q.shape[2])[:, None], torch.arange(k.shape[2]), table)
        )

    return call


def inputs() -> tuple[torch.Tensor, ...]:
    return *(torch.randn(B, H, S, D) for _ in range(3)), torch.randn(6, H)


@pytest.mark.parametrize("dynamic", [False, True])
@pytest.mark.parametrize("mask", [padded, biased], ids=lambda f: f.__name__)
def test_right_formulas_are_compared_and_used(mask: Mask, dynamic: bool) -> None:
    options = {"host": "eager", "strict": True, "verify": "masks"}
    call = torch.compile(attend(mask), backend="fxopt", options=options, dynamic=dynamic)
    args = inputs()
    with collect() as records:
        got = call(*args)
    torch.testing.assert_close(got, attend(mask)(*args))
    (entry,) = (e for record in records for e in record.applied("recover-mask"))
    assert "compared entry by entry" in entry.reason


@pytest.mark.parametrize("strict", [False, True])
def test_a_wrong_formula_is_found(strict: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    right = mask_program.tidied

    def shifted(*args: object) -> sympy.Basic:
        index = mask_program.INDEX[3]
        return right(*args).xreplace({index: index - 1, K: K - 1})  # type: ignore[arg-type]

    monkeypatch.setattr(mask_program, "tidied", shifted)
    options = {"host": "eager", "strict": strict, "verify": "masks"}
    call = torch.compile(attend(padded), backend="fxopt", options=options, dynamic=False)
    args = inputs()
    if strict:
        with pytest.raises(BackendCompilerFailed, match="but the formula says"):
            call(*args)
        return
    with collect() as records:
        torch.testing.assert_close(call(*args), attend(padded)(*args))
    (entry,) = (e for r in records for e in r.evidence if e.rewrite == "recover-mask")
    assert entry.status is Status.ERROR
    assert "the mask was recovered as" in entry.reason
