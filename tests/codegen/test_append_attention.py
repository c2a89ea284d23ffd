"""Rotary embedding, append and attention in one kernel: numerics, what is written, faults, targets."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from fxopt.codegen.append_attention import AppendProblem, append_kernel
from fxopt.codegen.compile import compile_launches
from fxopt.codegen.fit import fitted
from fxopt.ir.linear import Unsupported
from fxopt.ir.program import MaskProgram, ScoreProgram
from fxopt.ir.target import Target
from fxopt.runtime.kernel_cache import KernelCache
from support.programs import findings


def run(*arguments: object) -> Any:
    return findings("support.appending", *arguments)


def test_numerics_and_what_is_written(tmp_path: Path) -> None:
    found = run(tmp_path, "numerics")
    assert {name: problems for name, problems in found.items() if problems} == {}


def test_faults_are_seen(tmp_path: Path) -> None:
    found = run(tmp_path, "faults")
    assert found.pop("none") is False
    assert all(found.values()), found


def test_the_cache_is_read_up_to_its_length(tmp_path: Path) -> None:
    assert all(read == least for read, least in run(tmp_path, "traffic").values())


def problem(width: int, group: int, queries: int, dead_rows: str = "zero") -> AppendProblem:
    with torch.device("meta"):
        rows = {"query": 8 * group, "k_new": 8, "v_new": 8}
        tensors = {
            name: torch.empty(4, heads, queries, width, dtype=torch.bfloat16) for name, heads in rows.items()
        }
        tensors |= {name: torch.empty(4, queries, width, dtype=torch.bfloat16) for name in ("cos", "sin")}
        tensors |= {name: torch.empty(4, 8, 4096, width, dtype=torch.bfloat16) for name in ("key", "value")}
        tensors["length"] = torch.empty(1, dtype=torch.int64)
    parsed = MaskProgram.parse("k <= q + c0[0]"), ScoreProgram.parse("")
    return AppendProblem(tensors, (tensors["length"],), (), width**-0.5, dead_rows, *parsed)


@pytest.mark.parametrize("target", ["sm_80", "sm_90", "sm_100"])
def test_kernels_fit(target: str, tmp_path: Path) -> None:
    named = Target.named(target)
    kernels = [append_kernel(problem(*each), named) for each in ((64, 1, 1), (128, 4, 1), (256, 8, 4))]
    kernels.append(append_kernel(replace(problem(64, 4, 1), ring=True), named))
    for found in compile_launches([(kernel, 0) for kernel in kernels], named, cache=KernelCache(tmp_path)):
        found.check()
        assert "async_copy_global_to_local" in found.ttgir


def rounded(found: AppendProblem, stored: torch.dtype) -> AppendProblem:
    """The same, over a cache of 8 bits."""
    tensors = dict(found.tensors)
    for name in ("key", "value"):
        tensors[name] = tensors[name].to(stored)
        tensors[f"{name}_scale"] = torch.empty(*tensors[name].shape[:3], 1, device="meta")
    return replace(found, tensors=tensors)


@pytest.mark.parametrize("target", ["sm_80", "sm_90", "sm_100"])
def test_kernels_of_8_bits_fit(target: str, tmp_path: Path) -> None:
    named = Target.named(target)
    kernels = [append_kernel(rounded(problem(128, 4, 1), torch.int8), named)]
    kernels.append(append_kernel(rounded(problem(64, 1, 1), torch.float8_e4m3fn), named))
    for _, launches in fitted(kernels, named, cache=KernelCache(tmp_path)):
        for found in launches:
            found.check()


@pytest.mark.slow
@pytest.mark.parametrize("stored", [None, torch.int8, torch.float8_e4m3fn])
@pytest.mark.parametrize("width", [32, 64, 72, 80, 88, 96, 128, 192, 256])
@pytest.mark.parametrize("target", ["sm_80", "sm_86", "sm_89", "sm_90", "sm_100", "sm_120"])
def test_kernels_of_all_widths_fit(
    target: str, width: int, stored: torch.dtype | None, tmp_path: Path
) -> None:
    named = Target.named(target)
    problems = [problem(width, *each) for each in ((1, 1), (7, 1), (16, 16))]
    problems.append(replace(problem(width, 4, 1), ring=True))
    if stored:
        problems = [rounded(each, stored) for each in problems]
    kernels = [append_kernel(each, named) for each in problems]
    for _, launches in fitted(kernels, named, cache=KernelCache(tmp_path)):
        for found in launches:
            found.check()


def test_the_mean_of_a_ring_is_refused() -> None:
    with pytest.raises(Unsupported, match="mean of a ring"):
        append_kernel(replace(problem(64, 1, 1, "mean"), ring=True), None)
