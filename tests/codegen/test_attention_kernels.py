"""Kernels of attention: against a plain one in Triton's interpreter, and compiled for GPUs not here."""

from __future__ import annotations

import contextlib
import itertools
import math
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch

from fxopt.codegen.attention_backward import backward_kernel
from fxopt.codegen.attention_backward import with_other_tiles as other_backward_tiles
from fxopt.codegen.attention_example import example_text
from fxopt.codegen.attention_kernel import forward_kernel
from fxopt.codegen.attention_kernel import with_other_tiles as other_forward_tiles
from fxopt.codegen.attention_learned import check_extents
from fxopt.codegen.fit import fitted
from fxopt.codegen.kernel_file import About
from fxopt.ir.linear import Unsupported
from fxopt.ir.target import Target
from support.attention_kernels import BATCH, CASES, COLUMNS, HEADS, ROWS, Case, operands_of, spec_of
from support.programs import findings

BIAS = torch.zeros(BATCH, HEADS, ROWS, COLUMNS, dtype=torch.bfloat16)
GPU_CASES = {
    "window": Case("k <= q and k > q - 1024", group=4),
    "soft cap": Case("k <= q and k > q - 1024", "50*tanh(s/50)", group=4),
    "padding": Case("k <= q and c0[b, k]", captures=CASES["left padding"].captures, dead="mean", group=4),
    "table": replace(CASES["learned table"], group=4),
    "indices": replace(CASES["learned table of indices"], group=4),
    "bias": replace(CASES["learned bias"], group=4),
    "mask": replace(CASES["opaque mask"], group=4),
    "opaque mask": replace(CASES["opaque mask"], group=1),
    "bias of windows": Case("True", "s + c0[b, h, q, k]", (BIAS,), group=1),
}
# Of every width and target some; each of them on some target.
WIDTHS = ((32, 32), (64, 64), (72, 72), (80, 80), (88, 88), (96, 96), (128, 128), (192, 128), (256, 256))
ARCHITECTURES = ("sm_80", "sm_90", "sm_100", "sm_120")
MORE_CASES = GPU_CASES | {
    name: replace(CASES[name], group=group)
    for name, group in (
        ("sinks and window", 8),
        ("documents", 4),
        ("prefix", 7),
        ("chunks", 1),
        ("dropout", 1),
        ("learned vectors", 4),
        ("left padding that replaces", 3),
        ("left padding of minus infinity", 1),
    )
}


def cells() -> Iterator[Any]:
    """(case, width of Q and K, of V, target): every width on every target, with one case after the other."""
    cases = itertools.cycle(sorted(MORE_CASES))
    for arch, (width, width_v) in itertools.product(ARCHITECTURES, WIDTHS):
        name = next(cases)
        yield pytest.param(name, width, width_v, arch, id=f"{arch}-{width}-{width_v}-{name}")


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    return findings("support.attention_kernels", tmp_path_factory.mktemp("kernels"))


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    return findings("support.attention_kernels", tmp_path_factory.mktemp("whole"), "whole")


def test_a_sample_of_variants_dtypes_and_directions(found: dict[str, Any]) -> None:
    assert len(found["cases"]) >= len(CASES) / 2
    assert {name: problem for name, problem in found["cases"].items() if problem} == {}


def test_faults_are_seen(found: dict[str, Any]) -> None:
    assert [name for name, problem in found["faults"].items() if not problem] == []


@pytest.mark.parametrize(("lines", "served"), [(6, True), (8, False)])
def test_all_entries_of_a_gradient_are_written(lines: int, served: bool) -> None:
    """A table with more lines than there are heads would have some that no program sums."""
    case = replace(CASES["learned table"], captures=(torch.zeros(lines, 320),))
    query, key, _ = operands_of(case, torch.float32)
    refused = contextlib.nullcontext() if served else pytest.raises(Unsupported, match="8 entries along h")
    with refused:
        check_extents(spec_of(case, torch.float32), case.learned, query, key, case.captures)


def test_programs_are_in_the_file() -> None:
    """A formula of the mask is an expression of the kernel, and no argument of it is a mask."""
    kernel = forward_kernel(spec_of(CASES["window"], torch.bfloat16), None, "")
    assert "return (k <= q) & (k > q + (-7))" in kernel.jit
    assert [one.name for one in kernel.parameters] == ["query", "key", "value"]


def test_a_training_step_runs_through_them(found: dict[str, Any]) -> None:
    one = found["models"]["training"]
    assert one["wrong"] == ""
    assert one["providers"] == ["triton"]
    assert one["kernels"] == ["attention_backward", "attention_forward"]


@pytest.mark.slow
@pytest.mark.parametrize("name", ["prefill", "prefill of any length"])
def test_a_prefill_runs_through_them(whole: dict[str, Any], name: str) -> None:
    one = whole["models"][name]
    assert one["wrong"] == ""
    assert one["providers"] == ["triton"]
    assert one["kernels"] == ["attention_forward"]


@pytest.mark.slow
def test_all_variants_dtypes_and_directions(whole: dict[str, Any]) -> None:
    assert len(whole["cases"]) == 6 * len(CASES)
    assert {name: problem for name, problem in whole["cases"].items() if problem} == {}


def problems(
    case: Case, width: int, arch: str, width_v: int = 0, dtype: torch.dtype = torch.bfloat16
) -> list[Any]:
    target = Target.named(arch)
    spec = spec_of(replace(case, width=width, width_v=width_v or width), dtype)
    spec = replace(spec, alignment=math.gcd(16, width, spec.width_v))
    example = example_text(spec, ())
    forward, backward = (
        forward_kernel(spec, target, example),
        backward_kernel(spec, case.learned, target, example),
    )
    kernels = (
        other_forward_tiles(forward, spec, target, About()),
        other_backward_tiles(backward, spec, case.learned, target, About()),
    )
    compiled = [one for _, launches in fitted(kernels, target) for one in launches]
    return [(one.entry, one.problems()) for one in compiled if one.problems()]


@pytest.mark.parametrize("arch", ["sm_90", "sm_120"])
def test_a_window_compiles_without_spills(arch: str) -> None:
    assert problems(GPU_CASES["window"], 64, arch) == []


@pytest.mark.slow
@pytest.mark.parametrize(("case", "width", "width_v", "arch"), cells())
def test_every_width_compiles_for_every_target(case: str, width: int, width_v: int, arch: str) -> None:
    assert problems(MORE_CASES[case], width, arch, width_v) == []


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_other_dtypes_compile(arch: str, dtype: torch.dtype) -> None:
    for width in (64, 128, 256):
        assert problems(GPU_CASES["window"], width, arch, dtype=dtype) == []


@pytest.mark.slow
@pytest.mark.parametrize("arch", ARCHITECTURES)
@pytest.mark.parametrize("width", [8, 64, 128])
@pytest.mark.parametrize("case", sorted(GPU_CASES))
def test_kernels_compile_without_spills(case: str, width: int, arch: str) -> None:
    assert problems(GPU_CASES[case], width, arch) == []
