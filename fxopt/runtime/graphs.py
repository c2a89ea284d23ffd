"""Decoding steps that are launched as a whole: what a compiled graph does is recorded once and replayed.

A recording, such as a CUDA graph, repeats what was launched: at the same addresses, with the numbers that
the host had at the time. So of the inputs of a compiled graph

- what differs from step to step is small, and is copied to where the recording reads it;
- weights and caches are read and written where they are: for other addresses there is another recording, of
  which a few are kept. A new cache of the size of an older one often gets the memory that that one had; then
  its recording fits, as nothing else is left of the older one in it;
- numbers belong to a recording like addresses. One that grows has to be on the device
  (`fxopt.runtime.device_lengths`).

**Steps run exactly once.** Recording does not execute. The first step with some addresses runs as it is, and
warms up what has to be; the second is recorded, and replayed. A cache that is new at each step, as in beam
search, is never recorded.

**What comes out is the caller's own.** The results of a recording are overwritten by its next replay, and may
be by that of another one, as they share the memory of what is between. They are copied at once.

What a recording is stays behind `Recorder`: `fxopt.runtime.cuda_graphs`, or what a test puts there.
"""

from __future__ import annotations

import logging
from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any, Protocol

import torch

log = logging.getLogger("fxopt")

# Recordings of one graph, and how many sets of addresses that were seen once are remembered.
MOST, REMEMBERED = 8, 64
# Recording takes as long as some tens of steps. Behind the first `MOST`, each has to have had so many
# replays.
REPLAYS = 16


class Recording(Protocol):
    """What was launched once."""

    def replay(self) -> None:
        """Launch it again, on the current stream."""


class Recorder(Protocol):
    """Makes recordings for one device."""

    def turn(self) -> AbstractContextManager[None]:
        """Inside, nobody else records or replays, and what was launched in the turn before is waited for."""

    def is_busy(self) -> bool:
        """Somebody is recording already what is launched now."""

    def record(self, function: Callable[..., Any], inputs: Sequence[Any]) -> tuple[Recording, Sequence[Any]]:
        """What ``function(*inputs)`` launches, without executing it, and where it puts its results.

        Raises: what stands against it.
        """


@dataclass(frozen=True)
class Places:
    """Which inputs of a graph are tensors: `bound` are read where they are, `copied` are copied first."""

    bound: tuple[int, ...]
    copied: tuple[int, ...]


@dataclass
class _Kept:
    """A recording, the inputs that it reads copies of, and its results."""

    recording: Recording
    inputs: dict[int, torch.Tensor]
    results: Sequence[Any]


class Refused(Exception):  # noqa: N818 - becomes evidence
    """Why a graph cannot be recorded."""


