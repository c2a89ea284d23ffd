"""Run as a program with `TRITON_INTERPRET=1`: kernels over caches on CPU tensors; findings as JSON.

A case is one choice for each of `CHOICES`; what does not go together is left out.
"""

from __future__ import annotations

import itertools
import json
import random
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import torch
from triton.runtime import interpreter

from fxopt.codegen import decode_problem, kernel_check
from fxopt.codegen.decode_attention import decode_kernel
from fxopt.codegen.decode_problem import Problem
from fxopt.codegen.kernel_file import KernelFile
from fxopt.ir.program import MaskProgram, ScoreProgram
from fxopt.runtime.interpreter import exact_bfloat16
from fxopt.runtime.kernel_cache import KernelCache

COLUMNS, BATCH = 137, 2
LENGTH = 91

# A mask's formula, and what it captures: of (queries, heads).
MASKS: dict[str, str] = {
    "none": "True",
    "length": "k <= q + c0[0]",
    "window": "k <= q + c0[0] and k > q + c0[0] - 40",
    "size": "k <= q + n0",
    "padding": "c0[b, k] and k <= q + n0",
    "starts": "k <= q + n0 and k >= c0[b]",
    "tensor": "c0[b, 0, q, k]",
    "chunks": "(k)//32 == (q + n0)//32 and k <= q + n0",
}
SCORES: dict[str, str] = {
    "plain": "",
    "capped": "20*tanh(s/20)",
    "slopes": "s + c{}[h]*k",
    "bias": "s + c{}[b, 0, 0, k]",
}
CHOICES: dict[str, tuple[Any, ...]] = {
    "dtype": (torch.float32, torch.float16, torch.bfloat16),
    "group": (1, 2, 3, 5, 6, 7, 8, 12, 16),
    "queries": (1, 2, 5, 16),
    "widths": (
        (32, 32),
        (64, 64),
        (72, 72),
        (80, 80),
        (96, 96),
        (96, 64),
        (128, 128),
        (192, 128),
        (256, 256),
    ),
    "mask": tuple(MASKS),
    "score": tuple(SCORES),
    "layout": ("heads outer", "tokens outer", "padded"),
    "stored": (None, torch.int8, torch.float8_e4m3fn, torch.float8_e5m2),
    "dead": ("zero", "nan", "mean"),
    "others": ("", "sinks", "span", "rest"),
}
Case = dict[str, Any]


def cases(count: int, seed: int) -> Iterator[Case]:
    """`count` random cases that together have every choice."""
    chosen = random.Random(seed)
    columns = {name: itertools.cycle(chosen.sample(values, len(values))) for name, values in CHOICES.items()}
    for _ in range(count):
        yield {name: next(column) for name, column in columns.items()}
        if chosen.random() < 0.3:
            columns["mask"], columns["dtype"] = (
                itertools.cycle(chosen.sample(CHOICES[name], len(CHOICES[name])))
                for name in ("mask", "dtype")
            )


def made(shape: tuple[int, ...], layout: str, dtype: torch.dtype) -> torch.Tensor:
    """(B, H, S, D) random numbers in memory of some form, with NaN between those of a padded one."""
    batch, heads, rows, width = shape
    if layout == "tokens outer":
        return torch.randn(rows, batch, heads, width).to(dtype).permute(1, 2, 0, 3)
    if layout == "padded":
        whole = torch.full((batch, heads, rows + 3, width + 8), torch.nan, dtype=dtype)
        view = whole[:, :, 1 : rows + 1, :width]
        view.copy_(torch.randn(shape))
        return view
    return torch.randn(shape).to(dtype)


