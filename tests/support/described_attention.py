"""Run as a program with `TRITON_INTERPRET=1`: attention whose keys and values come by tensor descriptors,
against a plain one; findings as JSON.
"""

from __future__ import annotations

import json
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from fxopt.codegen.kernel_file import KernelFile
from fxopt.runtime.kernel_cache import KernelCache
from support.attention_kernels import CASES, Run

# Of all kinds of bounds, tiles and layouts.
DESCRIBED = (
    "all keys", "causal", "two-sided window", "left padding", "prefix", "learned table", "opaque mask",
    "few queries", "wide keys, narrow values",
)  # fmt: skip


def main(cache: KernelCache, whole: bool) -> dict[str, Any]:
    """The forward of cases through descriptors, and of one whose tiles are those of a row further on."""

    def further(kernel: KernelFile) -> KernelFile:
        return replace(kernel, jit=kernel.jit.replace("rows.load([start, 0])", "rows.load([start + 1, 0])"))

    half = (torch.float16, torch.bfloat16)
    names = CASES if whole else DESCRIBED
    found = {
        f"{name}, {dtype}": Run(CASES[name], dtype, cache, described=True).check(backward=False)
        for place, name in enumerate(names)
        for dtype in (half if whole else half[place % 2 :][:1])
    }
    wrong = Run(CASES["causal"], torch.float16, cache, further, described=True)
    return {"described": found, "fault": wrong.check(backward=False)}


if __name__ == "__main__":
    torch.set_num_threads(1)
    print(json.dumps(main(KernelCache(Path(sys.argv[1])), "whole" in sys.argv[2:])))