class Replay:
    """A compiled graph that is recorded where its inputs come back at the same addresses.

    Attributes:
        recordings, replays: how many there were; for tests and reports.
        refused: why nothing is recorded any more; None while it is.
    """

    def __init__(
        self,
        compiled: Callable[..., Any],
        places: Places,
        device: torch.device,
        recorder: Recorder | None,
        note: Callable[[str], None],
    ) -> None:
        """As it is on the way to Dynamo.

        Args:
            compiled: the graph. places: of its inputs. device: of all of them.
            recorder: None if nothing is to be recorded.
            note: is told why nothing is recorded any more.
        """
        self.compiled, self.places, self.device = compiled, places, device
        self.recordings = self.replays = 0
        self.refused: str | None = None
        self._recorder, self._note = recorder, note
        self._kept: OrderedDict[Any, _Kept] = OrderedDict()
        self._seen: OrderedDict[Any, None] = OrderedDict()
        self._copies: OrderedDict[Any, torch.Tensor] = OrderedDict()

    def __call__(self, *inputs: Any) -> Any:
        return self.run(inputs, {})

    def __len__(self) -> int:
        """How many recordings are kept."""
        return len(self._kept)

    def run(self, inputs: Sequence[Any], sizes: Mapping[int, Sequence[int]]) -> Any:
        """The results of the graph.

        Args:
            inputs: of the graph.
            sizes: of the copies of inputs that the graph takes larger than they are, or on another device.
        """
        if self._recorder is None or self.refused is not None:
            return self._plain(inputs, sizes)
        with self._recorder.turn():
            if self._recorder.is_busy():
                return self._plain(inputs, sizes)
            key = self._key(inputs)
            kept = self._kept.get(key) or self._recorded(key, inputs, sizes)
            if kept is None:
                return self._plain(inputs, sizes)
            self._kept.move_to_end(key)
            for place, copy in kept.inputs.items():
                _fill(copy, inputs[place])
            kept.recording.replay()
            self.replays += 1
            return tuple(map(_own, kept.results))

    def _plain(self, inputs: Sequence[Any], sizes: Mapping[int, Sequence[int]]) -> Any:
        given = list(inputs)
        for place, size in sizes.items():
            given[place] = self._made(inputs[place], size)
            _fill(given[place], inputs[place])
        return self.compiled(*given)

    def _made(self, given: torch.Tensor, size: Sequence[int] | None) -> torch.Tensor:
        """Memory for a copy of `given`, in the form of that one unless another `size` is asked for."""
        with torch.inference_mode(False), torch.no_grad():
            if size is not None:
                return torch.zeros(tuple(size), dtype=given.dtype, device=self.device)
            return torch.empty_strided(given.shape, given.stride(), dtype=given.dtype, device=self.device)

    def _key(self, inputs: Sequence[Any]) -> Any:
        """What a recording fits. Sizes and strides are known: Dynamo guards on them, or they are inputs."""
        addresses = [inputs[place].data_ptr() for place in self.places.bound]
        return (*addresses, *(value for value in inputs if not isinstance(value, torch.Tensor)))

    def _recorded(self, key: Any, inputs: Sequence[Any], sizes: Mapping[int, Sequence[int]]) -> _Kept | None:
        """A new recording; None where there shall be none, now or at all."""
        if key not in self._seen:
            self._seen[key] = None
            if len(self._seen) > REMEMBERED:
                self._seen.popitem(last=False)
            return None
        if self.recordings >= MOST + self.replays // REPLAYS:
            return None
        try:
            kept = self._record(inputs, sizes)
        except Exception as error:
            self.refused = str(error) if isinstance(error, Refused) else f"{type(error).__name__}: {error}"
            self._kept.clear()
            self._note(self.refused)
            return None
        self.recordings += 1
        while len(self._kept) >= MOST:
            self._kept.popitem(last=False)
        self._kept[key] = kept
        return kept

    def _record(self, inputs: Sequence[Any], sizes: Mapping[int, Sequence[int]]) -> _Kept:
        assert self._recorder is not None
        given = list(inputs)
        for place, value in enumerate(inputs):
            if isinstance(value, torch.Tensor) and place not in sizes and value.device != self.device:
                raise Refused(f"wanted all inputs on {self.device}, saw one on {value.device}")
        for place in self.places.copied:
            given[place] = self._copy_of(place, inputs[place], sizes.get(place))
            _fill(given[place], inputs[place])
        recording, results = self._recorder.record(self.compiled, given)
        _check(results, [value for value in given if isinstance(value, torch.Tensor)], self.device)
        return _Kept(recording, {place: given[place] for place in self.places.copied}, results)

    def _copy_of(self, place: int, given: torch.Tensor, size: Sequence[int] | None) -> torch.Tensor:
        """Memory for a copy that recordings share: they never run at the same time."""
        key = place, _form(given, size)
        if key not in self._copies:
            self._copies[key] = self._made(given, size)
            if len(self._copies) > REMEMBERED:
                self._copies.popitem(last=False)
        return self._copies[key]


def _form(tensor: torch.Tensor, size: Sequence[int] | None = None) -> tuple[Any, ...]:
    return (tensor.shape, tensor.stride()) if size is None else tuple(size)


def _fill(copy: torch.Tensor, given: torch.Tensor) -> None:
    """What is behind the entries of `given` in a larger copy stays: nobody looks at it."""
    for dim, size in enumerate(given.shape):
        if size != copy.shape[dim]:
            copy = copy.narrow(dim, 0, size)
    copy.copy_(given, non_blocking=True)


def _own(result: Any) -> Any:
    if not isinstance(result, torch.Tensor):
        return result
    own = torch.empty_strided(result.shape, result.stride(), dtype=result.dtype, device=result.device)
    return own.copy_(result)


def _check(results: Sequence[Any], inputs: Sequence[torch.Tensor], device: torch.device) -> None:
    """Raises Refused: the caller cannot be given copies of the results."""
    taken = {tensor.untyped_storage().data_ptr() for tensor in inputs}
    for result in results:
        if not isinstance(result, torch.Tensor):
            continue
        address = result.untyped_storage().data_ptr()
        if address in taken:
            raise Refused("wanted results of their own, saw one that shares memory with another, or an input")
        if result.device != device or torch._debug_has_internal_overlap(result) != 0:
            raise Refused(f"wanted results on {device} without entries that share memory")
        taken.add(address)