def quantized(rows: torch.Tensor, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
    """Rows of 8 bits, and their scales."""
    largest = 127.0 if dtype is torch.int8 else float(torch.finfo(dtype).max)
    scale = rows.float().abs().amax(-1, keepdim=True) / largest
    stored = rows.float() / scale
    return (stored.round() if dtype is torch.int8 else stored).to(dtype), scale


def problem_of(case: Case) -> Problem:
    """The operands of a case."""
    group, queries, (width, of_value) = case["group"], case["queries"], case["widths"]
    kv_heads = 2 if group < 6 else 1
    heads, dtype = group * kv_heads, case["dtype"]
    tensors = {
        "query": made((BATCH, heads, queries, width), case["layout"], dtype),
        "key": made((BATCH, kv_heads, COLUMNS, width), case["layout"], dtype),
        "value": made((BATCH, kv_heads, COLUMNS, of_value), case["layout"], dtype),
    }
    for name in ("key", "value") if case["stored"] is not None else ():
        tensors[name], tensors[f"{name}_scale"] = quantized(tensors[name], case["stored"])
    if case["others"] == "rest" and case["stored"] is None:
        tensors["query_rest"] = made((BATCH, heads, queries, 16), case["layout"], dtype)
        tensors["key_rest"] = made((BATCH, kv_heads, COLUMNS, 16), case["layout"], dtype)
    if case["others"] == "span":
        tensors["span"] = torch.tensor([5, LENGTH, 0])
    if case["others"] == "sinks":
        tensors["sinks"] = torch.randn(heads).to(dtype)
    captures = _captures(case["mask"], queries)
    score = SCORES[case["score"]].format(len(captures))
    if case["score"] == "slopes":
        captures.append(torch.rand(heads) * 0.05)
    if case["score"] == "bias":
        captures.append(torch.randn(BATCH, 1, 1, COLUMNS).to(dtype))
    sizes = (LENGTH - queries,) if "n0" in MASKS[case["mask"]] else ()
    parsed = MaskProgram.parse(MASKS[case["mask"]]), ScoreProgram.parse(score)
    return Problem(tensors, tuple(captures), sizes, width**-0.5, case["dead"], *parsed)


def _captures(mask: str, queries: int) -> list[torch.Tensor]:
    if mask in ("length", "window"):
        return [torch.tensor([LENGTH - queries])]
    if mask == "starts":
        return [torch.tensor([7, LENGTH + 20])]  # the second row is dead
    if mask == "padding":
        return [torch.rand(BATCH, COLUMNS) > 0.4]
    if mask == "tensor":
        live = torch.rand(BATCH, 1, queries, COLUMNS) > 0.5
        live[1, :, -1] = False
        return [live]
    return []


def inputs_of(problem: Problem) -> list[Any]:
    """What `launch` takes."""
    return [*problem.tensors.values(), *problem.captures, *problem.sizes]


def check(cache: KernelCache, kernel: KernelFile, problem: Problem) -> list[str]:
    """What is wrong with a kernel, by error against float64."""
    module = cache.load(kernel)
    with mock.patch.object(kernel_check, "exact_bfloat16", exact_bfloat16):
        return kernel_check.differences(module.launch, module.reference, inputs_of(problem))


def numerics(cache: KernelCache, count: int, seed: int) -> list[Any]:
    """The cases that fail."""
    found = []
    for case in cases(count, seed):
        torch.manual_seed(seed)
        problem = problem_of(case)
        problems = check(cache, decode_kernel(problem, None), problem)
        if problems:
            found.append({**{name: str(value) for name, value in case.items()}, "problems": problems})
    return found


PLAIN: Case = {
    "dtype": torch.float32, "group": 3, "queries": 2, "widths": (64, 64), "mask": "length", "score": "plain",
    "layout": "heads outer", "stored": None, "dead": "zero", "others": "",
}  # fmt: skip
CUT, LOAD = "return first, tl.minimum(first + length, high)", "mask=split < SPLITS, other="
ROW = "row // QUERIES, row % QUERIES, row <"
FAULTS = {
    "a key too many": (CUT, CUT.replace("high)", "high + 1)")),
    "a key too few": (CUT, CUT.replace("high)", "high - 1)")),
    "parts are not rescaled": ("acc += tl.sum(weight[:, None] * rows, 0)", "acc += tl.sum(rows, 0)"),
    "sums are not rescaled": ("acc_0 = acc_0 * alpha[:, None]", "acc_0 = acc_0 * 1.0"),
    "wrong group": (f"head * GROUP + {ROW}", f"head + KV_HEADS * ({ROW.replace(', row %', '), row %', 1)}"),
    "wrong query": (ROW, ROW.replace("row % QUERIES", "row * 0")),
    "last part left out": (LOAD, LOAD.replace("SPLITS", "SPLITS - 1")),
    "rows behind the length are read": ("    mask = seen[:, None]\n", "    mask = rows[:, None] >= 0\n"),
}


def faults(cache: KernelCache) -> dict[str, bool]:
    """Which faults are seen. Behind the length are numbers that are none; both parts have two steps."""
    problem = behind_is_nan(problem_of(PLAIN | {"mask": "none", "others": "span"}), LENGTH)
    with mock.patch.object(decode_problem, "MOST_SPLITS", 2):
        kernel = decode_kernel(problem, None)
    kernel = replace(kernel, reference=cropped_reference(kernel))
    found = {"none": bool(check(cache, kernel, problem))}
    for name, (right, wrong) in FAULTS.items():
        assert right in kernel.jit, name
        broken = replace(kernel, jit=kernel.jit.replace(right, wrong))
        found[name] = bool(check(cache, broken, problem))
    return found


def behind_is_nan(problem: Problem, length: int) -> Problem:
    """Rows behind the length hold NaN and infinities."""
    tensors = dict(problem.tensors)
    for name in ("key", "value"):
        tensors[name] = tensors[name].clone()
        tensors[name][:, :, length::2] = torch.nan
        tensors[name][:, :, length + 1 :: 2] = torch.inf
    return replace(problem, tensors=tensors)


def cropped_reference(kernel: KernelFile) -> str:
    """The reference, of the keys in front of the length alone: it would multiply the others by 0."""
    head, body = kernel.reference.split("\n", 1)
    return f"{head}\n    key, value = key[:, :, :{LENGTH}], value[:, :, :{LENGTH}]\n{body}"


def garbage(cache: KernelCache) -> dict[str, bool]:
    """Whether results stay finite and the same, whatever is behind the length; by kind of mask."""
    found = {}
    kinds: dict[str, str] = {
        "length": "",
        "window": "",
        "size": "",
        "padding": "",
        "none": "span",
        "tensor": "span",
    }
    for mask, others in kinds.items():
        for queries in (1, 4):
            torch.manual_seed(0)
            case = PLAIN | {"mask": mask, "others": others, "queries": queries, "dtype": torch.bfloat16}
            problem = problem_of(case)
            module = cache.load(decode_kernel(problem, None))
            with exact_bfloat16():
                results = [
                    module.launch(*inputs_of(each)) for each in (problem, behind_is_nan(problem, LENGTH))
                ]
            found[f"{mask} {queries}"] = torch.equal(*results) and bool(results[1].isfinite().all())
    return found


def not_numbers(cache: KernelCache) -> dict[str, bool]:
    """Whether rows whose scores are all NaN give NaN, and others do not; by what rows without a key give."""
    found = {}
    for dead in ("zero", "mean"):
        torch.manual_seed(0)
        problem = problem_of(PLAIN | {"dead": dead, "group": 1, "widths": (32, 32)})
        problem.tensors["query"][0] = torch.nan
        out = cache.load(decode_kernel(problem, None)).launch(*inputs_of(problem))
        found[dead] = bool(out[0].isnan().all()) and bool(out[1:].isfinite().all())
    return found


def read_bytes(kernel: KernelFile, cache: KernelCache, problem: Problem) -> dict[str, int]:
    """The bytes that the programs of the first launch read of each operand, counted as they read."""
    spans = {
        name: (each.untyped_storage().data_ptr(), each.untyped_storage().nbytes())
        for name, each in problem.tensors.items()
    }
    counted = dict.fromkeys(spans, 0)
    plain = interpreter.InterpreterBuilder.create_masked_load

    def count(self: Any, pointers: Any, mask: Any, *others: Any) -> Any:
        places = pointers.data[np.broadcast_to(mask.data, pointers.data.shape).astype(bool)]
        width = pointers.get_element_ty().primitive_bitwidth // 8
        for name, (start, size) in spans.items():
            inside = (places >= start) & (places < start + size)
            counted[name] += int(inside.sum()) * width
        return plain(self, pointers, mask, *others)

    module = cache.load(kernel)
    with mock.patch.object(interpreter.InterpreterBuilder, "create_masked_load", count), exact_bfloat16():
        module.launch(*inputs_of(problem))
    return counted


def traffic(cache: KernelCache) -> list[dict[str, Any]]:
    """Bytes read of K and V beside those of the live keys, for lengths that no block divides."""
    rows = []
    settings = itertools.product((1, 63, 130), (1, 7), (1, 4), ("length", "window", "span", "int8"))
    for length, group, queries, kind in settings:
        if length < queries:
            continue
        torch.manual_seed(0)
        masked = {"mask": "none", "others": "span"} if kind == "span" else {"mask": kind, "others": ""}
        if kind == "int8":
            masked = {"mask": "length", "others": "", "stored": torch.int8}
        case = PLAIN | {"group": group, "queries": queries, "dtype": torch.bfloat16} | masked
        problem = problem_of(case)
        if problem.captures:
            problem = replace(problem, captures=(torch.tensor([length - queries]),))
        if kind == "span":
            problem.tensors["span"][:2] = torch.tensor([0, length])  # type: ignore[index]
        live = min(length, 40 + queries - 1) if kind == "window" else length
        counted = read_bytes(decode_kernel(problem, None), cache, problem)
        read = sum(counted[name] for name in counted if name.startswith(("key", "value")))
        held = {n: each for n, each in problem.tensors.items() if n.startswith(("key", "value"))}
        least = sum(
            BATCH * each.shape[1] * live * each.shape[3] * each.element_size() for each in held.values()
        )
        rows.append(
            {"kind": kind, "length": length, "group": group, "queries": queries, "read": read, "least": least}
        )
    return rows


def files(cache: KernelCache) -> dict[str, int]:
    """The exit codes of files that check themselves."""
    found = {}
    for name, changed in {
        "plain": {},
        "int8": {"stored": torch.int8},
        "dead": {"mask": "tensor", "dead": "mean"},
    }.items():
        kernel = decode_kernel(problem_of(PLAIN | {"dtype": torch.bfloat16} | changed), None)
        found[name] = cache.load(kernel).main()
    return found


if __name__ == "__main__":
    torch.set_num_threads(1)
    np.seterr(all="ignore")
    directory, part, *numbers = sys.argv[1:]
    result = globals()[part](KernelCache(Path(directory)), *map(int, numbers))
    print("\n" + json.dumps(result))
