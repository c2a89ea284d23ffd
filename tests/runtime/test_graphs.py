"""When steps are recorded and replayed, and that a replay computes what the step would have."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
import torch

from fxopt.runtime import graphs
from fxopt.runtime.graphs import MOST, REMEMBERED, Places, Replay
from support.recorded import FakeRecorder

CPU = torch.device("cpu")


def step(
    weight: torch.Tensor, cache: torch.Tensor, count: torch.Tensor, new: torch.Tensor, factor: int
) -> Any:
    """As a decoding step over a static cache: writes a row, and reads the rows that are there."""
    cache.index_copy_(0, count, (weight * new)[None])
    live = torch.arange(len(cache)) <= count
    count.add_(1)
    return (factor * torch.where(live[:, None], cache, 0).sum(0), count * 2, None)


class Request:
    """A cache, and the steps over it with and without replay."""

    def __init__(self, rows: int = 64) -> None:
        self.cache, self.count = torch.zeros(rows, 3), torch.zeros(1, dtype=torch.int64)
        self.twin = self.cache.clone(), self.count.clone()

    def check(self, replay: Any, weight: torch.Tensor, factor: int = 1) -> Sequence[Any]:
        new = torch.randn(3)
        found = replay(weight, self.cache, self.count, new, factor)
        wanted = step(weight, *self.twin, new.clone(), factor)
        assert torch.equal(found[0], wanted[0])
        assert torch.equal(found[1], wanted[1])
        assert found[2] is None
        assert torch.equal(self.cache, self.twin[0])
        assert torch.equal(self.count, self.twin[1])
        return found


def made(
    recorder: FakeRecorder | None, notes: list[str] | None = None, kind: type[Replay] = Replay
) -> Replay:
    places = Places(bound=(0, 1, 2), copied=(3,))
    return kind(step, places, CPU, recorder, (notes if notes is not None else []).append)


def test_recorded_once_and_replayed_while_it_grows() -> None:
    recorder = FakeRecorder()
    replay, request, weight = made(recorder), Request(), torch.randn(3)
    for _ in range(60):
        request.check(replay, weight)
    assert (replay.recordings, replay.replays, len(recorder.made)) == (1, 59, 1)
    assert recorder.made[0].replays == 59


def test_interleaved_requests_have_a_recording_each() -> None:
    replay, weight = made(FakeRecorder()), torch.randn(3)
    requests = [Request() for _ in range(4)]
    for _ in range(30):
        for request in requests:
            request.check(replay, weight)
    assert (replay.recordings, replay.replays) == (4, 4 * 29)


def test_results_are_the_callers_own() -> None:
    replay, request, weight = made(FakeRecorder()), Request(), torch.randn(3)
    kept = [request.check(replay, weight)[0] for _ in range(20)]
    copies = [each.clone() for each in kept]
    kept[-1].fill_(7)
    request.check(replay, weight)
    assert all(torch.equal(a, b) for a, b in zip(kept[:-1], copies[:-1], strict=True))


def test_another_number_is_another_recording() -> None:
    replay, request, weight = made(FakeRecorder()), Request(), torch.randn(3)
    for number in range(40):
        request.check(replay, weight, factor=2 + number % 2)
    assert replay.recordings == 2


def test_weights_that_moved() -> None:
    replay, request, weight = made(FakeRecorder()), Request(), torch.nn.Parameter(torch.randn(3))
    with torch.no_grad():
        for _ in range(5):
            request.check(replay, weight)
        before, weight.data = weight.data, torch.randn(3)
        for _ in range(5):
            request.check(replay, weight)
    assert replay.recordings == 2
    assert before.data_ptr() != weight.data_ptr()


def test_a_new_cache_where_an_older_one_was() -> None:
    """The recording of the older one fits: it has nothing of it but the addresses."""
    recorder = FakeRecorder()
    replay, weight = made(recorder), torch.randn(3)
    memory = torch.zeros(64, 3), torch.zeros(1, dtype=torch.int64)
    for _ in range(3):
        request = Request()
        request.cache, request.count = memory[0].zero_().view(64, 3), memory[1].zero_().view(1)
        for _ in range(20):
            request.check(replay, weight)
    assert (replay.recordings, replay.replays) == (1, 59)


def test_recordings_are_bounded() -> None:
    recorder = FakeRecorder()
    replay, weight = made(recorder), torch.randn(3)
    alive = []
    for _ in range(3 * MOST):
        alive.append(Request())
        for _ in range(20):
            alive[-1].check(replay, weight)
    assert replay.recordings == 3 * MOST
    assert len(replay) == MOST
    for request in alive[:2]:  # their recordings were given up
        request.check(replay, weight)


def test_caches_that_do_not_last_are_not_recorded() -> None:
    """As in beam search, where each step has a new cache."""
    replay, weight = made(FakeRecorder()), torch.randn(3)
    alive = [Request() for _ in range(2 * REMEMBERED)]
    for request in alive:
        request.check(replay, weight)
    assert replay.recordings == 0
    assert len(replay._seen) == REMEMBERED


def test_recording_stops_where_it_does_not_pay() -> None:
    replay, weight = made(FakeRecorder()), torch.randn(3)
    alive = [Request() for _ in range(4 * MOST)]
    for request in alive:
        for _ in range(3):
            request.check(replay, weight)
    assert replay.recordings < 2 * MOST


def test_inputs_of_inference_mode() -> None:
    replay, request, weight = made(FakeRecorder()), Request(), torch.randn(3)
    for _ in range(3):
        with torch.inference_mode():
            request.check(replay, weight)
        request.check(replay, weight)
    assert replay.replays == 5


@pytest.mark.parametrize("fault", [RuntimeError("operation not permitted when stream is capturing")])
def test_what_cannot_be_recorded_runs_without(fault: Exception) -> None:
    notes: list[str] = []
    replay, request, weight = made(FakeRecorder(fault=fault), notes), Request(), torch.randn(3)
    for _ in range(6):
        request.check(replay, weight)
    assert notes == ["RuntimeError: operation not permitted when stream is capturing"]
    assert (replay.recordings, replay.replays) == (0, 0)


def test_inside_of_somebody_elses_recording() -> None:
    recorder = FakeRecorder(busy=True)
    replay, request, weight = made(recorder), Request(), torch.randn(3)
    for _ in range(4):
        request.check(replay, weight)
    assert not recorder.made
    recorder.busy = False
    for _ in range(4):
        request.check(replay, weight)
    assert replay.recordings == 1


def test_without_a_recorder() -> None:
    replay, request = made(None), Request()
    for _ in range(4):
        request.check(replay, torch.randn(3))


@pytest.mark.parametrize(
    ("results", "reason"),
    [
        (lambda x, y: (x,), "shares memory"),
        (lambda x, y: (x + 1, y[1:]), "shares memory"),
        (lambda x, y: (lambda z: (z, z[:1]))(x + 1), "shares memory"),
        (lambda x, y: ((x + 1)[:1].expand(5),), "without entries that share memory"),
        (lambda x, y: (torch.empty(2, device="meta"),), "wanted results on cpu"),
    ],
)
def test_results_that_cannot_be_copied(results: Any, reason: str) -> None:
    notes: list[str] = []
    replay = Replay(results, Places(bound=(1,), copied=(0,)), CPU, FakeRecorder(), notes.append)
    x, y = torch.randn(4), torch.randn(4)
    for _ in range(3):
        replay(x, y)
    assert len(notes) == 1
    assert reason in notes[0]


def test_inputs_elsewhere() -> None:
    notes: list[str] = []
    replay = Replay(lambda x, y: (y + 1,), Places((1,), (0,)), CPU, FakeRecorder(), notes.append)
    x, y = torch.empty(3, device="meta"), torch.ones(3)
    for _ in range(3):
        replay(x, y)
    assert notes == ["wanted all inputs on cpu, saw one on meta"]


def test_inputs_that_are_taken_larger() -> None:
    """What is behind their entries is 0 at first, and of no meaning later."""
    recorder = FakeRecorder()
    replay = Replay(lambda x, y: (x.sum() + y.sum(),), Places((1,), (0,)), CPU, recorder, [].append)
    x, y = torch.ones(2, 3), torch.zeros(4)
    for _ in range(4):
        assert replay.run([x, y], {0: (2, 8)})[0] == 6
    assert recorder.made[0].inputs[0].size == (2, 8)


class WithoutAddresses(Replay):
    def _key(self, inputs: Sequence[Any]) -> Any:
        return super()._key(inputs)[len(self.places.bound) :]


class WithoutNumbers(Replay):
    def _key(self, inputs: Sequence[Any]) -> Any:
        return super()._key(inputs)[: len(self.places.bound)]


FAULTS = {
    "stale addresses": (WithoutAddresses, {}),
    "stale numbers": (WithoutNumbers, {}),
    "inputs that are not copied": (Replay, {"_fill": lambda copy, given: None}),
    "results that are not copied": (Replay, {"_own": lambda result: result}),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_faults_are_seen(fault: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The tests above would not pass without what they are about."""
    kind, patches = FAULTS[fault]
    for name, patch in patches.items():
        monkeypatch.setattr(graphs, name, patch)
    replay, requests, weight = made(FakeRecorder(), kind=kind), [Request(), Request()], torch.randn(3)
    with pytest.raises(AssertionError):
        results = []
        for number in range(12):
            results.append(requests[number % 2].check(replay, weight, 1 + number // 6))
            copies = [each[0].clone() for each in results]
            requests[0].check(replay, weight, 1 + number // 6)
            assert all(torch.equal(a[0], b) for a, b in zip(results, copies, strict=True))
