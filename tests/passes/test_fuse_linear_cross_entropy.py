"""fuse-linear-cross-entropy: spellings that fire, near-misses that must not, sizes, modes."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch.nn import functional as F  # noqa: N812
from torch.utils.checkpoint import checkpoint

import fxopt.passes.fuse_linear_cross_entropy as fused
from fxopt.ir.ops import cross_entropy_chunks as chunks
from support.golden import assert_golden
from support.numerics import assert_closer, reference_mode
from support.rewriting import rewriting

NAME = "fuse-linear-cross-entropy"
PASSES = ("eliminate-noops", "simplify-views", NAME)
B, S, H, V = 2, 9, 8, 50
Loss = Callable[[torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]


@pytest.fixture(autouse=True)
def _small(monkeypatch: pytest.MonkeyPatch) -> None:
    """Losses of any size are taken, in chunks of four rows."""
    monkeypatch.setattr(fused, "LEAST_WITH_GRADIENTS", 0)
    monkeypatch.setattr(fused, "LEAST_WITHOUT", 0)
    monkeypatch.setattr(chunks, "CHUNK_BYTES", 0)
    monkeypatch.setattr(chunks, "FEWEST_ROWS", 4)


def labels_shifted(h: torch.Tensor, w: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    """As transformers 5 does."""
    logits = F.linear(h, w).float()
    y = F.pad(y, (0, 1), value=-100)[..., 1:].contiguous()
    return F.cross_entropy(logits.view(-1, w.shape[0]), y.view(-1), ignore_index=-100)


def logits_shifted(h: torch.Tensor, w: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    logits = F.linear(h, w)[..., :-1, :].contiguous()
    return F.cross_entropy(logits.view(-1, logits.size(-1)), y[..., 1:].reshape(-1), label_smoothing=0.1)


def by_count(h: torch.Tensor, w: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    total = F.cross_entropy((h @ w.t()).float().flatten(0, 1), y.flatten(), reduction="sum")
    return total / (y >= 0).sum()


def capped(h: torch.Tensor, w: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    logits = torch.tanh(F.linear(h, w) / 3.0) * 3.0
    return F.cross_entropy(logits.view(-1, w.shape[0]), y.view(-1))


def scaled(h: torch.Tensor, w: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    return F.cross_entropy((F.linear(h, w) * 0.25).float().reshape(-1, w.shape[0]), y.reshape(-1))


def biased(h: torch.Tensor, w: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    bias = w.sum(1)
    return F.cross_entropy((F.linear(h, w) + bias).view(-1, w.shape[0]), y.view(-1))


def classes_second(h: torch.Tensor, w: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    return F.cross_entropy(F.linear(h, w, w[:, 0]).transpose(1, 2), y, reduction="none")


def log_likelihood(h: torch.Tensor, w: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    logs = F.log_softmax(F.linear(h, w), -1, dtype=torch.float32)
    return F.nll_loss(logs.view(-1, w.shape[0]), y.view(-1))


def columns(h: torch.Tensor, w: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    """The weight is (H, V)."""
    return F.cross_entropy((h @ w.view(h.shape[-1], -1))[:, 0], y[:, 0])


SPELLINGS: dict[str, Loss] = {
    f.__name__: f
    for f in (labels_shifted, logits_shifted, by_count, capped, scaled, biased, classes_second,
              log_likelihood, columns)
}  # fmt: skip


def inputs(dtype: torch.dtype = torch.float32, seed: int = 0) -> tuple[torch.Tensor, ...]:
    torch.manual_seed(seed)
    labels = torch.randint(0, V, (B, S))
    labels[0, 3:6] = -100
    return torch.randn(B, S, H).to(dtype), torch.randn(V, H).to(dtype), labels


def with_gradients(call: Loss, h: torch.Tensor, w: torch.Tensor, y: torch.Tensor) -> list[Any]:
    leaves = [h.clone().requires_grad_(), w.clone().requires_grad_()]
    loss = call(*leaves, y)
    (loss * torch.linspace(1, 2, loss.numel(), dtype=loss.dtype).view_as(loss)).sum().backward()
    return [loss.detach(), *(leaf.grad for leaf in leaves)]


def judged(spelling: Loss, call: Loss, h: torch.Tensor, w: torch.Tensor, y: torch.Tensor) -> None:
    with reference_mode():
        exact = with_gradients(spelling, h.double(), w.double(), y)
    assert_closer(exact, with_gradients(call, h, w, y), with_gradients(spelling, h, w, y))


CASES = [(name, dtype) for name in SPELLINGS for dtype in (torch.float32, torch.bfloat16)]


@pytest.mark.parametrize(("name", "dtype"), [*CASES, ("labels_shifted", torch.float16)])
def test_fires_with_gradients_as_exact_as_eagers(name: str, dtype: torch.dtype) -> None:
    found = rewriting(SPELLINGS[name], PASSES)
    judged(SPELLINGS[name], found.call, *inputs(dtype))
    assert found.applied(NAME) == 1, found.reasons()
    assert "cross_entropy_loss" not in found.after[0]


@pytest.mark.parametrize("name", ["labels_shifted", "logits_shifted", "classes_second", "columns"])
def test_fires_with_dynamic_shapes(name: str) -> None:
    found = rewriting(SPELLINGS[name], PASSES, dynamic=True)
    h, w, y = inputs()
    for rows in (9, 5):
        judged(SPELLINGS[name], found.call, h[:, :rows].clone(), w, y[:, :rows].clone())
    assert found.graphs == 1
    assert found.applied(NAME) == 1, found.reasons()


def test_float64_stays_float64() -> None:
    found = rewriting(capped, PASSES)
    given = inputs(torch.float64)
    for got, want in zip(with_gradients(found.call, *given), with_gradients(capped, *given), strict=True):
        torch.testing.assert_close(got, want, rtol=1e-13, atol=1e-16)
    assert found.applied(NAME) == 1


def test_golden() -> None:
    for spelling in (labels_shifted, capped):
        found = rewriting(spelling, PASSES)
        with_gradients(found.call, *inputs(torch.bfloat16))
        text = f"before\n{found.before[0]}\nafter\n{found.after[0]}\nlowered\n{found.lowered[0]}"
        assert_golden(text, "fuse_linear_cross_entropy", spelling.__name__)


def test_fires_in_autocast() -> None:
    def f(h: torch.Tensor, w: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        with torch.autocast("cpu", dtype=torch.bfloat16):
            return labels_shifted(h, w, y)

    found = rewriting(f, PASSES)
    h, w, y = inputs()
    with reference_mode():
        exact = with_gradients(labels_shifted, h.double(), w.double(), y)
    loss, *gradients = with_gradients(found.call, h, w, y)
    wanted, *eager = with_gradients(f, h, w, y)
    # They are numbers of bfloat16, though of dtype float32.
    assert_closer(
        exact,
        [loss.bfloat16(), *(each.bfloat16() for each in gradients)],
        [wanted.bfloat16(), *(each.bfloat16() for each in eager)],
    )
    assert found.applied(NAME) == 1
    assert (loss.dtype, gradients[1].dtype) == (torch.float32, torch.float32)
    assert "aten.to.dtype(w_, torch.bfloat16)" in found.after[0].replace("l_w_", "w_")


def returned(h: torch.Tensor, w: torch.Tensor, y: torch.Tensor) -> Any:
    logits = F.linear(h, w).view(-1, V)
    return F.cross_entropy(logits, y.view(-1)), logits


def z_loss(h: torch.Tensor, w: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    logits = F.linear(h, w).view(-1, V)
    return F.cross_entropy(logits, y.view(-1)) + logits.logsumexp(-1).square().mean()


def probabilities(h: torch.Tensor, w: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    wanted = F.one_hot(y.clamp(min=0), V).to(h.dtype).view(-1, V)
    return F.cross_entropy(F.linear(h, w).view(-1, V), wanted)


def weighted_classes(h: torch.Tensor, w: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    return F.cross_entropy(F.linear(h, w).view(-1, V), y.view(-1), weight=torch.linspace(1.0, 2.0, V))


def temperature(h: torch.Tensor, w: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    return F.cross_entropy((F.linear(h, w) * w[0, 0]).view(-1, V), y.view(-1))


def activated(h: torch.Tensor, w: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    return F.cross_entropy(F.linear(h, w).relu().view(-1, V), y.view(-1))


def capped_twice(h: torch.Tensor, w: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    return F.cross_entropy(F.linear(h, w).tanh().tanh().view(-1, V), y.view(-1))


def fewer_words(h: torch.Tensor, w: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    return F.cross_entropy(F.linear(h, w)[..., :-1].reshape(-1, V - 1), y.clamp(max=V - 2).view(-1))


def words_and_rows_mixed(h: torch.Tensor, w: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    return F.cross_entropy(F.linear(h, w).view(-1, V // 2), y.clamp(max=9).view(-1).repeat(2))


def detached(h: torch.Tensor, w: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    return F.cross_entropy(F.linear(h, w).detach().view(-1, V), y.view(-1)) + (h.sum() + w.sum()) * 0.1


def softmax_over_rows(h: torch.Tensor, w: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    return F.nll_loss(F.log_softmax(F.linear(h, w).view(-1, V), 0), y.view(-1))


def partly_without_gradients(h: torch.Tensor, w: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    with torch.no_grad():
        logits = F.linear(h, w)
    return F.cross_entropy(logits.view(-1, V), y.view(-1)) + (h.sum() + w.sum()) * 0.1


def logits_written(h: torch.Tensor, w: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    logits = F.linear(h, w)
    logits[..., 0] = -5.0
    return F.cross_entropy(logits.view(-1, V), y.view(-1))


NEAR_MISSES: dict[str, tuple[Loss, str]] = {
    "returned": (returned, "fxopt.loss_only(model) does not return them"),
    "z_loss": (z_loss, "wanted logits that only the loss reads"),
    "probabilities": (probabilities, "wanted targets that are indices"),
    "weighted_classes": (weighted_classes, "without weights of classes"),
    "temperature": (temperature, "scaled or capped by numbers at most, saw aten.mul.Tensor"),
    "activated": (activated, "saw aten.relu.default"),
    "capped_twice": (capped_twice, "saw aten.tanh.default"),
    "fewer_words": (fewer_words, "saw aten.slice.Tensor"),
    "words_and_rows_mixed": (words_and_rows_mixed, "saw aten.view.default"),
    "detached": (detached, "saw aten.detach.default"),
    "softmax_over_rows": (softmax_over_rows, "wanted the log-softmax of the last dimension"),
    "partly_without_gradients": (partly_without_gradients, "grad or autocast modes"),
    "logits_written": (logits_written, "wanted logits that only the loss reads"),
}


@pytest.mark.parametrize("name", NEAR_MISSES)
def test_near_miss(name: str) -> None:
    spelling, reason = NEAR_MISSES[name]
    found = rewriting(spelling, PASSES)

    def loss(call: Callable[..., Any]) -> Loss:
        return lambda *given: first if isinstance(first := call(*given), torch.Tensor) else first[0]

    for got, want in zip(
        with_gradients(loss(found.call), *inputs()), with_gradients(loss(spelling), *inputs()), strict=True
    ):
        assert (got is None and want is None) or torch.equal(got, want)  # type: ignore[arg-type]
    assert found.applied(NAME) == 0
    assert reason in found.reasons(NAME)


@pytest.mark.parametrize("place", [0, 1])
def test_not_across_a_write(place: int) -> None:
    """To the hidden states, or to the weight."""

    def f(h: torch.Tensor, w: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        h, w = h.clone(), w.clone()
        logits = F.linear(h, w)
        (h, w)[place].mul_(2.0)
        return F.cross_entropy(logits.view(-1, V), y.view(-1)) + h.sum() + w.sum()

    found = rewriting(f, PASSES)
    with torch.no_grad():
        assert torch.equal(found.call(*inputs()), f(*inputs()))
    assert "is written by mul_" in found.reasons(NAME)


def test_likelihoods_of_other_numbers_are_no_candidates() -> None:
    found = rewriting(lambda h, w, y: F.nll_loss(F.linear(h, w).view(-1, V), y.view(-1)), PASSES)
    found.call(*inputs())
    assert found.statuses(NAME) == []


def test_pays_by_the_number_of_logits(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fused, "LEAST_WITH_GRADIENTS", B * S * V)
    monkeypatch.setattr(fused, "LEAST_WITHOUT", B * S * V + 1)
    h, w, y = inputs()
    training = rewriting(capped, PASSES)
    training.call(h.requires_grad_(), w, y)
    assert training.applied(NAME) == 1
    assert "900 logits (18 rows of 50) are never in memory at once" in training.reasons(NAME)
    evaluation = rewriting(capped, PASSES)
    with torch.no_grad():
        evaluation.call(h, w, y)
    assert "900 logits (18 rows of 50), pays from 901 without gradients" in evaluation.reasons(NAME)


def test_no_row_counts() -> None:
    """The mean over no rows is NaN; the gradients are zero."""
    found = rewriting(labels_shifted, PASSES)
    h, w, y = inputs()
    judged(labels_shifted, found.call, h, w, torch.full_like(y, -100))
    assert found.applied(NAME) == 1


@pytest.mark.parametrize("frozen", [(0,), (1,), (0, 1)])
def test_gradients_of_some(frozen: tuple[int, ...]) -> None:
    found = rewriting(biased, PASSES)

    def results(call: Loss, given: tuple[torch.Tensor, ...]) -> list[torch.Tensor | None]:
        leaves = [each.clone().requires_grad_(place not in frozen) for place, each in enumerate(given[:2])]
        loss = call(*leaves, given[2])
        if loss.requires_grad:
            loss.backward()
        return [loss, *(leaf.grad for leaf in leaves)]

    h, w, y = inputs()
    exact = results(biased, (h.double(), w.double(), y))
    assert_closer(exact, results(found.call, (h, w, y)), results(biased, (h, w, y)))
    assert found.applied(NAME) == 1


def test_checkpointed_regions_compute_no_gradients_twice() -> None:
    def f(h: torch.Tensor, w: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        result: torch.Tensor = checkpoint(capped, h * 2.0, w, y, use_reentrant=False)
        return result

    found = rewriting(f, PASSES)
    h, w, y = inputs()
    exact = with_gradients(f, h.double(), w.double(), y)
    assert_closer(exact, with_gradients(found.call, h, w, y), with_gradients(f, h, w, y))
    assert found.applied(NAME) == 1


def test_targets_outside_of_the_vocabulary_raise() -> None:
    found = rewriting(capped, PASSES)
    h, w, y = inputs()
    for wrong in (V, -1):
        y[0, 0] = wrong
        with pytest.raises((IndexError, RuntimeError), match="out of bounds"):
            found.call(h, w, y)
    assert found.applied(NAME) == 1
