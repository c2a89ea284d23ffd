"""Attention over caches in kernels on a GPU: numerics, and a length that grows under a CUDA graph."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch

from fxopt.codegen.append_attention import append_kernel
from fxopt.codegen.decode_attention import decode_kernel
from fxopt.codegen.decode_problem import Problem
from fxopt.codegen.kernel_check import differences
from fxopt.ir.program import MaskProgram, ScoreProgram
from fxopt.ir.target import Target
from fxopt.runtime.interpreter import exact_bfloat16
from fxopt.runtime.kernel_cache import KernelCache
from support.appending import CASES, check
from support.appending import problem_of as append_problem

ROOM = 3000


def problem_of(
    device: str, dtype: torch.dtype, group: int, width: int, queries: int, length: int, mask: str
) -> Problem:
    torch.manual_seed(0)
    made: dict[str, Any] = {"device": device}
    tensors = {
        "query": torch.randn(2, 2 * group, queries, width, **made).to(dtype),
        "key": torch.randn(2, 2, ROOM, width, **made).to(dtype),
        "value": torch.randn(2, 2, ROOM, width, **made).to(dtype),
    }
    captures = (torch.tensor([length], **made),)
    return Problem(
        tensors, captures, (), width**-0.5, "zero", MaskProgram.parse(mask), ScoreProgram.parse("")
    )


@pytest.mark.parametrize(
    "mask", ["k <= q + c0[0]", "k <= q + c0[0] and k > q + c0[0] - 128"], ids=("length", "window")
)
@pytest.mark.parametrize(("width", "queries"), [(64, 1), (72, 4), (128, 1), (256, 16)])
@pytest.mark.parametrize("group", [1, 4, 7, 16])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_numerics(
    dtype: torch.dtype, group: int, width: int, queries: int, mask: str, device: str, tmp_path: Any
) -> None:
    problem = problem_of(device, dtype, group, width, queries, 1777 if device == "cuda" else 77, mask)
    module = KernelCache(tmp_path).load(decode_kernel(problem, Target.detect()))
    inputs = [*problem.tensors.values(), *problem.captures]
    if device == "cuda":
        assert differences(module.launch, module.reference, inputs) == []
        return
    with exact_bfloat16():
        assert differences(module.launch, module.reference, inputs) == []


@pytest.mark.parametrize("name", sorted(CASES))
def test_rows_are_rotated_rounded_and_written(name: str, device: str, tmp_path: Any) -> None:
    torch.manual_seed(0)
    made = append_problem(CASES[name])
    tensors = {each: tensor.to(device) for each, tensor in made.tensors.items()}
    problem = replace(made, tensors=tensors, captures=tuple(each.to(device) for each in made.captures))
    kernel = append_kernel(problem, Target.detect())
    assert check(KernelCache(tmp_path), kernel, problem) == []


def test_a_recorded_launch_follows_the_length(cuda: str, tmp_path: Any) -> None:
    problem = problem_of(cuda, torch.bfloat16, 4, 128, 1, 10, "k <= q + c0[0]")
    module = KernelCache(tmp_path).load(decode_kernel(problem, Target.detect()))
    inputs = [*problem.tensors.values(), *problem.captures]
    module.launch(*inputs)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = module.launch(*inputs)
    for length in (10, 63, 64, 1000, ROOM - 1):
        problem.captures[0].fill_(length)
        graph.replay()
        assert torch.equal(out, module.launch(*inputs))
        torch.testing.assert_close(out, module.reference(*inputs), rtol=2e-2, atol=2e-2)
