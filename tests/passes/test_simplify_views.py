"""simplify-views: a view by the shape of another tensor no longer reads that tensor."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from support.golden import assert_golden
from support.rewriting import rewriting

NAME = "simplify-views"
F = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]

FIRES: dict[str, F] = {
    "reshape_as": lambda x, y: x.mT.reshape_as(y) + 1,
    "view_as": lambda x, y: x.view_as(y).cos(),
    "expand_as": lambda x, y: x[:1, :, :1].expand_as(x).sin(),
}


@pytest.mark.parametrize("case", FIRES)
def test_fires(case: str) -> None:
    found = rewriting(FIRES[case], (NAME,))
    x, y = torch.randn(2, 3, 4, requires_grad=True), torch.randn(6, 4)
    out, wanted = found.call(x, y), FIRES[case](x, y)
    assert torch.equal(out, wanted)
    assert torch.equal(*(torch.autograd.grad(each.pow(2).sum(), x)[0] for each in (out, wanted)))
    assert found.applied() == 1, found.reasons()
    assert "_as" not in found.after[0]


def test_fires_golden() -> None:
    found = rewriting(FIRES["reshape_as"], (NAME,))
    found.call(torch.randn(2, 3, 4), torch.randn(6, 4))
    assert_golden(found.before[0], "simplify_views", "reshape_as_before")
    assert_golden(found.after[0], "simplify_views", "reshape_as_after")


def test_a_view_stays_one() -> None:
    def site(x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        x = x * 1.5
        x.view_as(y).zero_()
        return x

    found = rewriting(site, (NAME,))
    assert found.call(torch.randn(2, 3, 4), torch.randn(6, 4)).eq(0).all()
    assert found.applied() == 1


def test_not_with_symbolic_sizes() -> None:
    found = rewriting(FIRES["view_as"], (NAME,), dynamic=True)
    for rows in (3, 5, 8):
        x, y = torch.randn(2, rows, 4), torch.randn(2 * rows, 4)
        assert torch.equal(found.call(x, y), FIRES["view_as"](x, y))
    assert found.applied() == 0
    assert "sizes that are known" in found.reasons()


def test_not_a_view_by_sizes() -> None:
    found = rewriting(lambda x: x.reshape(6, 4) * 2, (NAME,))
    found.call(torch.randn(2, 3, 4))
    assert found.evidence == []


def test_not_a_conversion_by_another_tensor() -> None:
    found = rewriting(lambda x, y: x.type_as(y) * 2, (NAME,))
    found.call(torch.randn(2, 3, 4), torch.randn(6, 4).double())
    assert found.evidence == []
