"""The kernels of random programs, compiled for a GPU that is not here; JSON on stdout.

The interpreter multiplies matrices of two dtypes, and takes blocks of any size: what Triton refuses, only
its compiler says.

    python -m tests.support.compiled_fuzz --programs 60 --target sm_90
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import warnings
from collections import Counter
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from hypothesis import Phase
from torch._inductor.decomposition import select_decomp_table
from torch.fx.experimental.proxy_tensor import make_fx

from fxopt.codegen.emit import emit_kernels
from fxopt.codegen.fit import fitted
from fxopt.codegen.kernel_file import KernelFile
from fxopt.errors import CannotCompile
from fxopt.ir.target import Target
from fxopt.options import Options
from fxopt.runtime.kernel_cache import KernelCache
from support.emission_fuzz import PRODUCTS, WIDTH, Step, Value, _each, _run


def kernels_of(inputs: list[Value], steps: list[tuple[str, Step]], options: Options) -> list[KernelFile]:
    """Those of one program; none where eager refuses it."""
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            graph = make_fx(_run(steps), decomposition_table=select_decomp_table(), tracing_mode="fake")(
                *inputs
            )
        except (RuntimeError, TypeError, IndexError):
            return []
        graph.graph.eliminate_dead_code()
        return emit_kernels(graph, options, call=False)[0]


def _product_of(step: Callable[[Value, Value, int], Value], values: list[Value]) -> Value:
    return step(values[2], values[1].to(values[2].dtype), 33)


def fuzz(count: int, target: Target, directory: Path) -> dict[str, Any]:
    """Compile each kind of product alone, in three dtypes, and so many random programs.

    Returns: how many `programs` and `kernels` there were, and the `failures`, by program.
    """
    counts: Counter[str] = Counter()
    failures: list[str] = []
    cache = KernelCache(directory)
    options = Options.parse(
        options={"cache_dir": str(directory), "gemm": "always", "target": target.name, "strict": True}
    )

    def compiled(program: tuple[list[Value], list[tuple[str, Step]]]) -> None:
        text = "; ".join(name for name, _ in program[1])
        for kernel in kernels_of(*program, options):
            counts["kernels"] += 1
            try:
                ((_, found),) = fitted([kernel], target, cache=cache)
            except CannotCompile as error:
                failures.append(f"{error}\n{text}")
                continue
            problems = [problem for one in found for problem in one.problems()]
            failures.extend(f"{kernel.name}: {one}\n{text}" for one in problems)
        counts["programs"] += 1
        if counts["programs"] % 50 == 0:
            print(f"{counts['programs']} programs, {len(failures)} failures", file=sys.stderr, flush=True)

    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        for rows in (1, 6, 60):
            inputs = [
                torch.zeros(1, dtype=torch.int64),
                torch.randn(WIDTH, WIDTH),
                torch.randn(rows, 32).to(dtype),
            ]
            for name, step in PRODUCTS.items():
                compiled((inputs, [(f"{name} of {rows} rows of {dtype}", partial(_product_of, step))]))
    _each(count, compiled, Phase.generate)
    return {**counts, "failures": failures}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--programs", type=int, default=60)
    parser.add_argument("--target", default="sm_90")
    given = parser.parse_args()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as directory:
        print(json.dumps(fuzz(given.programs, Target.named(given.target), Path(directory))))


if __name__ == "__main__":
    main()
