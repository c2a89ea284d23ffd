"""The op against torch's cross-entropy of all logits at once, in float64: results, gradients, memory."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from torch.nn import functional as F  # noqa: N812

import fxopt.passes.fuse_linear_cross_entropy as fused
from fxopt.ir.ops import cross_entropy_chunks as chunks
from fxopt.ir.ops import register_ops
from fxopt.ir.ops.linear_cross_entropy import MEAN, NONE, SUM
from support.aot_graphs import graphs_of
from support.numerics import assert_closer

N, H, V = 13, 5, 11
REDUCTIONS = {NONE: "none", MEAN: "mean", SUM: "sum"}
PLAIN: dict[str, Any] = {"ignore_index": -100, "label_smoothing": 0.0, "scale": 1.0, "softcap": 0.0}


@pytest.fixture(autouse=True)
def _four_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    register_ops()
    monkeypatch.setattr(chunks, "CHUNK_BYTES", 0)
    monkeypatch.setattr(chunks, "FEWEST_ROWS", 4)


def operands(dtype: torch.dtype, *, bias: bool = True) -> list[Any]:
    torch.manual_seed(0)
    found = [torch.randn(size, dtype=torch.float64).to(dtype) for size in ((N, H), (V, H), (V,))]
    return [each.requires_grad_() for each in found[: 2 + bias]] + [None] * (not bias)


def targets(ignored: int = -100) -> torch.Tensor:
    torch.manual_seed(1)
    found = torch.randint(0, V, (N,))
    found[[2, 7, 8]] = ignored
    return found


def at_once(h: torch.Tensor, w: torch.Tensor, b: torch.Tensor | None, y: torch.Tensor, **given: Any) -> Any:
    logits = given["scale"] * F.linear(h, w, b)
    if given["softcap"]:
        logits = given["softcap"] * torch.tanh(logits / given["softcap"])
    return F.cross_entropy(
        logits, y, reduction=REDUCTIONS[given["reduction"]],
        ignore_index=given["ignore_index"], label_smoothing=given["label_smoothing"],
    )  # fmt: skip


def op(*operands: Any, dtype: torch.dtype = torch.float64, recompute: bool = False, **given: Any) -> Any:
    return torch.ops.fxopt.linear_cross_entropy(
        *operands, **given, compute_dtype=dtype, out_dtype=dtype, recompute=recompute
    )


GIVEN = [
    {**PLAIN, "reduction": reduction, "recompute": recompute} | more
    for reduction, recompute, more in itertools.product(
        (NONE, MEAN, SUM), (False, True),
        ({}, {"label_smoothing": 0.2, "ignore_index": 4}, {"scale": 0.5}, {"softcap": 3.0, "scale": 2.0}),
    )
    if not (reduction == NONE and recompute)
]  # fmt: skip


@pytest.mark.parametrize("given", GIVEN, ids=lambda given: "-".join(map(str, given.values())))
@pytest.mark.parametrize("bias", [True, False])
def test_loss_and_gradients(given: dict[str, Any], bias: bool) -> None:
    y = targets(given["ignore_index"])
    leaves = operands(torch.float64, bias=bias)
    wanted = at_once(*leaves, y, **{name: each for name, each in given.items() if name != "recompute"})
    found = op(*leaves, y, **given)
    torch.testing.assert_close(found, wanted, rtol=1e-12, atol=1e-14)
    over = torch.randn_like(wanted)
    learned = [each for each in leaves if each is not None]
    for got, want in zip(
        torch.autograd.grad(found, learned, over), torch.autograd.grad(wanted, learned, over), strict=True
    ):
        torch.testing.assert_close(got, want, rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_gradcheck(reduction: int) -> None:
    given = {**PLAIN, "softcap": 2.0, "label_smoothing": 0.1, "reduction": reduction}
    leaves = operands(torch.float64)
    assert torch.autograd.gradcheck(lambda *each: op(*each, targets(), **given), leaves, fast_mode=True)


def test_sure_rows_lose_no_digits() -> None:
    """Losses of a thousandth, each another one, under logits of 48."""
    h = torch.cat([torch.diag(torch.linspace(1.9, 2.1, 32)), torch.full((32, 1), 38.0)], 1)
    w = torch.cat([torch.eye(32) * 5.1, torch.ones(32, 1)], 1)
    y = torch.arange(32)
    given = {**PLAIN, "reduction": NONE}
    found = op(h, w, None, y, dtype=torch.float32, **given)
    assert 1e-4 < float(found.max()) < 1e-2
    assert_closer(at_once(h.double(), w.double(), None, y, **given), found, at_once(h, w, None, y, **given))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("native", [True, False])
def test_low_precision(dtype: torch.dtype, native: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """With products of that dtype, as accelerators have, and without."""
    monkeypatch.setattr(chunks, "product_dtype", lambda hidden, loss: dtype if native else loss.dtype)
    y = targets()
    given = {**PLAIN, "reduction": MEAN}

    def results(compute: Any, leaves: list[Any], **more: Any) -> list[torch.Tensor]:
        loss = compute(*leaves, y, **given, **more)
        return [loss, *torch.autograd.grad(loss, leaves)]

    leaves = operands(dtype)
    exact = results(at_once, [each.detach().double().requires_grad_() for each in leaves])
    eager = results(at_once, leaves)
    found = results(op, leaves, dtype=torch.float32)
    assert_closer(exact, [found[0].to(dtype), *found[1:]], eager)


def test_small_shares_survive_float16(monkeypatch: pytest.MonkeyPatch) -> None:
    """A gradient of 1e-8 in each word is no zero, as it would be in float16."""
    monkeypatch.setattr(chunks, "product_dtype", lambda hidden, loss: torch.float16)
    h, w = torch.ones(1, 1, dtype=torch.float16), torch.ones(64, 1, dtype=torch.float16)
    w[0] = 18.0
    leaves = [each.requires_grad_() for each in (h, w)]
    loss = op(*leaves, None, torch.tensor([0]), dtype=torch.float32, **PLAIN, reduction=SUM)
    (of_weight,) = torch.autograd.grad(loss * 2.0**14, leaves[1])
    share = torch.softmax(F.linear(h.double(), w.double()), -1)[0, 1]
    torch.testing.assert_close(of_weight[1, 0].double(), share * 2.0**14, rtol=0.05, atol=0.0)


def test_targets_outside_of_the_vocabulary_raise() -> None:
    for wrong in (V, -1):
        y = targets()
        y[0] = wrong
        with pytest.raises(RuntimeError, match="out of bounds"):
            op(*operands(torch.float64), y, **PLAIN, reduction=MEAN)


def test_ignored_rows_are_not_computed() -> None:
    """Nothing of them is read: half the labels of a batch are often those of prompts and padding."""
    leaves = operands(torch.float64)
    y = targets()
    with torch.no_grad():
        leaves[0][y == -100] = torch.nan
    loss = op(*leaves, y, **PLAIN, reduction=MEAN)
    assert all(each.isfinite().all() for each in (loss, *torch.autograd.grad(loss, leaves)))


WORDS, TOKENS = 307, 203  # no other sizes of the model


@pytest.mark.parametrize("dynamic", [False, True])
@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_no_tensor_of_all_logits(reduction: str, dynamic: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of the graphs after AOTAutograd, none has a tensor with an entry for each token and word."""
    monkeypatch.setattr(fused, "LEAST_WITH_GRADIENTS", 0)
    head = torch.nn.Linear(8, WORDS)

    def loss(h: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        return F.cross_entropy(head(h).float().view(-1, WORDS), y.view(-1), reduction=reduction)

    given = {"h": torch.randn(1, TOKENS, 8, requires_grad=True), "y": torch.randint(0, WORDS, (1, TOKENS))}
    graphs = graphs_of(loss, given, training=True, dynamic=dynamic)
    assert len(graphs) == 2
    assert given["h"].grad is not None
    values = [node.meta.get("val") for gm in graphs for node in gm.graph.nodes]
    flat = [each for value in values for each in (value if isinstance(value, tuple | list) else (value,))]
    sizes = {each.numel().node.hint if isinstance(each.numel(), torch.SymInt) else each.numel()
             for each in flat if isinstance(each, torch.Tensor)}  # fmt: skip
    assert max(sizes) < WORDS * TOKENS
