"""Regions of a model beside Inductor, and beside what the memory allows: the roofline of each.

By region, dtype and shape: the time of the region under Inductor and under fxopt, on a GPU with all its
kernels fxopt's, the speed of a large copy timed beside, and how near to the floor the region comes: its bytes
(every input and output once; in training what fxopt's kernels say) at the speed of that copy. Inputs that fit
into a cache can be faster than the floor. Without a GPU and with `TRITON_INTERPRET=1` kernels run in Triton's
interpreter, which shows that they run, and nothing of time.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch.nn import functional as F
from torch.utils import _pytree as pytree

from fxopt.measure.compare import faults_of, figures
from fxopt.measure.compiled import BASELINE, CANDIDATE, EAGER, TUNED, TWIN, compile_with
from fxopt.measure.jobs import Job
from fxopt.measure.results import Row
from fxopt.measure.suite import release
from fxopt.measure.timing import Timings, interleave
from fxopt.options import Options
from fxopt.report.record import collect
from fxopt.suites.plan import Plan, chosen, milliseconds, over

Value = torch.Tensor
TITLE = "regions: time of inductor / time of fxopt: more than 1 means that fxopt is faster"
COLUMNS: dict[str, Callable[[Row], str]] = {
    "inductor ms": milliseconds(BASELINE),
    "fxopt ms": milliseconds(CANDIDATE),
    "over eager": over(EAGER),
    "of a copy": lambda row: f"{row['share']:.0%}" if row.get("share") else "-",
    "kernels": lambda row: str(len(row["kernels"])),
}
SHAPES = {
    "tiny": ("8x256",),
    "small": ("256x1024", "1024x2048"),
    "full": ("16384x2048", "16384x4096", "8192x8192"),
}
# Bytes of the tensor whose copy is timed.
_COPIED = {"tiny": 1 << 20, "small": 1 << 26, "full": 1 << 29}


@dataclass(frozen=True)
class Region:
    """A piece of a model.

    Attributes:
        flops: operations for each element of the first input, by the formula; a function is one.
        read: how many of the inputs it reads; a row of weights after them is next to nothing.
    """

    run: Callable[[Value, Value, Value], Any]
    flops: int
    read: int


def add_rms_norm(x: Value, y: Value, weight: Value) -> tuple[Value, Value]:
    total = x + y
    wide = total.float()
    return total, weight * (wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + 1e-6)).to(x.dtype)


def layer_norm(x: Value, y: Value, weight: Value) -> Value:
    return F.layer_norm(x + y, x.shape[-1:], weight, weight)


def softmax(x: Value, y: Value, weight: Value) -> Value:
    return (x * 0.125 + y).softmax(-1)


def gate(x: Value, y: Value, weight: Value) -> Value:
    return F.silu(x) * y


def rope(x: Value, y: Value, weight: Value) -> Value:
    """Of (1, rows, heads of 128), with the change to (1, heads, rows, 128) that attention wants."""
    heads = x.view(1, x.shape[0], -1, 128).transpose(1, 2)
    cos, sin = weight[:128].cos(), weight[:128].sin()
    turned = torch.cat([-heads[..., 64:], heads[..., :64]], -1)
    return (heads * cos + turned * sin).contiguous()


REGIONS = {
    "add_rms_norm": Region(add_rms_norm, 5, 3),
    "layer_norm": Region(layer_norm, 8, 3),
    "softmax": Region(softmax, 6, 2),
    "gate": Region(gate, 5, 2),
    "rope": Region(rope, 4, 1),
}


def jobs(plan: Plan) -> list[Job]:
    """One for each region, shape, dtype and phase; `--models` names regions."""
    dtypes = ("bfloat16", "float32") if plan.size == "full" else (plan.dtype,)
    phases = [False] * plan.infer + [True] * plan.train
    names = ("region", "shape", "dtype", "training")
    regions = chosen("--models", plan.models, tuple(REGIONS)) or REGIONS
    return [
        Job(dict(zip(names, case, strict=True)), functools.partial(_measure, plan, *case))
        for case in itertools.product(regions, SHAPES[plan.size], dtypes, phases)
    ]


def _measure(plan: Plan, region: str, shape: str, dtype: str, training: bool) -> Row:
    rows, width = map(int, shape.split("x"))
    torch.manual_seed(0)
    how: dict[str, Any] = {"device": plan.device, "dtype": getattr(torch, dtype), "requires_grad": training}
    inputs = [torch.randn(sizes, **how) for sizes in ((rows, width), (rows, width), (width,))]
    run = REGIONS[region].run
    release()
    with collect() as records:
        steps = {CANDIDATE: _step(compile_with(run, CANDIDATE, _options(plan)), inputs, training)}
        steps[CANDIDATE]()
    for name in (BASELINE, *([TUNED] if plan.tuned else [])):
        steps[name] = _step(compile_with(run, name), inputs, training)
    steps |= {EAGER: _step(run, inputs, training), TWIN: steps[BASELINE]}
    source = torch.empty(_COPIED[plan.size], dtype=torch.int8, device=plan.device)
    target = torch.empty_like(source)
    for step in steps.values():
        step()
    times = interleave({**steps, "copy": lambda: target.copy_(source)}, budget_seconds=plan.budget)
    rate = 2 * source.nbytes / times.median("copy")
    kernels = [kernel for record in records for kernel in record.kernels]
    moved = sum(kernel.about.seen[0] for kernel in kernels)
    moved = moved if training else _bytes(inputs[: REGIONS[region].read], run(*inputs))
    ours = times.median(CANDIDATE)
    return {
        **figures(Timings({name: times.seconds[name] for name in steps})),
        "bytes": moved,
        "flops": None if training else REGIONS[region].flops * rows * width,
        "kernels": [kernel.name for kernel in kernels],
        "copy_bytes_per_second": rate,
        "share": moved / ours / rate if moved else None,
        "faults": faults_of(records),
    }


def _options(plan: Plan) -> dict[str, Any]:
    """On a GPU every region is to be fxopt's; in the interpreter nothing else can run kernels."""
    if plan.device.startswith("cuda"):
        return {"kernels": "always", **plan.options}
    return {"host": "eager", **plan.options} if Options.parse().interpret else dict(plan.options)


def _step(function: Callable[..., Any], inputs: list[Value], training: bool) -> Callable[[], object]:
    if not training:
        return lambda: function(*inputs)

    def step() -> object:
        made = function(*inputs)
        made = made if isinstance(made, tuple) else (made,)
        sources = [one for one in inputs if one.requires_grad]
        return torch.autograd.grad(made, sources, [one.detach() for one in made], allow_unused=True)

    return step


def _bytes(inputs: list[Value], outputs: Any) -> int:
    return sum(one.nbytes for one in (*inputs, *pytree.tree_leaves(outputs)))
