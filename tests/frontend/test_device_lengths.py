"""Which steps read their lengths on the device, that they compute the same, and that faults would be seen."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch.nn.functional import embedding, scaled_dot_product_attention

from fxopt.frontend.device_lengths_edit import Edit
from fxopt.ir.contract import Status
from fxopt.runtime import cuda_graphs, device_lengths, graphs, kv_state
from fxopt.runtime.graphs import Replay
from support.compiled import all_handled, compile_fxopt
from support.numerics import assert_closer
from support.recorded import FakeRecorder

HEADS, WIDTH, WINDOW = 2, 4, 12


class Cache:
    """Keys and values, as models have them."""

    def __init__(self, rows: int = 5, dtype: torch.dtype = torch.float32) -> None:
        self.keys, self.values = (torch.randn(2, HEADS, rows, WIDTH, dtype=dtype) for _ in range(2))

    def update(self, new: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        self.keys = torch.cat([self.keys, new], -2)
        self.values = torch.cat([self.values, new * 2], -2)
        return self.keys, self.values


Step = Callable[[Cache, torch.Tensor, torch.Tensor], torch.Tensor]


def plain(cache: Cache, new: torch.Tensor, padding: torch.Tensor) -> torch.Tensor:
    return scaled_dot_product_attention(new, *cache.update(new))


def masked(cache: Cache, new: torch.Tensor, padding: torch.Tensor) -> torch.Tensor:
    return scaled_dot_product_attention(new, *cache.update(new), attn_mask=padding[:, None, None].bool())


def masked_by_position(cache: Cache, new: torch.Tensor, padding: torch.Tensor) -> torch.Tensor:
    """As transformers makes masks of positions, some of which are not seen."""
    first, count = cache.keys.shape[2], new.shape[2]
    queries, keys = torch.arange(count) + first, torch.arange(first + count)
    sees = (keys <= queries[:, None]) & (keys > queries[:, None] - 7)
    rows = torch.arange(2)[:, None, None, None]
    mask = sees & padding.bool()[rows, keys[None, None, None]]
    return scaled_dot_product_attention(new, *cache.update(new), attn_mask=mask)


def biased_by_distance(cache: Cache, new: torch.Tensor, padding: torch.Tensor) -> torch.Tensor:
    """Numbers that are added to the scores, of a table with fewer rows than the cache has room for."""
    keys, values = cache.update(new)
    far = keys.shape[2] - 1 - torch.arange(keys.shape[2])
    table = torch.linspace(-3, 3, 90)[:, None]
    bias = embedding(far, table)[:, 0].masked_fill(padding[:, None, None] == 0, -torch.inf)
    return scaled_dot_product_attention(new, keys, values, attn_mask=bias)


def by_heads(cache: Cache, new: torch.Tensor, padding: torch.Tensor) -> torch.Tensor:
    """Keys are projected after they were kept, spelled-out attention, and the length is a factor."""
    keys, values = cache.update(new)
    keys = torch.nn.functional.linear(keys, torch.eye(WIDTH) * 1.5)
    scores = (new @ keys.transpose(-1, -2)) * 0.3
    weights = scores.masked_fill(padding[:, None, None] == 0, -1e30).softmax(-1)
    return (weights @ values) * (torch.ones(1) + keys.shape[2])


def windowed(cache: Cache, new: torch.Tensor, padding: torch.Tensor) -> torch.Tensor:
    keys, values = cache.update(new)
    cache.keys, cache.values = keys[:, :, -WINDOW + 1 :], values[:, :, -WINDOW + 1 :]
    return scaled_dot_product_attention(new, keys, values)


STEPS: tuple[Step, ...] = (plain, masked, masked_by_position, biased_by_distance, by_heads, windowed)


@pytest.fixture(autouse=True)
def recorder(monkeypatch: pytest.MonkeyPatch) -> FakeRecorder:
    """Makes recordings on the CPU; caches get little room, in which no number is at first."""
    made, make = FakeRecorder(), kv_state.KVState._make
    monkeypatch.setattr(cuda_graphs, "recorder_for", lambda device: made)
    monkeypatch.setattr(kv_state, "LEAST", 20)
    monkeypatch.setattr(kv_state, "MOST", 24)
    monkeypatch.setattr(kv_state.KVState, "_make", lambda *args: make(*args).fill_(torch.nan))
    return made


def run(step: Step, count: int = 40, caches: int = 1, new: int = 1, **how: Any) -> list[Any]:
    """Both ways, and compared. Returns the evidence."""
    compiled = compile_fxopt(step, replay="always", **how)
    ours = [Cache() for _ in range(caches)]
    theirs = copy.deepcopy(ours)
    with all_handled() as records, torch.no_grad():
        for number in range(count):
            for a, b in zip(ours, theirs, strict=True):
                rows = torch.randn(2, HEADS, new, WIDTH)
                padding = torch.ones(2, a.keys.shape[2] + new, dtype=torch.int64)
                padding[0, :3] = 0
                found, wanted = compiled(a, rows, padding), step(b, rows, padding)
                if number % 9 == 0 and step in (plain, masked, masked_by_position):
                    assert_closer(step(_exact(b, new), rows.double(), padding), found, wanted)
                torch.testing.assert_close(found, wanted)
                assert torch.equal(a.keys, b.keys)
                assert torch.equal(a.values, b.values)
    return [each for record in records for each in record.evidence if each.rewrite == "replay"]


def _exact(cache: Cache, new: int) -> Cache:
    """What the cache was before the step, in float64."""
    made = Cache()
    made.keys, made.values = (each[:, :, :-new].double() for each in (cache.keys, cache.values))
    return made


@pytest.mark.parametrize("step", STEPS)
def test_replayed_steps(step: Step, recorder: FakeRecorder) -> None:
    """Two caches in turns, through growths of their memory."""
    found = run(step, caches=2)
    assert Status.APPLIED in {each.status for each in found}
    replays = sum(each.replays for each in recorder.made)
    # A window moves every few steps; how often it comes to where it was before is the allocator's business.
    assert replays >= (1 if step is windowed else 2 * 40 - 8 * len(recorder.made) - 30)


LIVE = {
    plain: ("k < c0[0]", "s"),
    masked_by_position: ("c1[b, 0, 0, k] and k < c0[0]", "s"),
    biased_by_distance: ("k < c0[0]", "s + c1[b, 0, 0, k]"),
}


@pytest.mark.parametrize("step", LIVE)
def test_kernels_read_the_live_rows_of_all_the_room(step: Step) -> None:
    """Their loops end where the tensor of numbers says, not with the room of the cache."""
    mask, score = LIVE[step]
    compiled = compile_fxopt(step, replay="always", target="sm_90")
    cache = Cache()
    with all_handled() as records, torch.no_grad():
        for _ in range(3):
            padding = torch.ones(2, cache.keys.shape[2] + 1, dtype=torch.int64)
            compiled(cache, torch.randn(2, HEADS, 1, WIDTH), padding)
    (kernel,) = (each for each in records[-1].kernels if each.name.endswith("_attention"))
    assert kernel.about.summary.endswith(f"; keys that take part: {mask}; scores: {score}")
    assert "low0, high0 = 0, tl.minimum(extent, tl.load(c0_ptr))" in kernel.jit


def test_several_rows_at_once(recorder: FakeRecorder) -> None:
    run(masked_by_position, new=3, count=20)
    assert recorder.made


def sums(cache: Cache, new: torch.Tensor, padding: torch.Tensor) -> torch.Tensor:
    return cache.update(new)[0].sum(2)


def counts(cache: Cache, new: torch.Tensor, padding: torch.Tensor) -> torch.Tensor:
    return plain(cache, new, padding) * padding.sum()


def from_the_end(cache: Cache, new: torch.Tensor, padding: torch.Tensor) -> torch.Tensor:
    keys, values = cache.update(new)
    return scaled_dot_product_attention(new, keys.flip(2), values.flip(2))


def merged(cache: Cache, new: torch.Tensor, padding: torch.Tensor) -> torch.Tensor:
    keys, values = cache.update(new)
    return scaled_dot_product_attention(new, keys, values) + keys.reshape(2, -1)[:, :1, None, None]


def causal(cache: Cache, new: torch.Tensor, padding: torch.Tensor) -> torch.Tensor:
    return scaled_dot_product_attention(new, *cache.update(new), is_causal=True)


def returned(cache: Cache, new: torch.Tensor, padding: torch.Tensor) -> torch.Tensor:
    return cache.update(new)[0] + 1


@pytest.mark.parametrize(
    ("step", "reason"),
    [
        (sums, "rows that only attention mixes, saw aten.sum"),
        (counts, "rows that only attention mixes, saw aten.sum"),
        (from_the_end, "rows that only attention mixes, saw aten.flip"),
        (merged, "rows that only attention mixes, saw aten.reshape"),
        (causal, "wanted a mask that is a tensor"),
        (returned, "wanted results of sizes that stay"),
    ],
)
def test_near_misses(step: Step, reason: str, recorder: FakeRecorder) -> None:
    found = run(step, count=12)
    assert any(reason in each.reason for each in found if each.status is Status.ILLEGAL), found
    assert all(each.status is Status.ILLEGAL for each in found), found
    assert not recorder.made


def test_caches_of_different_lengths_run_as_they_were_captured() -> None:
    def step(a: Cache, b: Cache, new: torch.Tensor) -> torch.Tensor:
        return plain(a, new, new) + plain(b, new, new)

    compiled = compile_fxopt(step, replay="always")
    with torch.no_grad():
        for rows in (5, 5, 9, 11):
            ours = Cache(), Cache(rows)
            theirs = copy.deepcopy(ours)
            for _ in range(6):
                new = torch.randn(2, HEADS, 1, WIDTH)
                torch.testing.assert_close(compiled(*ours, new), step(*theirs, new))
                assert torch.equal(ours[1].keys, theirs[1].keys)


@pytest.mark.parametrize("wanted", ["auto", "never"])
def test_not_asked_for(wanted: str, recorder: FakeRecorder) -> None:
    """On a CPU, reading the live rows alone is faster than what could be replayed."""
    compiled = compile_fxopt(plain, replay=wanted)
    cache, new = Cache(), torch.randn(2, HEADS, 1, WIDTH)
    with torch.no_grad(), all_handled() as records:
        for _ in range(4):
            compiled(cache, new, new)
    assert not recorder.made
    assert not [each for record in records for each in record.evidence if each.rewrite == "replay"]


def _first_numbers(patch: pytest.MonkeyPatch) -> None:
    run_, seen = Replay.run, []

    def stale(self: Replay, inputs: Any, sizes: Any) -> Any:
        seen.append(inputs[-1])
        return run_(self, [*inputs[:-1], seen[0]], sizes)

    patch.setattr(Replay, "run", stale)


def _addresses_ignored(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(Replay, "_key", lambda self, given: tuple(each for each in given if isinstance(each, int)))


def _not_cleared(patch: pytest.MonkeyPatch) -> None:
    first = kv_state.first_rows
    patch.setattr(
        device_lengths, "first_rows",
        lambda tensor, dim, rows, before=0: first(tensor, dim, rows, before).clone()
        if before
        else first(tensor, dim, rows, before),
    )  # fmt: skip


FAULTS: dict[str, Callable[[pytest.MonkeyPatch], None]] = {
    "the numbers of the first step": _first_numbers,
    "rows behind the live ones are seen": lambda patch: patch.setattr(Edit, "exclude", lambda *args: None),
    "addresses are not looked at": _addresses_ignored,
    "inputs are not copied": lambda patch: patch.setattr(graphs, "_fill", lambda copy, given: None),
    "memory that holds no numbers": _not_cleared,
}


@pytest.mark.parametrize("fault", FAULTS)
def test_faults_are_seen(fault: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The tests above would not pass without what they are about."""
    FAULTS[fault](monkeypatch)
    step = plain if fault == "rows behind the live ones are seen" else masked_by_position
    with pytest.raises((AssertionError, RuntimeError)):
        run(step, caches=3)
