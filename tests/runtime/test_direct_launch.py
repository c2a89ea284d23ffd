"""Launches past Triton's binder: the same binary with the same arguments as Triton would launch."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest
import torch
from triton import knobs

from benchmarks.stub_driver import StubDriver, stubbed
from fxopt.ir.target import Target
from fxopt.runtime import direct_launch
from fxopt.runtime.direct_launch import DirectLaunch
from fxopt.runtime.kernel_cache import KernelCache
from fxopt.runtime.launch import as_op
from support import kernels

GRID, FUNCTION = slice(0, 3), 4


@pytest.fixture
def driver() -> Iterator[StubDriver]:
    with stubbed(Target.named("sm_90")) as stub:
        yield stub


@pytest.fixture
def launch(tmp_path: Path, driver: StubDriver) -> DirectLaunch:
    kernel = kernels.add("float32")
    return DirectLaunch(KernelCache(tmp_path).load(kernel)._add_kernel, kernel.launches[0])


def given(n: Any = 4096, at: int = 0, dtype: torch.dtype = torch.float32) -> dict[str, Any]:
    """Arguments as the file gives them; tensors begin `at` elements behind an aligned address."""
    tensors = [torch.empty(8192, dtype=dtype)[at:] for _ in range(3)]
    names = ("x_ptr", "y_ptr", "out_ptr")
    return dict(zip(names, tensors, strict=True)) | {"n": n, "BLOCK": 128, "num_warps": 4, "num_stages": 3}


def last(driver: StubDriver) -> tuple[Any, ...]:
    return driver.launched[-1]


def triton_was_asked(launch: DirectLaunch, arguments: dict[str, Any]) -> bool:
    with patch.object(launch.function, "run", wraps=launch.function.run) as run:
        launch[(7,)](**arguments)
    return bool(run.called)


KINDS = [
    given(4096),
    given(4096),
    given(1),
    given(17),
    given(1),
    given(16),
    given(0),
    given(-3),
    given(1 << 40),
    given(4096, at=1),
    given(4096, at=4),
    given(17, at=3),
    given(4096, dtype=torch.bfloat16),
    given(4096, dtype=torch.float16, at=1),
    given(4096),
]


def test_every_launch_is_tritons(launch: DirectLaunch, driver: StubDriver) -> None:
    for arguments in KINDS * 2:
        launch[(7, 3)](**arguments)
        ours = last(driver)
        launch.function[(7, 3)](**arguments)
        theirs = last(driver)
        assert ours[FUNCTION] == theirs[FUNCTION]
        assert ours[GRID] == theirs[GRID] == (7, 3, 1)
        assert all(a is b or a == b for a, b in zip(ours[9:], theirs[9:], strict=True))


def test_arguments_come_in_the_order_of_the_functions_parameters(tmp_path: Path, driver: StubDriver) -> None:
    """A file names what it gives, in any order."""
    kernel = kernels.add("float32")
    (first,) = kernel.launches
    turned = replace(first, arguments=first.arguments[::-1])
    launch = DirectLaunch(KernelCache(tmp_path).load(kernel)._add_kernel, turned)
    arguments = given()
    arguments = {name: arguments[name] for name in ("n", "out_ptr", "y_ptr", "x_ptr", *list(arguments)[4:])}
    launch[(7,)](**arguments)
    assert not triton_was_asked(launch, arguments)
    ours = last(driver)
    launch.function[(7,)](**arguments)
    assert all(a is b or a == b for a, b in zip(ours[9:], last(driver)[9:], strict=True))


def test_the_second_launch_of_a_kind_is_direct(launch: DirectLaunch) -> None:
    assert triton_was_asked(launch, given(4096))
    assert not triton_was_asked(launch, given(4096))
    assert not triton_was_asked(launch, given(32)), "divisible by 16, as the first"
    assert triton_was_asked(launch, given(33))
    assert not triton_was_asked(launch, given(35))


def test_what_is_not_aligned_is_another_binary(launch: DirectLaunch, driver: StubDriver) -> None:
    found = []
    for at in (0, 0, 1, 1):
        launch[(7,)](**given(at=at))
        found.append(last(driver)[FUNCTION])
    aligned, unaligned = found[1], found[3]
    assert aligned != unaligned
    compiled = {one.function: one.asm["ttir"] for one in launch._compiled.values()}
    assert re.search(r"%x_ptr: !tt\.ptr<f32> \{tt\.divisibility = 16", compiled[aligned])


def test_a_check_without_alignment_is_seen(launch: DirectLaunch, driver: StubDriver) -> None:
    """The test above can fail."""
    with patch.object(direct_launch, "_ALIGNMENT", 0):
        launch[(7,)](**given())
        launch[(7,)](**given(at=1))
        wrong = last(driver)[FUNCTION]
    launch[(7,)](**given(at=1))
    assert wrong != last(driver)[FUNCTION]


def test_hooks_see_every_launch(launch: DirectLaunch) -> None:
    launch[(7,)](**given())
    seen = []
    hook = knobs.runtime.launch_enter_hook
    if not hasattr(hook, "add"):  # before Triton had chains of hooks
        with patch.object(knobs.runtime, "launch_enter_hook", seen.append):
            assert triton_was_asked(launch, given())
        return
    hook.add(seen.append)
    try:
        assert triton_was_asked(launch, given())
    finally:
        hook.remove(seen.append)
    assert not triton_was_asked(launch, given())


@pytest.mark.parametrize("value", [True, 1.0, torch.tensor(4)])
def test_other_arguments_go_through_triton(launch: DirectLaunch, value: Any) -> None:
    assert launch._key(0, tuple(given(value).values())) is None


def test_an_op_outside_of_graphs_is_launched_directly(tmp_path: Path, driver: StubDriver) -> None:
    op = as_op(replace(kernels.softmax("float16"), name="rows_alone"), cache=KernelCache(tmp_path))
    x = torch.zeros(3, 64, dtype=torch.float16)
    with patch.object(DirectLaunch, "run", autospec=True, side_effect=DirectLaunch.run) as run:
        assert op(x).shape == x.shape
        assert op(x).shape == x.shape
    assert run.call_count == 2
    assert len(driver.launched) == 2
    assert last(driver)[0] == 3
