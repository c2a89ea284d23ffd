"""Attention over caches in kernels: numerics, faults, what is read, and whether it fits the targets.

In Triton's interpreter, in processes of their own.
"""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from fxopt.codegen.compile import compile_launches
from fxopt.codegen.decode_attention import decode_kernel
from fxopt.codegen.decode_problem import MOST_SPLITS, Problem, Widths, splits_of
from fxopt.codegen.fit import fitted
from fxopt.ir.program import MaskProgram, ScoreProgram
from fxopt.ir.target import Target
from fxopt.runtime.kernel_cache import KernelCache
from support.programs import findings

TARGETS = ("sm_80", "sm_90", "sm_100")


def run(*arguments: object) -> Any:
    return findings("support.decoding", *arguments)


def test_numerics(tmp_path: Path) -> None:
    assert run(tmp_path, "numerics", 9, 0) == []


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(1, 5))
def test_numerics_of_many(seed: int, tmp_path: Path) -> None:
    assert run(tmp_path, "numerics", 90, seed) == []


def test_faults_are_seen(tmp_path: Path) -> None:
    found = run(tmp_path, "faults")
    assert found.pop("none") is False
    assert all(found.values()), found


def test_what_is_behind_the_length_is_without_effect(tmp_path: Path) -> None:
    found = run(tmp_path, "garbage")
    assert all(found.values()), found


def test_scores_that_are_not_numbers_give_none(tmp_path: Path) -> None:
    """A part of which all scores are NaN looks like one without a live key."""
    found = run(tmp_path, "not_numbers")
    assert len(found) == 2
    assert all(found.values()), found


def test_only_live_keys_are_read_and_once(tmp_path: Path) -> None:
    rows = run(tmp_path, "traffic")
    assert len(rows) >= 40
    assert [row for row in rows if not row["least"] <= row["read"] <= 1.02 * row["least"]] == []


def test_files_check_themselves(tmp_path: Path) -> None:
    assert set(run(tmp_path, "files").values()) == {0}


def problem(
    width: int,
    group: int,
    queries: int = 1,
    *,
    dtype: torch.dtype = torch.bfloat16,
    mask: str = "k <= q + c0[0]",
) -> Problem:
    with torch.device("meta"):
        tensors = {
            "query": torch.empty(4, 8 * group, queries, width, dtype=dtype),
            "key": torch.empty(4, 8, 4096, width, dtype=dtype),
            "value": torch.empty(4, 8, 4096, width, dtype=dtype),
        }
        captures = (torch.empty(1, dtype=torch.int64),)
    parsed = MaskProgram.parse(mask), ScoreProgram.parse("")
    return Problem(tensors, captures, (), width**-0.5, "zero", *parsed)


def quantized_problem(width: int, group: int, dtype: torch.dtype) -> Problem:
    found = problem(width, group)
    tensors = dict(found.tensors)
    for name in ("key", "value"):
        tensors[name] = tensors[name].to(dtype)
        tensors[f"{name}_scale"] = torch.empty(4, 8, 4096, 1, device="meta")
    return replace(found, tensors=tensors)


def latent_problem(heads: int) -> Problem:
    with torch.device("meta"):
        latent = torch.empty(4, 1, 4096, 512, dtype=torch.bfloat16)
        tensors = {
            "query": torch.empty(4, heads, 1, 512, dtype=torch.bfloat16),
            "key": latent,
            "value": latent,
            "query_rest": torch.empty(4, heads, 1, 64, dtype=torch.bfloat16),
            "key_rest": torch.empty(4, 1, 4096, 64, dtype=torch.bfloat16),
        }
    return replace(problem(64, 1), tensors=tensors, shared=True)


FEW = {
    "one head": problem(128, 1),
    "odd group": problem(64, 7, 4),
    "wide": problem(256, 16),
    "many rows": problem(128, 16, 16),
    "float32": problem(128, 8, dtype=torch.float32),
    "int8": quantized_problem(128, 4, torch.int8),
    "fp8": quantized_problem(128, 4, torch.float8_e4m3fn),
    "latent": latent_problem(128),
}


@pytest.mark.parametrize("target", TARGETS)
def test_few_kernels_fit(target: str, tmp_path: Path) -> None:
    named = Target.named(target)
    kernels = [decode_kernel(each, named) for each in FEW.values()]
    pairs = [(kernel, launch) for kernel in kernels for launch in (0, 1)]
    for found in compile_launches(pairs, named, cache=KernelCache(tmp_path)):
        found.check()


@pytest.mark.parametrize("target", TARGETS)
def test_keys_are_read_ahead(target: str, tmp_path: Path) -> None:
    """By asynchronous copies: what a loop over a cache stands and falls with."""
    named = Target.named(target)
    kernel = decode_kernel(problem(128, 4), named)
    (found,) = compile_launches([(kernel, 0)], named, cache=KernelCache(tmp_path))
    assert found.ttgir.count("async_copy_global_to_local") >= 2
    assert found.registers <= 168


@pytest.mark.slow
@pytest.mark.parametrize("queries", [1, 16])
@pytest.mark.parametrize("width", [32, 64, 72, 80, 88, 96, 128, 192, 256])
@pytest.mark.parametrize("target", [*TARGETS, "sm_86", "sm_89", "sm_120"])
def test_kernels_fit(target: str, width: int, queries: int, tmp_path: Path) -> None:
    named = Target.named(target)
    kernels = [
        decode_kernel(problem(width, group, queries), named) for group in (1, 2, 3, 5, 6, 7, 8, 12, 16)
    ]
    for _, launches in fitted(kernels, named, cache=KernelCache(tmp_path)):
        for found in launches:
            found.check()


@pytest.mark.parametrize("width", [16, 40, 64, 72, 80, 88, 96, 128, 192, 256, 512])
def test_tiles_are_little_wider_than_rows(width: int) -> None:
    found = Widths.of(width)
    assert sum(found.parts) == width
    assert sum(found.blocks) <= max(16, 1.25 * width)


@pytest.mark.parametrize("programs", [1, 8, 32, 100, 264, 1000])
def test_parts_fill_the_target(programs: int) -> None:
    target = Target.named("h200")
    splits = splits_of(programs, 1 << 20, 64, target)
    assert splits <= MOST_SPLITS
    waves = programs * splits / (2 * target.sms)
    assert waves >= 0.9 * math.ceil(waves) or splits == MOST_SPLITS
    assert splits <= 8 or waves < 6, "parts cost something, too"


def test_parts_depend_on_the_target_and_not_on_more_than_the_room() -> None:
    counts = {splits_of(8, columns, 64, Target.named("h200")) for columns in (1 << 15, 1 << 17, 1 << 20)}
    assert len(counts) == 1
    assert splits_of(8, 100, 64, Target.named("h200")) == 2
    assert splits_of(8, 1 << 20, 64, Target.named("a100")) < splits_of(8, 1 << 20, 64, Target.named("b200"))
