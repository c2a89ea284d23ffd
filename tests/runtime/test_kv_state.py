"""Buffers of growing caches: when rows are written in place and when copied, and who owns the memory."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import nullcontext
from typing import Any

import pytest
import torch

from fxopt.runtime.kv_state import LEAST, MOST, KVState, capacity_for, expected_length

MODES = {"no_grad": torch.no_grad, "inference_mode": torch.inference_mode, "grad mode": nullcontext}


@pytest.fixture(params=MODES)
def mode(request: pytest.FixtureRequest) -> Iterator[None]:
    with MODES[request.param]():
        yield


def extended(state: KVState, past: torch.Tensor, dim: int = 2, new: int = 1, **how: Any) -> torch.Tensor:
    """`past` with rows of its own number behind it."""
    rows = past.shape[dim]
    grown = state.extend(past, dim, new, **({"alone": True} | how))
    grown.narrow(dim, rows, new).fill_(7)
    return grown


@pytest.mark.parametrize("dim", [0, 1, 2, 3])
def test_contents_and_strides(mode: None, dim: int) -> None:
    state, first = KVState(), torch.randn(2, 3, 5, 4)
    grown = extended(state, state.begin(first, dim), dim, 2)
    assert torch.equal(grown.narrow(dim, 0, first.shape[dim]), first)
    assert (grown.narrow(dim, first.shape[dim], 2) == 7).all()
    # The stride of a row does not depend on how many there are: guards on strides hold while the cache grows.
    assert grown.stride(dim) == first.numel() // first.shape[dim]
    assert (state.in_place, state.copied) == (1, 0)


def test_memory_stays_where_it_is(mode: None) -> None:
    state = KVState()
    view = state.begin(torch.randn(2, 3, 5, 4), 2)
    place = view.data_ptr()
    for _ in range(LEAST // 2):
        view = extended(state, view)
    assert view.data_ptr() == place
    assert state.copied == 0


@pytest.mark.parametrize("held", ["view", "slice", "detached", "numpy", "storage"])
def test_what_somebody_else_holds_is_copied(mode: None, held: str) -> None:
    state = KVState()
    view = state.begin(torch.randn(2, 3, 5, 4), 2)
    others = {
        "view": lambda: extended(state, view),  # a longer view of the same rows
        "slice": lambda: view[:, :, 1:3],
        "detached": lambda: view.detach(),
        "numpy": lambda: view.numpy(),
        "storage": lambda: view.untyped_storage(),
    }
    other = others[held]()
    before = state.in_place
    grown = extended(state, view)
    assert state.in_place == before
    grown[..., 0, :] = 99
    assert not (view[..., 0, :] == 99).any()
    del other, grown
    extended(state, view)
    assert state.in_place == before + 1, "nobody holds it any more"


def test_an_object_that_others_hold_is_copied(mode: None) -> None:
    state = KVState()
    view = state.begin(torch.randn(2, 3, 5, 4), 2)
    extended(state, view, alone=False)
    assert (state.in_place, state.copied) == (0, 1)


def test_rewinding_is_in_place(mode: None) -> None:
    """As assisted decoding does: some of the newest rows are dropped, and others written."""
    state = KVState()
    view = state.begin(torch.randn(2, 3, 5, 4), 2)
    want = view[:, :, :3].clone()
    view = view[:, :, :3]
    grown = extended(state, view)
    assert (state.in_place, state.copied) == (1, 0)
    assert torch.equal(grown[:, :, :3], want)


def test_rewinding_what_somebody_else_holds_copies(mode: None) -> None:
    """As caches that share their tensors do, when one of them is cropped: the other's hold no memory of their
    own, they are what the first one's are views of."""
    state = KVState()
    whole = state.begin(torch.randn(2, 3, 5, 4), 2)
    want = whole.clone()
    view = whole[:, :, :3]
    extended(state, view)
    assert (state.in_place, state.copied) == (0, 1)
    assert torch.equal(whole, want)
    del whole
    extended(state, view)
    assert state.in_place == 1, "nobody holds it any more"


def test_a_window_moves_through_the_buffer(mode: None) -> None:
    state = KVState()
    window = state.begin(torch.randn(1, 2, 8, 4), 2, bounded=True)
    want = window.clone()
    for number in range(3 * LEAST):
        new = torch.full((1, 2, 1, 4), float(number))
        grown = state.extend(window, 2, 1, alone=True, bounded=True)
        grown[:, :, -1:] = new
        want = torch.cat([want, new], 2)[:, :, 1:]
        window = grown[:, :, 1:]
        del grown
        assert torch.equal(window, want)
    assert state.copied <= 6, "only where the end of a buffer was reached"


def test_what_is_no_run_of_rows_is_copied(mode: None) -> None:
    for change in (
        lambda t: t[:, :1], lambda t: t[..., :2], lambda t: t.mT, lambda t: t[:, :, ::2], lambda t: t.clone(),
        lambda t: t.view(torch.int32),
    ):  # fmt: skip
        state = KVState()
        view = change(state.begin(torch.randn(2, 3, 4, 4), 2))
        assert torch.equal(extended(state, view)[:, :, : view.shape[2]], view)
        assert (state.in_place, state.copied) == (0, 1)


def test_tensors_of_inference_mode_are_copied_outside_of_it() -> None:
    """They cannot be written there."""
    state = KVState()
    with torch.inference_mode():
        view = state.begin(torch.randn(2, 3, 5, 4), 2)
    assert not extended(state, view).is_inference()
    assert state.copied == 1


def test_memory_goes_with_the_last_view(mode: None) -> None:
    state = KVState()
    view = state.begin(torch.randn(2, 3, 5, 4), 2)
    part = view[:, :, :2]
    del view
    assert len(state) == 1, "a slice is left"
    del part
    assert len(state) == 0


def test_capacity() -> None:
    for rows in (1, 100, 1000, 4096, 100_000):
        room = capacity_for(rows) - rows
        assert 3 / 4 * LEAST <= room <= max(rows / 4, LEAST)
        assert room <= MOST
        assert capacity_for(rows, 0.0) <= capacity_for(rows, 1.0)
    with expected_length(5000):
        assert capacity_for(4000) == 5000
        assert capacity_for(6000) > 6000
        assert capacity_for(100) == 200 + MOST, "it may never become so long"
        assert capacity_for(100, bounded=True) == 100 + LEAST


def test_copying_is_rare() -> None:
    state = KVState()
    with torch.no_grad():
        view = state.begin(torch.zeros(1, 1, 1, 1), 2)
        for _ in range(4000):
            view = extended(state, view)
    assert state.in_place >= 0.99 * 4000
