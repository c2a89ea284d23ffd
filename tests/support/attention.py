"""Small attention sites: their inputs, and the judgement of what rewrite-attention makes of them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch

from support.numerics import assert_closer
from support.reference import reference_mode
from support.rewriting import Rewritten, rewriting
from support.rounding import perturbed

NAME = "rewrite-attention"
PASSES = ("functionalize-writes", "eliminate-noops", NAME)
Site = Callable[..., Any]

B, H, S, D = 2, 3, 9, 4  # batch, heads, length, depth of a head


def inputs(dtype: torch.dtype = torch.float32) -> list[torch.Tensor]:
    """Q, K, V of shape (B, H, S, D), and which keys are kept, a bool of shape (B, 1, S, S).

    Left padding: the first three rows of the first sequence have no live key.
    """
    q, k, v = (torch.randn(B, S, H, D).to(dtype).transpose(1, 2) for _ in range(3))
    keep = torch.ones(S, S, dtype=torch.bool).tril().expand(B, 1, S, S).clone()
    keep[0, :, :, :3] = False
    return [q, k, v, keep]


def assert_recovered(
    site: Site, args: Sequence[torch.Tensor], *, dynamic: bool = False, gradients: bool = True
) -> Rewritten:
    """`site` becomes one op, whose answer and gradients are as close to exact as eager's."""
    found = rewriting(site, PASSES, dynamic=dynamic)
    got = answers(found.call, args, gradients=gradients)
    assert found.applied(NAME) == 1, found.reasons(NAME)
    assert found.after[0].count("fxopt.attention") == 1, found.after[0]
    with reference_mode():
        wide = [t.double() if t.is_floating_point() else t for t in args]
        exact = answers(site, wide, gradients=gradients)
    eager = answers(site, args, gradients=gradients)
    others = perturbed(lambda: answers(site, args, gradients=gradients))
    assert_closer(exact, got, eager, roundings=others, strides=False)
    return found


def answers(call: Site, args: Sequence[torch.Tensor], *, gradients: bool = True) -> list[torch.Tensor]:
    """The result and the gradients of all inputs that can have one."""
    if not gradients:
        return [call(*args)]
    leaves = [t.detach().clone().requires_grad_() if t.is_floating_point() else t for t in args]
    out = call(*leaves)
    (out * torch.linspace(-1, 1, out.numel(), dtype=out.dtype).view(out.shape)).sum().backward()
    return [out.detach(), *(leaf.grad for leaf in leaves if leaf.grad is not None)]


def assert_refused(site: Site, args: Sequence[torch.Tensor], reason: str) -> None:
    """`site` stays as it is, for a reason that says `reason`."""
    found = rewriting(site, PASSES)
    out, wanted = found.call(*args), site(*args)
    assert found.applied(NAME) == 0
    assert reason in found.reasons(NAME), found.reasons(NAME)
    assert torch.equal(out.nan_to_num(7.0), wanted.nan_to_num(7.0))
