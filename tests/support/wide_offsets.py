"""Run as a program with `TRITON_INTERPRET=1`: attention of operands whose rows, or heads, lie so far
apart that offsets need more than 31 bits; findings as JSON.

The memory in between is never touched, so that it is not there.
"""

from __future__ import annotations

import json
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from fxopt.codegen.append_attention import AppendProblem, append_kernel
from fxopt.codegen.attention_backward import backward_kernel
from fxopt.codegen.attention_kernel import forward_kernel
from fxopt.codegen.decode_attention import decode_kernel
from fxopt.codegen.decode_problem import Problem
from fxopt.ir.program import MaskProgram, ScoreProgram
from fxopt.runtime.kernel_cache import KernelCache
from support.attention_kernels import Case, spec_of

HALF = torch.float16
WIDTH = 16
FAR = 2**30 + 16  # numbers from one to the next: the third is out of reach of 32 bits
ROWS, COLUMNS = 5, 70


def far(heads: int, rows: int, *, apart: str) -> torch.Tensor:
    """(1, heads, rows, WIDTH) random numbers: heads, or rows, lie far apart."""
    count = heads if apart == "heads" else rows
    step = FAR if apart == "heads" else 2**31 // (COLUMNS - 10)
    memory = torch.empty((count - 1) * step + max(heads, rows) * WIDTH, dtype=HALF)
    strides = (1, step, WIDTH, 1) if apart == "heads" else (1, WIDTH, step, 1)
    found = memory.as_strided((1, heads, rows, WIDTH), strides)
    return found.copy_(torch.randn(found.shape))


def differs(found: Any, wanted: Any) -> bool:
    """Kernels do the same on the same numbers, wherever these lie: bit by bit."""
    return not all(torch.equal(a, b) for a, b in zip(found, wanted, strict=True))


def near(operands: list[torch.Tensor]) -> list[torch.Tensor]:
    return [each.contiguous() for each in operands]


def training(cache: KernelCache, apart: str, group: int) -> bool:
    """Of the forward and the backward."""
    case = Case("k <= q + 65", group=group, width=WIDTH, width_v=WIDTH)
    spec = replace(spec_of(case, HALF), far=apart == "rows")
    forward, backward = (
        cache.load(each) for each in (forward_kernel(spec, None, ""), backward_kernel(spec, (), None, ""))
    )
    operands = [far(group, ROWS, apart=apart), *(far(1, COLUMNS, apart=apart) for _ in range(2))]
    results = []
    for given in (operands, near(operands)):
        out, sums = forward.launch(*given)
        grad = out.flip(-1).contiguous()
        results.append([out, *backward.launch(grad, out, sums, *given)])
    return differs(*results)


def decoding(cache: KernelCache) -> bool:
    tensors = {"query": torch.randn(1, 3, 1, WIDTH).to(HALF)}
    tensors |= {name: far(3, COLUMNS, apart="heads") for name in ("key", "value")}
    programs = MaskProgram.parse("k < q - 1"), ScoreProgram.parse("")  # rows without a key: a mean of values
    results = []
    for dead in ("zero", "mean"):
        mask = programs[0] if dead == "mean" else MaskProgram.parse("True")
        problem = Problem(tensors, (), (), 0.25, dead, mask, programs[1])
        module = cache.load(decode_kernel(problem, None))
        given = list(tensors.values())
        results.append(differs([module.launch(*given)], [module.launch(*near(given))]))
    return any(results)


def appending(cache: KernelCache) -> bool:
    tensors = {name: torch.randn(1, 3, 1, WIDTH).to(HALF) for name in ("query", "k_new", "v_new")}
    tensors |= {name: far(3, COLUMNS, apart="heads") for name in ("key", "value")}
    length = torch.tensor([60])
    programs = MaskProgram.parse("k <= q + c0[0]"), ScoreProgram.parse("")
    problem = AppendProblem(tensors | {"length": length}, (length,), (), 0.25, "zero", *programs)
    module = cache.load(append_kernel(problem, None))
    results = []
    for given in (list(tensors.values()), near(list(tensors.values()))):
        out = module.launch(*given, length, length)
        results.append([out, *given[3:]])
    return differs(*results)


def main(cache: KernelCache) -> dict[str, bool]:
    """Whether results depend on where numbers lie, by kernel."""
    torch.manual_seed(0)
    return {
        "heads apart": training(cache, "heads", 4),
        "rows apart": training(cache, "rows", 1),
        "decoding": decoding(cache),
        "appending": appending(cache),
    }


if __name__ == "__main__":
    torch.set_num_threads(1)
    print("\n" + json.dumps(main(KernelCache(Path(sys.argv[1])))))
