"""Keys and values through tensor descriptors: where, that the result is the same, what it compiles to."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch._subclasses import FakeTensorMode
from torch.fx.experimental.symbolic_shapes import ShapeEnv

from fxopt.codegen.attention_descriptors import takes_descriptors, with_descriptors
from fxopt.codegen.attention_emit import spec_of
from fxopt.codegen.attention_example import MOST_SCORES, example_text
from fxopt.codegen.attention_kernel import forward_kernel
from fxopt.codegen.attention_spec import Spec
from fxopt.codegen.compile import compile_launches
from fxopt.codegen.configurations import proposals
from fxopt.codegen.emit import Decision, _fastest
from fxopt.codegen.kernel_file import About, KernelFile
from fxopt.codegen.tune import Budget, Samples, Tuner
from fxopt.ir.target import Target
from fxopt.runtime.kernel_cache import KernelCache
from support.programs import findings

HOPPER = Target.named("sm_90")


def meta(*shape: int, dtype: torch.dtype = torch.bfloat16) -> torch.Tensor:
    return torch.empty(shape, dtype=dtype, device="meta")


@pytest.mark.parametrize(
    "operand",
    [
        meta(2, 4, 100, 64),
        meta(2, 100, 4, 72).transpose(1, 2),
        meta(2, 100, 4, 192)[..., 64:128].transpose(1, 2),
        meta(2, 4, 100, 64, dtype=torch.float16),
    ],
    ids=["heads first", "heads last", "packed", "float16"],
)
def test_rows_at_multiples_of_16_bytes_take_them(operand: torch.Tensor) -> None:
    assert takes_descriptors(HOPPER, [operand])
    assert takes_descriptors(Target.named("sm_100"), [operand])


@pytest.mark.parametrize(
    "operand",
    [
        meta(2, 4, 100, 60),
        meta(2, 4, 100, 65)[..., :64],
        meta(2, 4, 100, 128)[..., 4:68],
        meta(2, 4, 64, 100).mT,
        meta(2, 4, 100, 64, dtype=torch.float32),
    ],
    ids=["narrow rows", "an odd stride", "a crooked start", "columns", "float32"],
)
def test_others_do_not(operand: torch.Tensor) -> None:
    assert not takes_descriptors(HOPPER, [meta(2, 4, 100, 64), operand])


@pytest.mark.parametrize("target", [None, Target.named("sm_80"), Target.named("sm_89")])
def test_older_targets_have_none(target: Target | None) -> None:
    assert not takes_descriptors(target, [meta(2, 4, 100, 64)])
    assert kernel(target).alternatives == ()


def test_a_length_that_is_not_known_is_a_multiple_of_rows() -> None:
    mode = FakeTensorMode(shape_env=ShapeEnv(), static_shapes=False)
    given = mode.from_tensor(torch.empty(2, 4, 100, 64, dtype=torch.bfloat16))
    assert isinstance(given.shape[2], torch.SymInt)
    rows = mode.from_tensor(torch.empty(2, 4, 64, 100, dtype=torch.bfloat16))
    assert isinstance(rows.shape[3], torch.SymInt)
    fixed = given.new_empty(given.shape[0], 4, given.shape[2], 64)
    assert takes_descriptors(HOPPER, [fixed])
    assert not takes_descriptors(HOPPER, [rows])


def operands(width: int = 64, rows: int = 4096) -> list[Any]:
    query, key, value = (meta(2, heads, rows, width) for heads in (16, 4, 4))
    return [query, key, value, None, None, [], []]


def spec(given: list[Any]) -> Spec:
    attributes = {"mask": "k <= q and k > q - 1024", "score": "", "scale": 0.125, "dead_rows": "zero"}
    return spec_of(given, attributes | {"stops": False, "stopped": (), "dropout_p": 0.0})


def kernel(target: Target | None, width: int = 64, rows: int = 4096) -> KernelFile:
    given = operands(width, rows)
    one, about = spec(given), About(seen=(1 << 26, 1 << 30))
    plain = forward_kernel(one, target, example_text(one, given), about)
    return with_descriptors(plain, one, target, about, given)


@pytest.mark.parametrize("width", [64, 128])
@pytest.mark.parametrize("arch", ["sm_90", "sm_100"])
def test_tiles_come_by_the_copy_engine(arch: str, width: int, tmp_path: Path) -> None:
    target = Target.named(arch)
    plain = kernel(target, width)
    (described,) = plain.alternatives
    assert plain.jit == described.jit
    found = compile_launches([(plain, 0), (described, 0)], target, cache=KernelCache(tmp_path))
    assert [one.problems() for one in found] == [(), ()]
    assert ["cp.async.bulk.tensor" in one.ptx for one in found] == [False, True]
    assert "cp.async.cg.shared.global" in found[0].ptx
    assert "cp.async.cg.shared.global" not in found[1].ptx


def test_the_same_numbers(tmp_path: Path) -> None:
    found = findings("support.described_attention", tmp_path)
    assert len(found["described"]) >= 6
    assert {name: problem for name, problem in found["described"].items() if problem} == {}
    assert found["fault"], "the check cannot fail"


@pytest.mark.slow
def test_the_same_numbers_of_all_variants(tmp_path: Path) -> None:
    found = findings("support.described_attention", tmp_path, "whole")
    assert len(found["described"]) >= 60
    assert {name: problem for name, problem in found["described"].items() if problem} == {}


def specialized(one: KernelFile, warps: int) -> KernelFile:
    """With a loop over keys whose loads and products are to get warps of their own."""
    parts = one.jit.split("def attend(")
    asked = parts[1].replace("BLOCK_N):\n", "BLOCK_N, warp_specialize=True):\n", 1)
    launch = replace(one.launches[0], num_warps=warps)
    return replace(one, jit=f"{parts[0]}def attend({asked}", launches=(launch,))


@pytest.mark.slow
@pytest.mark.parametrize(("arch", "warps", "offered"), [("sm_90", 8, False), ("sm_100", 4, True)])
def test_triton_has_no_specialized_warps_worth_measuring(
    arch: str, warps: int, offered: bool, tmp_path: Path
) -> None:
    """Once this fails they are a candidate: for sm_90 Triton leaves the loop alone, for sm_100 it spills."""
    target = Target.named(arch)
    (described,) = kernel(target).alternatives
    asked = specialized(described, warps)
    assert "warp_specialize=True" in asked.jit
    (found,) = compile_launches([(asked, 0)], target, cache=KernelCache(tmp_path))
    assert ("setmaxnreg" in found.ptx) is offered
    assert bool(found.problems()) is offered


def test_memory_for_descriptors_is_allocated_in_the_thread_that_launches() -> None:
    plain = kernel(HOPPER)
    (described,) = plain.alternatives
    assert "set_allocator" not in plain.render()
    launch = described.render().split("def launch(")[1].split("\ndef ")[0]
    assert launch.index("device = query.device") < launch.index("triton.set_allocator(")
    assert launch.index("triton.set_allocator(") < launch.index("_attention_forward_kernel[")


def test_they_are_one_more_candidate() -> None:
    plain = kernel(HOPPER)
    assert proposals(plain, HOPPER) == [plain, *plain.alternatives]
    assert not plain.describes
    assert plain.alternatives[0].describes


def timed(plain: float, described: float) -> Callable[[KernelFile], Samples]:
    return lambda one: Samples((described if one.describes else plain,) * 5)


@pytest.mark.parametrize(("seconds", "wins"), [((2e-5, 1e-5), True), ((1e-5, 2e-5), False)])
def test_what_was_measured_decides(seconds: tuple[float, float], wins: bool, tmp_path: Path) -> None:
    class Timer:
        device = "a card"
        asked = 0

        def samples(self, kernels: list[KernelFile]) -> list[Samples]:
            Timer.asked += 1
            return [*map(timed(*seconds), kernels), Samples((3e-5,) * 5)]

        def problems(self, kernel: KernelFile) -> list[str]:
            return []

    plain = kernel(HOPPER)
    tuner = Tuner(KernelCache(tmp_path), Timer(), HOPPER, Budget(60.0), always=True, shown=False)
    for _ in range(2):
        found = _fastest(plain, tuner.decide)
        assert found.describes is wins
        assert replace(found, about=plain.about) == replace(
            plain.alternatives[0] if wins else plain, about=plain.about, alternatives=()
        )
        assert found.about.configuration[:-1] == plain.about.configuration
        assert "measured on a card: 10.0 us in the kernel" in found.about.configuration[-1]
    _fastest(kernel(HOPPER, rows=16384), tuner.decide)
    assert Timer.asked == 1, "of the same class of sizes, as the numbers in `about` have it"
    longer = replace(plain, about=replace(plain.about, seen=(1 << 30, 1 << 36)))
    _fastest(longer, tuner.decide)
    assert Timer.asked == 2


def test_unmeasured_they_are_not_used() -> None:
    plain = kernel(HOPPER)
    assert _fastest(plain, None) is plain
    found = _fastest(plain, lambda kernels: [Decision(one, "not measured: no time") for one in kernels])
    assert not found.describes
    found = _fastest(plain, lambda kernels: [Decision(None, "no configuration could be run")])
    assert not found.describes


@pytest.mark.parametrize(("rows", "batch", "heads"), [(4096, 2, 16), (16384, 1, 4), (1 << 17, 1, 4)])
def test_examples_of_long_sequences_have_fewer_heads(rows: int, batch: int, heads: int) -> None:
    given = operands(rows=rows)
    text = example_text(spec(given), given)
    assert f"query = torch.randn(({batch}, {heads}, {rows}, 64)" in text
    assert f"key = torch.randn(({batch}, {heads // 4}, {rows}, 64)" in text
    assert batch * heads * rows * rows <= MOST_SCORES or (batch, heads) == (1, 4)
