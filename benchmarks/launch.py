"""What a launch of a kernel costs the host: `python -m benchmarks.launch`.

The same kernels are launched by Triton's `JITFunction.run`, by fxopt's direct launch, and as TorchInductor
launches a Triton kernel of a graph: by the function that it generates around Triton's launcher, alone and
from its `CachingAutotuner.run`. They take turns on a stub of the driver that launches nothing: what the
driver takes is in none of the figures. CPU time of the thread, in microseconds for a launch. A GPU is not
needed.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from benchmarks.stub_driver import stubbed
from fxopt.codegen.kernel_file import Argument, KernelFile, Launch, Parameter
from fxopt.ir.target import Target
from fxopt.measure.machine import describe
from fxopt.runtime.direct_launch import DirectLaunch
from fxopt.runtime.kernel_cache import KernelCache

ROUNDS = 15
WAYS = ("JITFunction.run", "direct launch", "Inductor's function", "Inductor's run")
FORMS = ((3, 0), (3, 2), (8, 0), (12, 2))


def main() -> int:
    arguments = _parser().parse_args()
    console = Console()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as directory, stubbed(Target.named(arguments.target), keeps=False):
        cache = KernelCache(Path(directory))
        rows = [measure(cache, *form, arguments.launches) for form in FORMS]
    console.print(_table(rows))
    if arguments.out:
        plan = {name: value for name, value in vars(arguments).items() if name != "out"}
        found = {"machine": describe(), "plan": plan, "rows": rows}
        arguments.out.write_text(json.dumps(found, indent=1, default=str) + "\n")
        console.print(f"written to {arguments.out}")
    return 0


def measure(cache: KernelCache, tensors: int, sizes: int, launches: int) -> dict[str, Any]:
    """Medians, and the middle half, of microseconds by way of launching; the ways take turns."""
    ways = launchers(cache, tensors, sizes)
    for launch in ways.values():
        launch()
    samples: dict[str, list[float]] = {name: [] for name in ways}
    for _ in range(ROUNDS):
        for name, launch in ways.items():
            samples[name].append(_microseconds(launch, launches))
    quartiles = {name: statistics.quantiles(found, n=4) for name, found in samples.items()}
    return {
        "tensors": tensors,
        "sizes": sizes,
        **{
            name: {"median": round(q[1], 2), "from": round(q[0], 2), "to": round(q[2], 2)}
            for name, q in quartiles.items()
        },
    }


def launchers(cache: KernelCache, tensors: int, sizes: int) -> dict[str, Callable[[], object]]:
    """One launch of the same kernel with the same arguments, in each way."""
    kernel = _kernel(tensors, sizes)
    (launch,) = kernel.launches
    function = getattr(cache.load(kernel), launch.entry)
    given: dict[str, Any] = {one.name: torch.empty(64) for one in launch.arguments[:tensors]}
    given |= {one.name: 4096 + place for place, one in enumerate(launch.arguments[tensors:])}
    plain = {**given, **dict(launch.constants)}
    settings = {"num_warps": launch.num_warps, "num_stages": launch.num_stages}
    direct, grid = DirectLaunch(function, launch), (7, 1)
    generated = _generated(function[grid](**plain, **settings), launch)
    values = tuple(given.values())
    return {
        "JITFunction.run": lambda: function[grid](**plain, **settings),
        "direct launch": lambda: direct[grid](**plain, **settings),
        "Inductor's function": lambda: generated(*values, stream=0),
        **_by_autotuner(generated, values),
    }


def _kernel(tensors: int, sizes: int) -> KernelFile:
    """A kernel with so many tensors, the last of which it writes, and so many sizes."""
    names = [f"in_{place}_ptr" for place in range(tensors - 1)]
    numbers = [f"s{place}" for place in range(sizes)]
    total = " + ".join([f"tl.load({name} + x)" for name in names] + numbers)
    text = f"""
@triton.jit
def _sum_kernel({", ".join([*names, "out_ptr", *numbers])}, ROWS: tl.constexpr):
    x = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    tl.store(out_ptr + x, {total})
"""
    arguments = [
        *(Argument(name, "*fp32") for name in (*names, "out_ptr")),
        *(Argument(one, "i64") for one in numbers),
    ]
    launch = Launch("_sum_kernel", tuple(arguments), ("7",), (("ROWS", 128),))
    parameters = tuple(Parameter(name.removesuffix("_ptr")) for name in names)
    return KernelFile(
        f"sum_{tensors}_{sizes}", parameters, text, (launch,), (), "def reference(*given): ...", ""
    )


def _generated(compiled: Any, launch: Launch) -> Callable[..., object]:
    """The function that Inductor generates around a compiled kernel that a graph has."""
    from torch._inductor.runtime.triton_heuristics import Config, TritonCompileResult

    signature = {one.name: one.type for one in launch.arguments}
    constants = dict(launch.constants)
    meta = {
        "signature": signature | dict.fromkeys(constants, "constexpr"),
        "constants": constants,
        "device": 0,
    }
    config = Config(constants, num_warps=launch.num_warps, num_stages=launch.num_stages)
    inductor_meta = {"grid_type": "FixedGrid", "fixed_grid": ["7", "1", "1"], "extra_launcher_args": []}
    found: Callable[..., object] = TritonCompileResult(compiled, config, meta, inductor_meta).make_launcher()
    return found


def _by_autotuner(
    generated: Callable[..., object], values: tuple[Any, ...]
) -> dict[str, Callable[[], object]]:
    """As `CachingAutotuner.run` calls it once it is settled; nothing where torch has no such short way."""
    from torch._inductor.runtime.triton_heuristics import CachingAutotuner

    if "_cached_launcher" not in CachingAutotuner.run.__code__.co_names:
        return {}
    tuner = object.__new__(CachingAutotuner)
    tuner._cached_launcher = generated
    return {"Inductor's run": lambda: tuner.run(*values, stream=0)}


def _microseconds(launch: Callable[[], object], count: int) -> float:
    begin = time.thread_time()
    for _ in range(count):
        launch()
    return (time.thread_time() - begin) / count * 1e6


def _table(rows: list[dict[str, Any]]) -> Table:
    table = Table(title="Host time of a launch, microseconds (median; middle half)")
    for name in ("tensors", "sizes", *WAYS):
        table.add_column(name, justify="right")
    for row in rows:
        found = [row.get(way) for way in WAYS]
        figures = [
            f"{one['median']:.2f} ({one['from']:.2f}-{one['to']:.2f})" if one else "-" for one in found
        ]
        table.add_row(str(row["tensors"]), str(row["sizes"]), *figures)
    return table


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--launches", type=int, default=2000, help="in each round")
    parser.add_argument("--target", default="sm_90", help="what kernels are compiled for")
    parser.add_argument("--out", type=Path, help="JSON file")
    return parser


if __name__ == "__main__":
    raise SystemExit(main())
