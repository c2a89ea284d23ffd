"""Run as a program with `TRITON_INTERPRET=1`: kernels on CPU tensors, findings as JSON on stdout."""

from __future__ import annotations

import contextlib
import io
import json
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from fxopt.codegen.kernel_check import differences
from fxopt.runtime.interpreter import exact_bfloat16
from fxopt.runtime.kernel_cache import KernelCache
from fxopt.runtime.launch import as_op
from support import kernels

# What an elementwise kernel in bfloat16 computes, and the same in torch.
BFLOAT16 = {
    "add": ("x + y", lambda x, y: x + y),
    "multiply": ("x * y", lambda x, y: x * y),
    "divide": ("(x / y).to(tl.bfloat16)", lambda x, y: x / y),
    "constant": ("x * 1.5 - 2.25", lambda x, y: x * 1.5 - 2.25),
    "negate": ("-x", lambda x, y: -x),
    "absolute": ("tl.abs(x)", lambda x, y: x.abs()),
    "compare": ("tl.where(x > y, x, y)", lambda x, y: torch.where(x > y, x, y)),
    "both": ("tl.where((x > y) & (x > 0), x, y)", lambda x, y: torch.where((x > y) & (x > 0), x, y)),
    "clamp": ("tl.clamp(x, -1.0, 1.0)", lambda x, y: x.clamp(-1, 1)),
    "widen": ("(tl.exp(x.to(tl.float32))).to(tl.bfloat16)", lambda x, y: x.float().exp().bfloat16()),
    "round": (
        "(x.to(tl.float32) * 1.00390625 + 0.1).to(tl.bfloat16)",
        lambda x, y: (x.float() * 1.00390625 + 0.1).bfloat16(),
    ),
    "half": ("x.to(tl.float16).to(tl.bfloat16)", lambda x, y: x.half().bfloat16()),
    "truth": ("(x > y).to(tl.bfloat16)", lambda x, y: (x > y).bfloat16()),
    "integer": ("(x * 8).to(tl.int32).to(tl.bfloat16)", lambda x, y: (x * 8).int().bfloat16()),
    "index": ("offsets.to(tl.bfloat16) * 1.0", lambda x, y: torch.arange(x.numel()).bfloat16()),
    "truths": (
        "((offsets >= 4).to(tl.int32) + (offsets >= 6).to(tl.int32)).to(tl.bfloat16)",
        lambda x, y: sum((torch.arange(x.numel()) >= least).int() for least in (4, 6)).bfloat16(),
    ),
    "full": ("tl.full((BLOCK,), 1.5, tl.bfloat16)", lambda x, y: torch.full_like(x, 1.5)),
    "maximum": ("x * 0 + tl.max(tl.where(mask, x, -9.0), 0)", lambda x, y: x * 0 + x.max()),
}

# Of these torch and Triton mean different things for NaN, or nothing.
FINITE = ("integer", "maximum", "clamp")


def bfloat16(cache: KernelCache) -> dict[str, Any]:
    """For each operation: the number of wrong entries with the remedy and without it (or how that failed)."""
    x, y = (torch.randn(100, generator=torch.manual_seed(3)).bfloat16() * scale for scale in (1, 2))
    special = torch.tensor([0.0, -0.0, torch.inf, -torch.inf, torch.nan, 3e38, -1e-40]).bfloat16()
    x, y = torch.cat([x, special, x[:7]]), torch.cat([y, y[:7], special])
    found = {}
    for name, (body, meaning) in BFLOAT16.items():
        module = cache.load(kernels.add(body=body))
        count = 100 if name in FINITE else 114
        given = x[:count], y[:count]
        with exact_bfloat16():
            remedied = _wrong(module.launch(*given), meaning(*given))
        try:
            plain: Any = _wrong(module.launch(*given), meaning(*given))
        except Exception as error:  # older versions of Triton refuse some of it
            plain = type(error).__name__
        found[name] = (remedied, plain)
    return found


def _wrong(got: torch.Tensor, want: torch.Tensor) -> int:
    same = (got == want) | (got.isnan() & want.isnan())
    return int((~same).sum())


def reductions(cache: KernelCache) -> dict[str, float]:
    """A sum that is accumulated in bfloat16, and a product of tiles without the remedy."""
    x = torch.rand(128, generator=torch.manual_seed(1)).bfloat16()
    plus = "@triton.jit\ndef _plus(a, b):\n    return a + b\n\n\n"
    kernel = kernels.add(body="x * 0 + tl.reduce(x, 0, _plus)")
    summing = cache.load(replace(kernel, jit=plus + kernel.jit.strip()))
    with exact_bfloat16():
        accumulated = float(summing.launch(x, x)[0])
    product = cache.load(kernels.product())
    inputs = product.example_inputs("cpu")
    error = (product.launch(*inputs).double() - product.reference(*inputs).double()).abs().max()
    return {"exact": float(x.double().sum()), "accumulated": accumulated, "error of a product": float(error)}


def checks(cache: KernelCache) -> dict[str, Any]:
    """`main` of the files, by its exit code, and what the check says of a broken kernel."""
    found = {}
    for kernel in (kernels.add(), kernels.softmax(), kernels.product(), kernels.accumulate()):
        with contextlib.redirect_stdout(io.StringIO()) as said:
            found[kernel.name] = (cache.load(kernel).main(), said.getvalue())
    return found


def broken(cache: KernelCache) -> dict[str, list[str]]:
    """What the check says of kernels that are wrong."""
    right = kernels.add("float32")
    wrong = {
        "constant": right.jit.replace("1.5", "1.50001"),
        "sign": right.jit.replace("+ y,", "- y,"),
        "unwritten": right.jit.replace("+ y, mask=mask)", "+ y, mask=offsets < n - 1)"),
    }
    found = {}
    for name, jit in wrong.items():
        module = cache.load(replace(right, jit=jit))
        found[name] = differences(module.launch, module.reference, module.example_inputs("cpu"))
    module = cache.load(right)
    found["vacuous"] = differences(module.launch, _less_in_float32, module.example_inputs("cpu"))
    return found


def _less_in_float32(x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    """A reference that has one meaning in float32 and another in float64."""
    return (x * 1.5 + y) * (0.5 if x.dtype == torch.float32 else 1.0)


def ops(cache: KernelCache) -> dict[str, Any]:
    """The op in eager mode, behind AOTAutograd, and with an input that is written to."""
    op = as_op(kernels.add(), cache=cache)
    x, y = (torch.randn(131).bfloat16() for _ in range(2))
    compiled = torch.compile(lambda a, b: op(a * 2, b) + 1, backend="aot_eager", fullgraph=True, dynamic=True)
    scale = as_op(kernels.accumulate(), cache=cache)
    z = torch.randn(64)
    half = z * 0.5
    totals = scale(z, 0.5)
    return {
        "eager": torch.equal(op(x, y), x * 1.5 + y),
        "same op": as_op(kernels.add(), cache=cache) is op,
        "compiled": torch.equal(compiled(x, y), (x * 2) * 1.5 + y + 1),
        "schema": str(scale._schema).split("(", 1)[1],
        "written": torch.equal(z, half),
        "totals": [float(one) for one in totals],
        "wanted": [float(half.sum()), float((half * half).sum())],
    }


if __name__ == "__main__":
    torch.set_num_threads(1)
    np.seterr(all="ignore")  # bits that are computed with as if they were numbers overflow
    where = KernelCache(Path(sys.argv[1]))
    parts = (bfloat16, reductions, checks, broken, ops)
    print(json.dumps({part.__name__: part(where) for part in parts}))
