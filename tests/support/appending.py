"""Run as a program with `TRITON_INTERPRET=1`: attention that appends to its cache first; findings as JSON."""

from __future__ import annotations

import json
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import torch

from fxopt.codegen import decode_problem, kernel_check
from fxopt.codegen.append_attention import CACHES, AppendProblem, append_kernel
from fxopt.codegen.kernel_file import KernelFile
from fxopt.ir.program import MaskProgram, ScoreProgram
from fxopt.ir.row_codes import quantized
from fxopt.runtime.interpreter import exact_bfloat16
from fxopt.runtime.kernel_cache import KernelCache
from support.decoding import read_bytes

CAUSAL = "k <= q + c0[0]"
PLAIN: dict[str, Any] = {
    "dtype": torch.float32, "group": 2, "queries": 1, "widths": (64, 64), "rotary": 64, "interleaved": False,
    "ring": False, "rows": 137, "length": 70, "mask": CAUSAL, "score": "", "dead": "zero", "given": "length",
    "stored": None,
}  # fmt: skip
CASES: dict[str, dict[str, Any]] = {
    "one query": {},
    "no angles": {"rotary": 0, "dtype": torch.bfloat16},
    "part of a row": {"rotary": 32, "widths": (80, 80), "dtype": torch.bfloat16},
    "neighbours": {"interleaved": True, "queries": 3, "mask": CAUSAL, "dtype": torch.float16},
    "first step": {"length": 0, "queries": 5, "mask": CAUSAL},
    "two widths": {"widths": (96, 64), "rotary": 96, "group": 7, "queries": 2, "mask": CAUSAL},
    "window": {"mask": f"{CAUSAL} and k > q + c0[0] - 40", "queries": 4, "dtype": torch.bfloat16},
    "full": {"length": 136},
    "rows behind": {"mask": "c0[b, k]", "queries": 3, "dtype": torch.bfloat16},
    "last rows": {"given": "", "mask": "True", "queries": 4, "length": 133, "dtype": torch.float16},
    "span": {"given": "span", "mask": "c0[b, k]", "dead": "none"},
    "a row that is dead": {"mask": "k < q + c0[0] - 70", "queries": 3, "dead": "mean", "group": 3},
    "ring": {
        "rows": 48,
        "length": 100,
        "ring": True,
        "mask": f"{CAUSAL} and k > q + c0[0] - 40",
        "queries": 3,
    },
    "ring that fills": {"rows": 48, "length": 30, "ring": True, "mask": "k > q + c0[0] - 40"},
    "capped": {"score": "20*tanh(s/20)", "group": 3},
    "int8": {"stored": torch.int8, "dtype": torch.bfloat16, "group": 7},
    "int8 in float32": {"stored": torch.int8, "queries": 5},
    "int8, the mean": {
        "stored": torch.int8, "mask": "k < q + c0[0] - 70", "queries": 3, "dead": "mean", "group": 3,
        "dtype": torch.float16,
    },
    "int8, last rows": {
        "stored": torch.int8, "given": "", "mask": "True", "queries": 4, "length": 133,
        "dtype": torch.float16,
    },
    "int8 in a ring": {
        "stored": torch.int8, "rows": 48, "length": 100, "ring": True, "queries": 3,
        "mask": f"{CAUSAL} and k > q + c0[0] - 40", "dtype": torch.bfloat16,
    },
    "int8 in two parts": {
        "stored": torch.int8, "widths": (96, 80), "rotary": 32, "dtype": torch.bfloat16, "interleaved": True,
    },
    "fp8": {"stored": torch.float8_e4m3fn, "dtype": torch.bfloat16, "queries": 2},
    "fp8 in float32": {"stored": torch.float8_e4m3fn, "rotary": 0},
    "fp8 in a ring": {
        "stored": torch.float8_e4m3fn, "rows": 48, "length": 30, "ring": True,
        "mask": "k > q + c0[0] - 40", "widths": (80, 96), "rotary": 80, "dtype": torch.bfloat16,
    },
}  # fmt: skip


