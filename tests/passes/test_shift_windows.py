"""shift-windows: a window that is copied, changed and copied back moves where it is; others are copied."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from transformers import MistralConfig, MistralForCausalLM, StaticCache

from fxopt.ir.contract import Status
from fxopt.passes import shift_windows
from fxopt.report.record import collect
from support.compiled import compile_fxopt
from support.golden import assert_golden
from support.rewriting import Rewritten, rewriting

NAME = "shift-windows"
PASSES = ("eliminate-noops", NAME)
F = Callable[..., Any]
N = 6


@pytest.fixture(autouse=True)
def at_any_size(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shift_windows, "LEAST_BYTES", 0)


def put(window: torch.Tensor, new: torch.Tensor) -> torch.Tensor:
    """As transformers has it."""
    moved = window.roll(-1, dims=-2)
    moved[:, :, torch.tensor([-1])] = new
    window.copy_(moved)
    return window.sum(-1)


def put_from_the_front(window: torch.Tensor, new: torch.Tensor) -> torch.Tensor:
    moved = window.roll(-1, 2)
    moved[:, :, torch.tensor([N - 1])] = new
    return window.copy_(moved) * 2


def put_without_writing(window: torch.Tensor, new: torch.Tensor) -> torch.Tensor:
    window.copy_(window.roll(-1, 0).index_put((torch.tensor([-1]),), new[:1]))
    return window.sum(-1)


def put_twice_as_many(window: torch.Tensor, new: torch.Tensor) -> torch.Tensor:
    moved = window.roll(-2, dims=2)
    moved[:, :, torch.tensor([-2, -1])] = new
    window.copy_(moved)
    return window * 2


def sliced(window: torch.Tensor, new: torch.Tensor) -> torch.Tensor:
    moved = window.roll(-1, 2)
    moved[:, :, -1:] = new
    return window.copy_(moved) + 1


def joined(window: torch.Tensor, new: torch.Tensor) -> torch.Tensor:
    window.copy_(torch.cat([window[:, :, 1:], new], dim=2))
    return window.sum(-1)


def read_before(window: torch.Tensor, new: torch.Tensor) -> torch.Tensor:
    """What reads the window before it moves finds the entries that were there."""
    before = window.sum(-1)
    moved = window.roll(-1, dims=-2)
    moved[:, :, torch.tensor([-1])] = new
    before = before + window.amax(-1)
    window.copy_(moved)
    return before * window.sum(-1)


FIRES: tuple[F, ...] = (
    put,
    put_from_the_front,
    put_without_writing,
    put_twice_as_many,
    sliced,
    joined,
    read_before,
)


def check(fn: F, found: Rewritten, window: torch.Tensor, *others: torch.Tensor) -> None:
    """The same results and the same window, bit by bit, over three tokens."""
    twin = window.clone()
    with torch.no_grad():
        for _ in range(3):
            assert torch.equal(found.call(window, *others), fn(twin, *others))
            assert torch.equal(window, twin)


def new_for(fn: F, batch: int = 2) -> torch.Tensor:
    return torch.randn(batch, 3, 2 if fn is put_twice_as_many else 1, 4)


@pytest.mark.parametrize("fn", FIRES, ids=lambda each: each.__name__)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_fires(fn: F, dtype: torch.dtype) -> None:
    found = rewriting(fn, PASSES)
    check(fn, found, torch.randn(2, 3, N, 4).to(dtype), new_for(fn).to(dtype))
    assert found.applied(NAME) == 1, found.reasons()
    assert "fxopt.shift_window" in found.lowered[0]
    assert all(name not in found.lowered[0] for name in ("roll", "cat", "copy_", "index_put"))


@pytest.mark.parametrize("fn", [put, sliced, joined], ids=lambda each: each.__name__)
def test_fires_with_a_batch_of_any_size(fn: F) -> None:
    found = rewriting(fn, PASSES, dynamic=None)
    for batch in (2, 3, 5):
        check(fn, found, torch.randn(batch, 3, N, 4), new_for(fn, batch))
    assert found.graphs == 2
    assert found.applied(NAME) == 2, found.reasons()


@pytest.mark.parametrize("fn", [put, sliced, joined], ids=lambda each: each.__name__)
def test_fires_with_a_window_of_any_size(fn: F) -> None:
    found = rewriting(fn, PASSES, dynamic=True)
    for size in (N, 9, 17):
        check(fn, found, torch.randn(2, 3, size, 4), new_for(fn))
    assert found.graphs == 1
    assert found.applied(NAME) == 1, found.reasons()


def test_not_with_a_window_that_may_be_no_longer_than_what_is_new() -> None:
    found = rewriting(put_twice_as_many, PASSES, dynamic=True)
    for size in (N, 2):
        check(put_twice_as_many, found, torch.randn(2, 3, size, 4), new_for(put_twice_as_many))
    assert found.applied(NAME) == 0
    assert "known to be longer than 2" in found.reasons(NAME)


def test_fires_where_the_host_compiles() -> None:
    """The op writes to the input itself, of which Inductor makes no copy."""
    call, window, new = torch.compile(put, backend="fxopt"), torch.randn(2, 3, N, 4), torch.randn(2, 3, 1, 4)
    twin = window.clone()
    with torch.no_grad():
        for _ in range(2):
            torch.testing.assert_close(call(window, new), put(twin, new))
            assert torch.equal(window, twin)


def test_fires_golden() -> None:
    found = rewriting(put, PASSES)
    with torch.no_grad():
        found.call(torch.randn(2, 3, N, 4), torch.randn(2, 3, 1, 4))
    assert_golden(found.before[0] + "->\n" + found.after[0], NAME.replace("-", "_"), "put")


def towards_the_back(window: torch.Tensor, new: torch.Tensor) -> torch.Tensor:
    moved = window.roll(1, 2)
    moved[:, :, torch.tensor([-1])] = new
    return window.copy_(moved)


def further_than_written(window: torch.Tensor, new: torch.Tensor) -> torch.Tensor:
    moved = window.roll(-2, 2)
    moved[:, :, torch.tensor([-1])] = new
    return window.copy_(moved)


def along_two(window: torch.Tensor, new: torch.Tensor) -> torch.Tensor:
    moved = window.roll((-1, -1), (1, 2))
    moved[:, :, torch.tensor([-1])] = new
    return window.copy_(moved)


def along_another(window: torch.Tensor, new: torch.Tensor) -> torch.Tensor:
    moved = window.roll(-1, 1)
    moved[:, :, torch.tensor([-1])] = new
    return window.copy_(moved)


def elsewhere(window: torch.Tensor, new: torch.Tensor) -> torch.Tensor:
    moved = window.roll(-1, 2)
    moved[:, :, torch.tensor([0])] = new
    return window.copy_(moved)


def not_written(window: torch.Tensor, new: torch.Tensor) -> torch.Tensor:
    return window.copy_(window.roll(-1, 2)) + new


def written_too_late(window: torch.Tensor, new: torch.Tensor) -> torch.Tensor:
    moved = window.roll(-1, 2)
    window.copy_(moved)
    moved[:, :, torch.tensor([-1])] = new
    return window + 1


def copy_is_read(window: torch.Tensor, new: torch.Tensor) -> torch.Tensor:
    moved = window.roll(-1, 2)
    moved[:, :, torch.tensor([-1])] = new
    window.copy_(moved)
    window.add_(1)
    return moved * 2


def added(window: torch.Tensor, new: torch.Tensor) -> torch.Tensor:
    moved = window.roll(-1, 0)
    moved.index_put_((torch.tensor([-1]),), new[:1], accumulate=True)
    return window.copy_(moved)


def window_written_between(window: torch.Tensor, new: torch.Tensor) -> torch.Tensor:
    moved = window.roll(-1, 2)
    window[:, :, 2:].zero_()
    moved[:, :, torch.tensor([-1])] = new
    return window.copy_(moved)


def new_written_between(window: torch.Tensor, new: torch.Tensor) -> torch.Tensor:
    moved = window.roll(-1, 2)
    moved[:, :, torch.tensor([-1])] = new
    new.zero_()
    return window.copy_(moved)


def part_of_the_window(window: torch.Tensor, new: torch.Tensor) -> torch.Tensor:
    moved = window.roll(-1, 2)
    moved[:, :, torch.tensor([-1])] = window[:, :, :1]
    return window.copy_(moved) + new


def more_than_dropped(window: torch.Tensor, new: torch.Tensor) -> torch.Tensor:
    window.copy_(torch.cat([window[:, :, 2:], new], 2)[:, :, :1])
    return window + 1


def no_input(window: torch.Tensor, new: torch.Tensor) -> torch.Tensor:
    made = window * 2
    moved = made.roll(-1, 2)
    moved[:, :, torch.tensor([-1])] = new
    return made.copy_(moved)


def part_of_an_input(window: torch.Tensor, new: torch.Tensor) -> torch.Tensor:
    half = window[:, :, :4]
    moved = half.roll(-1, 2)
    moved[:, :, torch.tensor([-1])] = new
    half.copy_(moved)
    return window + 1


NOT: dict[F, str] = {
    towards_the_back: "rolled towards its front",
    further_than_written: "the last 2 entries written once",
    along_two: "along one dimension",
    along_another: "the last 1 entries written once",
    elsewhere: "the last 1 entries written once",
    not_written: "the last 1 entries written once",
    written_too_late: "the last 1 entries written once",
    copy_is_read: "a copy that is only copied back",
    added: "the last 1 entries written once",
    window_written_between: "is written by zero_",
    new_written_between: "is written by zero_",
    part_of_the_window: "a part of the window",
    no_input: "wanted a window that is an input",
    part_of_an_input: "wanted a window that is an input",
    more_than_dropped: "",
}


@pytest.mark.parametrize("fn", NOT, ids=lambda each: each.__name__)
def test_not(fn: F) -> None:
    found = rewriting(fn, PASSES)
    window, new = torch.randn(2, 3, N, 4), torch.randn(2, 3, 1, 4)
    others = [window.clone(), new.clone()]
    with torch.no_grad():
        assert torch.equal(found.call(window, new), fn(*others))
    assert torch.equal(window, others[0])
    assert torch.equal(new, others[1])
    assert found.applied(NAME) == 0
    assert NOT[fn] in found.reasons(NAME)


def test_not_where_new_entries_share_memory_with_the_window() -> None:
    found = rewriting(put, PASSES)
    held = [torch.arange(2.0 * N * 4).view(1, 2, N, 4) for _ in range(2)]
    with torch.no_grad():
        results = [call(each, each[:, :, :1]) for call, each in zip((found.call, put), held, strict=True)]
    assert torch.equal(*results)
    assert torch.equal(*held)
    assert found.applied(NAME) == 0
    assert "a part of the window" in found.reasons(NAME)


def test_fires_where_another_input_is_a_view_of_the_window() -> None:
    """It sees the move, as it saw the copy."""

    def read_through(window: torch.Tensor, new: torch.Tensor, view: torch.Tensor) -> torch.Tensor:
        before = view.sum(-1)
        put(window, new)
        return torch.stack([before, view.sum(-1)])

    found = rewriting(read_through, PASSES)
    held, new = [torch.arange(2.0 * N * 4).view(1, 2, N, 4) for _ in range(2)], torch.randn(1, 2, 1, 4)
    with torch.no_grad():
        results = [
            call(each, new, each[:, 1]) for call, each in zip((found.call, read_through), held, strict=True)
        ]
    assert torch.equal(*results)
    assert torch.equal(*held)
    assert found.applied(NAME) == 1


def test_not_with_a_gradient() -> None:
    def through(window: torch.Tensor, new: torch.Tensor) -> torch.Tensor:
        return put(window * 1, new) + put(window.detach(), new)

    found = rewriting(put, PASSES)
    new = torch.randn(2, 3, 1, 4, requires_grad=True)
    found.call(torch.randn(2, 3, N, 4), new).sum().backward()
    assert torch.equal(new.grad, torch.ones_like(new))
    assert "it has no gradient" in found.reasons(NAME)


@pytest.mark.parametrize("stride", ["transposed", "wide"])
def test_not_where_memory_has_another_order(stride: str) -> None:
    made = (
        torch.randn(2, N, 3, 4).transpose(1, 2)
        if stride == "transposed"
        else torch.randn(2, 3, N, 8)[..., :4]
    )
    twin, new, found = made.clone(), torch.randn(2, 3, 1, 4), rewriting(put, PASSES)
    with torch.no_grad():
        torch.testing.assert_close(found.call(made, new), put(twin, new))
    assert torch.equal(made, twin)
    assert "wanted a contiguous window" in found.reasons(NAME)


@pytest.mark.parametrize(("name", "value", "reason"), [
    ("LEAST_BYTES", 2**20, "a window of 576 B, pays from 1048576"),
    ("MOST_THREADS", 0, "threads would move it"),
])  # fmt: skip
def test_not_where_it_does_not_pay(
    name: str, value: int, reason: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(shift_windows, name, value)
    found = rewriting(put, PASSES)
    check(put, found, torch.randn(2, 3, N, 4), torch.randn(2, 3, 1, 4))
    assert reason in found.reasons(NAME)


def test_a_sliding_layer_that_is_full() -> None:
    """A cache of transformers, filled and moved on by six tokens: its logits and buffers are eager's."""
    config = MistralConfig(
        vocab_size=31, hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=4,
        num_key_value_heads=2, sliding_window=8,
    )  # fmt: skip
    model = MistralForCausalLM(config).eval()
    caches = [StaticCache(config, max_cache_len=32) for _ in range(2)]
    calls = (model, compile_fxopt(model))
    ids = torch.randint(0, 31, (2, 14), generator=torch.Generator().manual_seed(0))
    with torch.no_grad(), collect() as records:
        for cache in caches:
            model(ids[:, :8], past_key_values=cache)
        for place in range(8, 14):
            token, at = ids[:, place : place + 1], torch.full((2, 1), place)
            logits = [
                call(token, position_ids=at, past_key_values=cache).logits
                for call, cache in zip(calls, caches, strict=True)
            ]
            torch.testing.assert_close(*logits)
    for one, other in zip(caches[0].layers, caches[1].layers, strict=True):
        torch.testing.assert_close(one.keys, other.keys)
        torch.testing.assert_close(one.values, other.values)
    evidence = [each for record in records for each in record.evidence if each.rewrite == NAME]
    applied = [each for each in evidence if each.status is Status.APPLIED]
    assert len(applied) == 2 * len(records)
