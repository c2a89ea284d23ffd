"""Kernels of attention on a GPU, against float64 by the rule, and twice the same bits."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from fxopt.codegen.attention_backward import backward_kernel
from fxopt.codegen.attention_descriptors import LEAST_ARCH
from fxopt.codegen.attention_kernel import forward_kernel
from fxopt.ir.target import Target
from fxopt.runtime.kernel_cache import KernelCache
from support.attention_kernels import CASES, DTYPES, Run, operands_of, others_of, spec_of

REHEARSED = ("causal", "dropout")
WIDTHS = ((32, 32), (64, 64), (72, 72), (80, 80), (88, 88), (96, 96), (128, 128), (192, 128), (256, 256))


@pytest.mark.parametrize("backward", [False, True], ids=("forward", "backward"))
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", CASES)
def test_numerics(name: str, dtype: str, backward: bool, device: str, tmp_path: Path) -> None:
    if device == "cpu" and (name not in REHEARSED or dtype != "float16"):
        pytest.skip("the same in the tests of codegen")
    run = Run(CASES[name], DTYPES[dtype], KernelCache(tmp_path), device=device, target=Target.detect())
    assert run.check(backward=backward) == ""


@pytest.mark.parametrize(("width", "width_v"), WIDTHS)
def test_widths(width: int, width_v: int, cuda: str, tmp_path: Path) -> None:
    """Of several tiles of queries and of keys."""
    case = replace(CASES["two-sided window"], width=width, width_v=width_v, rows=300)
    run = Run(case, torch.bfloat16, KernelCache(tmp_path), device=cuda, target=Target.detect())
    assert run.check(backward=True) == ""


def test_descriptors(cuda: str, tmp_path: Path) -> None:
    target = Target.detect()
    if target is None or target.arch < LEAST_ARCH:
        pytest.skip("needs a GPU with descriptors")
    for name in ("causal", "left padding", "few queries", "wide keys, narrow values"):
        run = Run(
            CASES[name], torch.bfloat16, KernelCache(tmp_path), described=True, device=cuda, target=target
        )
        assert run.check(backward=False) == "", name


@pytest.mark.parametrize("name", ["learned vectors", "short learned table", "learned bias"])
def test_equal_inputs_give_equal_bits(name: str, cuda: str, tmp_path: Path) -> None:
    case, dtype, target = CASES[name], torch.bfloat16, Target.detect()
    spec = replace(spec_of(case, dtype), alignment=math.gcd(8, case.width))
    given = [*operands_of(case, dtype), *others_of(case, dtype).values()]
    given = [one.to(cuda) if isinstance(one, torch.Tensor) else one for one in given]
    cache = KernelCache(tmp_path)
    forward = cache.load(forward_kernel(spec, target, ""))
    backward = cache.load(backward_kernel(spec, case.learned, target, ""))
    results = []
    for _ in range(2):
        out, sums = forward.launch(*given)
        results.append([out, *backward.launch(torch.ones_like(out), out, sums, *given)])
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))