def problem_of(changed: dict[str, Any]) -> AppendProblem:
    """The operands of a case. Rows of the cache behind the length are NaN."""
    case = PLAIN | changed
    kv_heads, rows, queries, (width, of_value) = 2, case["rows"], case["queries"], case["widths"]
    dtype, length = case["dtype"], case["length"]

    def made(*shape: int) -> torch.Tensor:
        return torch.randn(2, *shape).to(dtype)

    tensors = {
        "query": made(queries, kv_heads * case["group"], width).transpose(1, 2),
        "k_new": made(queries, kv_heads, width).transpose(1, 2),
        "v_new": made(queries, kv_heads, of_value).transpose(1, 2),
    }
    if case["rotary"]:
        angles = torch.rand(2, queries, case["rotary"] // 2) * 6
        angles = angles.repeat_interleave(2, -1) if case["interleaved"] else torch.cat([angles, angles], -1)
        tensors |= {"cos": angles.cos().to(dtype), "sin": angles.sin().to(dtype)}
    tensors |= {"key": made(kv_heads, rows, width), "value": made(kv_heads, rows, of_value)}
    for name in ("key", "value") if case["stored"] else ():
        tensors[name], tensors[f"{name}_scale"] = quantized(tensors[name], case["stored"])
    if not case["ring"] and CAUSAL in case["mask"]:
        for name in ("key_scale", "value_scale") if case["stored"] else ("key", "value"):
            tensors[name][:, :, length:] = torch.nan
    if case["given"]:
        tensors["length"] = torch.arange(length, length + queries)
    captures = (torch.tensor([length]),) if "c0" in case["mask"] else ()
    if case["mask"] == "c0[b, k]":
        captures = (torch.rand(2, rows) > 0.4,)
    if case["given"] == "span":
        tensors["span"] = torch.tensor([20, 90, 0])
        captures[0][:, :20] = captures[0][:, 90:] = False
    parsed = MaskProgram.parse(case["mask"]), ScoreProgram.parse(case["score"])
    others = {"interleaved": case["interleaved"], "ring": case["ring"]}
    return AppendProblem(tensors, captures, (), width**-0.5, case["dead"], *parsed, **others)


def check(cache: KernelCache, kernel: KernelFile, problem: AppendProblem) -> list[str]:
    """What is wrong with a kernel and with what it writes, by error against float64."""
    module = cache.load(kernel)
    written = [place for place, name in enumerate(problem.tensors) if name in CACHES]
    with mock.patch.object(kernel_check, "exact_bfloat16", exact_bfloat16):
        inputs = [*problem.tensors.values(), *problem.captures]
        return kernel_check.differences(module.launch, module.reference, inputs, written)


def numerics(cache: KernelCache) -> dict[str, list[str]]:
    """What is wrong, case by case."""
    found = {}
    for name, case in CASES.items():
        torch.manual_seed(0)
        problem = problem_of(case)
        found[name] = check(cache, append_kernel(problem, None), problem)
    return found


FAULTS = {
    "rows written one too late": ("    place = length + new\n", "    place = length + new + 1\n"),
    "not written": ("(place < columns) & writes", "(place < columns) & (place < 0)"),
    "wrong sign": ("column < ROTARY // 2, -1.0, 1.0", "column < ROTARY // 2, 1.0, -1.0"),
    "keys not rotated": ("product(other, across) *", "product(other, across) * 0.0 *"),
    "rows read that are written": ("(slot < length) |", "(slot < length + 1) |"),
    "rows behind the new ones left out": ("slot >= length + QUERIES)", "slot >= columns)"),
    "new keys in every part": ("    if split == 0:\n", "    if split >= 0:\n"),
    "new keys left out": ("    if split == 0:\n", "    if split < 0:\n"),
    "length off by one": (
        "known, k = new < QUERIES, length + new",
        "known, k = new < QUERIES, length + new + 1",
    ),
}


FAULTS_OF_CODES = {
    "not to the nearest code": ("return rint(x).to", "return x.to"),
    "scale by another number": ("tl.div_rn(bits.to", "1.01 * tl.div_rn(bits.to"),
    "scales in another row": ("k_scales + place.to", "k_scales + (place + 1).to"),
    "values' scales not written": ("tl.store(v_scales +", "tl.store(k_scales +"),
    "attended to without its scale": ("        s *= k_scale[None, :]\n", "        s *= 1.0\n"),
    "values without theirs": (
        "        v_scale /= largest\n    return k_0",
        "        v_scale = 1.0 + 0 * v_scale\n    return k_0",
    ),
    "rotated without eager's roundings": ("return exact.to(x.dtype).to(tl.float32)", "return exact"),
}


def faults(cache: KernelCache) -> dict[str, bool]:
    """Which faults are seen; the work has two parts."""
    found = faults_of(cache, {"queries": 3, "mask": "c0[b, k]"}, FAULTS)
    codes = {"queries": 3, "stored": torch.int8, "dtype": torch.bfloat16}
    of_codes = faults_of(cache, codes, FAULTS_OF_CODES)
    return found | of_codes | {"none": found["none"] or of_codes["none"]}


def faults_of(
    cache: KernelCache, case: dict[str, Any], changes: dict[str, tuple[str, str]]
) -> dict[str, bool]:
    torch.manual_seed(0)
    problem = problem_of(case)
    with mock.patch.object(decode_problem, "MOST_SPLITS", 2):
        kernel = append_kernel(problem, None)
    found = {"none": bool(check(cache, kernel, problem))}
    for name, (right, wrong) in changes.items():
        assert right in kernel.jit, name
        found[name] = bool(check(cache, replace(kernel, jit=kernel.jit.replace(right, wrong)), problem))
    return found


def traffic(cache: KernelCache) -> dict[str, tuple[int, int]]:
    """Bytes read of the caches, and those of the rows in front of the length."""
    found = {}
    for name in ("one query", "first step", "full", "two widths"):
        problem = problem_of(CASES[name])
        counted = read_bytes(append_kernel(problem, None), cache, problem)
        least = sum(
            each.shape[0]
            * each.shape[1]
            * int(problem.tensors["length"][0])
            * each.shape[3]
            * each.element_size()
            for each in (problem.tensors["key"], problem.tensors["value"])
        )
        found[name] = (counted["key"] + counted["value"], least)
    return found


if __name__ == "__main__":
    torch.set_num_threads(1)
    np.seterr(all="ignore")
    directory, part = sys.argv[1:]
    print("\n" + json.dumps(globals()[part](KernelCache(Path(directory)))))
