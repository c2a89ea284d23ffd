"""Triangles that a module holds are read as their rule, and looked after."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn.functional import softmax

from fxopt.frontend.known_buffers import NAME, triangle_of
from fxopt.report.record import GraphRecord, collect

N = 40


class Block(nn.Module):
    """Attention as nanoGPT has it without SDPA; `mask(buffer, length)` tells who is excluded."""

    def __init__(
        self, buffer: torch.Tensor, mask: Callable[[torch.Tensor, int], torch.Tensor] | None = None
    ) -> None:
        super().__init__()
        self.register_buffer("bias", buffer)
        self.out = nn.Linear(8, 8)
        self.mask = mask or (lambda held, length: held[..., :length, :length] == 0)

    def forward(self, q: torch.Tensor) -> torch.Tensor:
        scores = q @ q.transpose(-2, -1) * 0.3
        scores = scores.masked_fill(self.mask(self.bias, q.shape[2]), -math.inf)  # type: ignore[arg-type]
        result: torch.Tensor = self.out(softmax(scores, -1) @ q)
        return result


def tril(dtype: torch.dtype = torch.float32, diagonal: int = 0) -> torch.Tensor:
    return torch.ones(N, N).tril(diagonal).to(dtype).view(1, 1, N, N)


def compiled(model: nn.Module, dynamic: bool | None = None) -> Any:
    return torch.compile(
        model, backend="fxopt", options={"host": "eager", "strict": True}, dynamic=dynamic, fullgraph=True
    )


def query(length: int = 9) -> torch.Tensor:
    return torch.randn(2, 3, length, 8)


def known(found: list[GraphRecord]) -> int:
    return sum(entry.rewrite == NAME for record in found for entry in record.evidence)


def check(model: nn.Module, *, reads: bool, lengths: tuple[int, ...] = (9,), dynamic: bool = False) -> None:
    fast = compiled(model, dynamic)
    with collect() as found, torch.no_grad():
        for length in lengths:
            q = query(length)
            torch.testing.assert_close(fast(q), model(q))
    assert bool(known(found)) == reads


@pytest.mark.parametrize("dtype", [torch.float32, torch.bool, torch.uint8, torch.int64, torch.bfloat16])
def test_reads_a_triangle_of_any_dtype(dtype: torch.dtype) -> None:
    check(Block(tril(dtype)), reads=True)


@pytest.mark.parametrize(
    ("buffer", "mask"),
    [
        (torch.ones(N, N).triu(1).bool(), lambda held, n: held[:n, :n]),
        (torch.full((N, N), -math.inf).triu(1), lambda held, n: held[:n, :n] < 0),
        (torch.full((N, N), -1e9).triu(1)[None], lambda held, n: held[0, :n, :n] != 0),
        (torch.ones(N, N).tril(3).bool(), lambda held, n: ~held[:n, :n]),
    ],
)
def test_reads_other_triangles(buffer: torch.Tensor, mask: Any) -> None:
    check(Block(buffer, mask), reads=True)


def test_for_lengths_that_change() -> None:
    check(Block(tril()), reads=True, lengths=(9, 11, 30), dynamic=True)


def test_a_mask_by_a_triangle_is_causal() -> None:
    with collect() as found, torch.no_grad():
        compiled(Block(tril()))(query())
    applied = [entry.rewrite for record in found for entry in record.applied()]
    assert "fold-causal-mask" in applied


def test_gradients() -> None:
    model = Block(tril())
    wanted, got = query().requires_grad_(), None
    got = wanted.detach().clone().requires_grad_()
    model(wanted).square().sum().backward()
    compiled(model)(got).square().sum().backward()
    torch.testing.assert_close(got.grad, wanted.grad)


def test_a_buffer_that_is_written_later(caplog: pytest.LogCaptureFixture) -> None:
    """The calls in which it differs run as captured, and are told of once."""
    model, q = Block(tril()), query()
    fast = compiled(model)
    with torch.no_grad(), caplog.at_level(logging.WARNING, "fxopt"):
        fast(q)
        model.bias[..., 1, 5] = 1  # type: ignore[index]
        for _ in range(2):
            torch.testing.assert_close(fast(q), model(q))
        assert sum("run uncompiled" in record.message for record in caplog.records) == 1
        model.bias.copy_(tril())  # type: ignore[operator]
        torch.testing.assert_close(fast(q), model(q))


def test_a_buffer_that_is_replaced() -> None:
    model, q = Block(tril()), query()
    fast = compiled(model)
    with torch.no_grad():
        fast(q)
        for other in (tril(diagonal=1), tril()):
            model.bias = other
            torch.testing.assert_close(fast(q), model(q))
            model.load_state_dict(model.state_dict() | {"bias": tril(diagonal=2)})
            torch.testing.assert_close(fast(q), model(q))


def one_off() -> torch.Tensor:
    buffer = tril()
    buffer[..., 3, 30] = 1
    return buffer


def test_not_a_triangle() -> None:
    check(Block(one_off()), reads=False)


def test_not_when_the_graph_writes_it() -> None:
    class Writes(Block):
        def forward(self, q: torch.Tensor) -> torch.Tensor:
            self.bias[..., 0, 1] = 1  # type: ignore[index]
            return super().forward(q)

    check(Writes(tril()), reads=False)


def test_not_when_the_tensor_itself_is_needed() -> None:
    class Sums(Block):
        def forward(self, q: torch.Tensor) -> torch.Tensor:
            return self.bias.sum(-1).cos() + q.sum()  # type: ignore[operator]

    check(Sums(tril()), reads=False)


@pytest.mark.parametrize("name", [NAME, "all"])
def test_not_when_disabled(name: str) -> None:
    fast = torch.compile(Block(tril()), backend="fxopt", options={"host": "eager", "disable": name})
    with collect() as found, torch.no_grad():
        fast(query())
    assert not known(found)


def test_not_on_the_meta_device() -> None:
    model = Block(tril()).to("meta")
    with collect() as found, torch.no_grad():
        assert compiled(model)(query().to("meta")).is_meta
    assert not known(found)


def test_not_a_tensor_that_is_given() -> None:
    def attend(q: torch.Tensor, held: torch.Tensor) -> torch.Tensor:
        return softmax((q @ q.transpose(-2, -1)).masked_fill(held[..., :9, :9] == 0, -math.inf), -1) @ q

    fast = torch.compile(attend, backend="fxopt", options={"host": "eager", "strict": True})
    q = query()
    with collect() as found, torch.no_grad():
        for held in (tril(), tril(diagonal=1)):
            torch.testing.assert_close(fast(q, held), attend(q, held))
    assert not known(found)


@pytest.mark.parametrize("diagonal", [-3, -1, 0, 2])
def test_the_rule_of_a_triangle(diagonal: int) -> None:
    found = triangle_of(torch.ones(5, 7).tril(diagonal))
    assert found is not None
    assert (found.diagonal, found.inside, found.outside) == (diagonal, 1.0, 0.0)


@pytest.mark.parametrize(
    "tensor",
    [torch.ones(4, 4), torch.eye(4), torch.ones(2, 4, 4).tril(), torch.ones(4), torch.full((4, 4), math.nan)],
)
def test_the_rule_of_no_triangle(tensor: torch.Tensor) -> None:
    assert triangle_of(tensor) is None
