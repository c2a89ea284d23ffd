"""What is measured, in which order, what is kept of it, and what is decided: with a timer that is made up."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import pytest

from fxopt.codegen.configurations import configuration
from fxopt.codegen.emit import Decision
from fxopt.codegen.kernel_file import KernelFile
from fxopt.codegen.tune import Budget, CannotMeasure, Samples, Tuner
from fxopt.ir.target import Target
from fxopt.runtime.kernel_cache import KernelCache
from support import kernels

US = 1e-6


def adjustable(dtype: str = "bfloat16", extent: int = 4096) -> KernelFile:
    """A kernel with a tile that may be changed."""
    kernel = kernels.add(dtype)
    tile = {"constants": (("BLOCK", 1024),), "adjustable": (("BLOCK", extent),)}
    launches = tuple(replace(one, **tile) for one in kernel.launches)
    return replace(kernel, launches=launches, about=replace(kernel.about, seen=(1 << 26, 1 << 24)))


def steady(seconds: float) -> Samples:
    return Samples((seconds,) * 5)


@dataclass
class MadeUp:
    """Answers with `ours(kernel)` for a kernel and `host` for the host; counts what it was asked."""

    ours: Callable[[KernelFile], Samples] = lambda kernel: steady(10 * US)
    host: Samples = field(default_factory=lambda: steady(20 * US))
    wrong: frozenset[str] = frozenset()
    asked: list[KernelFile] = field(default_factory=list)
    device: str = "a card"

    def samples(self, kernels: Sequence[KernelFile]) -> list[Samples]:
        self.asked.append(kernels[0])
        return [*map(self.ours, kernels), self.host]

    def problems(self, kernel: KernelFile) -> list[str]:
        return ["result 0: 3 entries differ"] if configuration(kernel) in self.wrong else []


@pytest.fixture
def decide(tmp_path: Path) -> Callable[..., list[Decision]]:
    """Each call is a new process: what it knows of earlier ones is on the disk."""

    def run(
        timer: MadeUp,
        *given: KernelFile,
        budget: Budget | None = None,
        always: bool = False,
    ) -> list[Decision]:
        budget = budget or Budget(60.0)
        cache, target = KernelCache(tmp_path), Target.named("sm_90")
        return Tuner(cache, timer, target, budget, always, shown=False).decide(given or (adjustable(),))

    return run


Decider = Callable[..., list[Decision]]


def by_warps(warps: int) -> Callable[[KernelFile], Samples]:
    """Faster with that many warps than with others."""
    return lambda kernel: steady(5 * US if kernel.launches[0].num_warps == warps else 10 * US)


def test_the_fastest_configuration_is_used(decide: Decider) -> None:
    (found,) = decide(MadeUp(by_warps(8)))
    assert found.kernel is not None
    assert found.kernel.launches[0].num_warps == 8
    assert found.reason == "measured on a card: 5.0 us in the kernel, 20.0 us in TorchInductor"
    assert "measured on a card" in found.kernel.about.configuration[0]
    assert found.kernel.jit == adjustable().jit


def test_what_the_host_does_faster_is_left_to_it(decide: Decider) -> None:
    (found,) = decide(MadeUp(host=steady(9 * US)))
    assert found.kernel is None
    assert found.reason == "measured on a card: 10.0 us in the kernel, 9.0 us in TorchInductor, slower"


def test_a_tie_is_left_to_the_host(decide: Decider) -> None:
    (found,) = decide(MadeUp(host=steady(10 * US)))
    assert found.kernel is None


def test_a_difference_within_the_noise_is_no_gain(decide: Decider) -> None:
    ours, host = [8, 9, 10, 11, 12], [9, 10, 11, 12, 13]
    timer = MadeUp(lambda kernel: Samples(tuple(x * US for x in ours)), Samples(tuple(x * US for x in host)))
    (found,) = decide(timer)
    assert found.kernel is None
    assert "differs by less than the measurements vary" in found.reason


def test_one_sample_that_is_far_off_does_not_decide(decide: Decider) -> None:
    noisy = Samples((10 * US, 10 * US, 10 * US, 10 * US, 900 * US))
    (found,) = decide(MadeUp(lambda kernel: noisy))
    assert found.kernel is not None


def test_on_request_kernels_are_used_even_if_slower(decide: Decider) -> None:
    (found,) = decide(MadeUp(host=steady(9 * US)), always=True)
    assert found.kernel is not None
    assert found.reason.endswith("slower")


def test_nothing_is_measured_twice(decide: Decider) -> None:
    first, second = MadeUp(by_warps(8)), MadeUp(by_warps(2))
    before, after = decide(first), decide(second)
    assert len(first.asked) == 1
    assert second.asked == []
    assert before == after


def test_equal_kernels_are_measured_once(decide: Decider) -> None:
    timer = MadeUp()
    one, two = decide(timer, adjustable(), adjustable())
    assert len(timer.asked) == 1
    assert one == two


@pytest.mark.parametrize("other", ["dtype", "sizes", "device"])
def test_what_is_measured_holds_for(decide: Decider, other: str) -> None:
    decide(MadeUp())
    timer = MadeUp(device="another card" if other == "device" else "a card")
    changed = {"dtype": adjustable("float32"), "sizes": adjustable(extent=9000)}
    decide(timer, changed.get(other, adjustable()))
    assert len(timer.asked) == 1


def test_sizes_of_one_class_share_what_is_measured(decide: Decider) -> None:
    decide(MadeUp(), adjustable(extent=4000))
    timer = MadeUp()
    decide(timer, adjustable(extent=3000))
    assert timer.asked == []


def test_a_configuration_that_cannot_run_is_passed_over(decide: Decider) -> None:
    default = adjustable().launches[0].num_warps

    def ours(kernel: KernelFile) -> Samples:
        broken = kernel.launches[0].num_warps == default
        return Samples(error="OutOfResources: shared memory") if broken else steady(10 * US)

    (found,) = decide(MadeUp(ours))
    assert found.kernel is not None
    assert found.kernel.launches[0].num_warps != default


def test_a_configuration_that_computes_something_else_is_passed_over(decide: Decider) -> None:
    wrong = adjustable()
    fast = configuration(wrong)
    timer = MadeUp(lambda kernel: steady((1 if configuration(kernel) == fast else 10) * US), wrong={fast})
    (found,) = decide(timer)
    assert found.kernel is not None
    assert configuration(found.kernel) != fast


def test_a_region_without_a_kernel_that_runs_is_left_to_the_host(decide: Decider) -> None:
    (found,) = decide(MadeUp(lambda kernel: Samples(error="CompilationError: no")), always=True)
    assert found.kernel is None
    assert found.reason == "no configuration could be run on a card: CompilationError: no"


def test_without_a_figure_of_the_host_it_computes_the_region(decide: Decider) -> None:
    (found,) = decide(MadeUp(host=Samples(error="OutOfMemoryError: 2 GiB")))
    assert found.kernel is None
    assert "an error (OutOfMemoryError: 2 GiB) in TorchInductor, so that they cannot be" in found.reason


def ticking(seconds: float) -> Callable[[], float]:
    now = [0.0]

    def clock() -> float:
        now[0] += seconds
        return now[0]

    return clock


@pytest.mark.parametrize("always", [False, True])
def test_when_the_budget_is_spent_nothing_is_measured(decide: Decider, always: bool) -> None:
    given = [adjustable(), adjustable("float32"), adjustable("float16")]
    timer = MadeUp()
    found = decide(timer, *given, budget=Budget(5.0, ticking(3.0)), always=always)
    assert timer.asked == given[:1]
    assert [one.kernel for one in found[1:]] == (given[1:] if always else [None, None])
    assert found[2].reason == "not measured: the 5 s for measuring were spent"
    later = MadeUp()
    decide(later, *given)
    assert later.asked == given[1:], "and the next compilation goes on"


def test_a_process_that_is_killed_keeps_what_it_had_measured(decide: Decider) -> None:
    given = [adjustable(), adjustable("float32"), adjustable("float16")]

    def killed(kernel: KernelFile) -> Samples:
        if kernel.launches[0].arguments[0].type == "*fp32":
            raise KeyboardInterrupt
        return steady(10 * US)

    with pytest.raises(KeyboardInterrupt):
        decide(MadeUp(killed), *given)
    timer = MadeUp()
    decide(timer, *given)
    assert timer.asked == given[1:]


def test_what_could_not_be_measured_is_tried_again(decide: Decider) -> None:
    def full(kernel: KernelFile) -> Samples:
        raise CannotMeasure("OutOfMemoryError: 2 GiB")

    (found,) = decide(MadeUp(full))
    assert found == Decision(None, "not measured: OutOfMemoryError: 2 GiB")
    timer = MadeUp()
    (found,) = decide(timer)
    assert len(timer.asked) == 1
    assert found.kernel is not None


def two_forms() -> KernelFile:
    """A kernel and another that computes the same by other means."""
    kernel = adjustable()
    return replace(kernel, alternatives=(replace(kernel, jit=kernel.jit.replace("x * 1.5", "1.5 * x")),))


def test_another_form_is_used_where_it_is_faster_and_remembered(decide: Decider) -> None:
    def ours(kernel: KernelFile) -> Samples:
        return steady(5 * US if "1.5 * x" in kernel.jit else 10 * US)

    timer = MadeUp(ours)
    for _ in range(2):
        (found,) = decide(timer, two_forms())
        assert found.faster
        assert found.kernel is not None
        assert "1.5 * x" in found.kernel.jit
        assert found.kernel.alternatives == ()
    assert len(timer.asked) == 1


def test_kernels_with_other_forms_are_other_kernels(decide: Decider) -> None:
    timer = MadeUp()
    decide(timer, adjustable())
    decide(timer, two_forms())
    assert len(timer.asked) == 2


def test_a_kernel_that_is_used_although_it_is_slower_is_not_called_faster(decide: Decider) -> None:
    (found,) = decide(MadeUp(host=steady(9 * US)), always=True)
    assert found.kernel is not None
    assert not found.faster
