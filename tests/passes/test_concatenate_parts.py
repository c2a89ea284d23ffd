"""concatenate-parts: a new tensor that is written part by part is a concatenation; others stay."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from support.golden import assert_golden
from support.rewriting import rewriting

NAME = "concatenate-parts"
PASSES = ("functionalize-writes", NAME)
Site = Callable[..., Any]


def keys(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """As multi-head latent attention has it: the second part is one for all heads."""
    made = a.new_empty(*a.shape[:-1], 7)
    made[..., :4].copy_(a)
    made[..., 4:].copy_(b.expand(-1, a.shape[1], -1, -1))
    return made * 2


def assigned(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """By assignment, last part first, repeated by the copy itself."""
    made = torch.empty(2, 3, 5, 7)
    made[..., -3:] = b
    made[..., :-3] = a
    return made.sum(1)


def rows(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """Along another dimension, in three parts, of another dtype."""
    made = torch.empty_like(a, dtype=torch.float64)
    made[:, :, :2] = a[:, :, 3:]
    made[:, :, 2:3] = b[:, :, :1, :1]
    made[:, :, 3:] = a[:, :, :2]
    return made.transpose(1, 2)


def written_later(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    made = a.new_empty(2, 3, 5, 7)
    made[..., :4] = a
    made[..., 4:] = b
    first = made[..., 0].sum()
    made[..., 0] = 1.0
    return made + first


SPELLINGS: dict[str, Site] = {each.__name__: each for each in (keys, assigned, rows, written_later)}


def inputs() -> list[torch.Tensor]:
    return [torch.randn(2, 3, 5, 4), torch.randn(2, 1, 5, 3)]


@pytest.mark.parametrize("dynamic", [False, True])
@pytest.mark.parametrize("name", SPELLINGS)
def test_fires(name: str, dynamic: bool) -> None:
    site = SPELLINGS[name]
    found = rewriting(site, PASSES, dynamic=dynamic and name == "keys")
    args = inputs()
    out, wanted = found.call(*args), site(*args)
    assert found.applied(NAME) == 1, found.reasons(NAME)
    assert "aten.cat" in found.after[0] and "empty" not in found.after[0]
    assert torch.equal(out, wanted) and out.stride() == wanted.stride()


def test_fires_with_the_same_gradients() -> None:
    found = rewriting(keys, PASSES)

    def gradients(site: Site) -> list[torch.Tensor]:
        torch.manual_seed(0)
        leaves = [each.requires_grad_() for each in inputs()]
        site(*leaves).pow(2).sum().backward()
        return [leaf.grad for leaf in leaves if leaf.grad is not None]

    for mine, theirs in zip(gradients(found.call), gradients(keys), strict=True):
        assert torch.equal(mine, theirs)
    assert found.applied(NAME) == 1, found.reasons(NAME)


def test_fires_golden() -> None:
    found = rewriting(keys, PASSES)
    found.call(*inputs())
    assert_golden(found.before[0], "concatenate_parts", "keys_before")
    assert_golden(found.after[0], "concatenate_parts", "keys_after")


def overlapping(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    made = torch.empty(2, 3, 5, 7)
    made[..., 3:] = a
    made[..., 1:4] = b
    made[..., :1] = 0.5 * b[..., :1]
    return made


def gap(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    made = torch.empty(2, 3, 5, 8)
    made[..., :4] = a
    made[..., 5:] = b
    return made[..., :4].sum() + made[..., 5:].sum()


def blocks(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """The parts are along different dimensions."""
    made = torch.empty(2, 3, 5, 4)
    made[:, :, :3] = a[:, :, 2:]
    made[..., 1:] = b
    return made[:, :, :3]


def read_before(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    made = torch.empty(2, 3, 5, 7)
    made[..., :4] = a
    early = made[..., :2].clone()
    made[..., 4:] = b
    return made + early.sum()


def viewed_before(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    made = torch.empty(2, 3, 5, 7)
    other = made.transpose(1, 2)
    made[..., :4] = a
    made[..., 4:] = b
    return other + 1


def every_other(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    made = torch.empty(2, 3, 5, 8)
    made[..., ::2] = a
    made[..., 1::2] = a + 1
    return made


NEAR_MISSES: dict[str, tuple[Site, str]] = {
    "overlapping": (overlapping, "fill the tensor"),
    "gap": (gap, "fill the tensor"),
    "blocks": (blocks, "fill the tensor"),
    "read_before": (read_before, "read when it is whole"),
    "viewed_before": (viewed_before, "read when it is whole"),
    "every_other": (every_other, ""),
}


@pytest.mark.parametrize("name", NEAR_MISSES)
def test_near_miss(name: str) -> None:
    site, reason = NEAR_MISSES[name]
    found = rewriting(site, PASSES)
    args = inputs()
    assert torch.equal(found.call(*args), site(*args))
    assert found.applied(NAME) == 0
    assert reason in found.reasons(NAME), found.reasons(NAME)


def test_not_across_a_write_to_a_part() -> None:
    def site(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
        a = a.clone()
        made = torch.empty(2, 3, 5, 7)
        made[..., :4] = a
        a.zero_()
        made[..., 4:] = b
        return made + a.sum()

    found = rewriting(site, (NAME,))
    args = inputs()
    assert torch.equal(found.call(*args), site(*args))
    assert found.applied(NAME) == 0
    assert "written by" in found.reasons(NAME)
