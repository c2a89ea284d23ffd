"""Linear layers with quantized weights on a CPU, beside Inductor: `python -m benchmarks.quantized_linear`.

One line for each shape of the weight and number of tokens: the dense layer in bfloat16 under Inductor, the
same product with a weight that oneDNN has packed (the best that a dense weight can do), and fxopt in each
format. Ratios are times of Inductor in bfloat16 by times of the candidate, taken within each round.
``--cold`` takes turns between as many weights as do not fit in the processor's cache, as a model's layers do.
"""

from __future__ import annotations

import argparse
import json
import math
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field
from itertools import cycle
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch import nn

import fxopt
from fxopt.measure.machine import describe
from fxopt.measure.timing import interleave

SHAPES = ((2048, 2048), (8192, 2048), (2048, 8192))
TOKENS = (1, 4, 16, 128)
SCHEMES = ("int8-dynamic", "int8", "int4", "nf4", "fp8")
# More than the cache of the machines that this has run on.
COLD_BYTES = 2**28


@dataclass(frozen=True)
class Line:
    """One shape. `ratios`: by candidate, how many times faster than Inductor in bfloat16 it is."""

    rows: int
    columns: int
    tokens: int
    cold: bool
    microseconds: dict[str, float] = field(default_factory=dict)
    ratios: dict[str, dict[str, float]] = field(default_factory=dict)


def measure(rows: int, columns: int, tokens: int, *, cold: bool, rounds: int) -> Line:
    """Times all candidates side by side."""
    torch.manual_seed(0)
    copies = math.ceil(COLD_BYTES / (2 * rows * columns)) if cold else 1
    x = torch.randn(tokens, columns).bfloat16()
    layers = [nn.Linear(columns, rows, bias=False).bfloat16() for _ in range(copies)]
    candidates = {name: _in_turn(calls) for name, calls in _candidates(layers, x).items()}
    for call in candidates.values():
        call()
    times = interleave(candidates, rounds=rounds)
    micro = {name: round(times.median(name) * 1e6, 1) for name in candidates}
    ratios = {name: times.ratio("inductor", name).as_dict() for name in candidates if name != "inductor"}
    return Line(rows, columns, tokens, cold, micro, ratios)


def _candidates(layers: list[nn.Linear], x: torch.Tensor) -> dict[str, list[Callable[[], Any]]]:
    """By name, one call for each layer."""
    found: dict[str, list[Callable[[], Any]]] = {}
    packed = [torch.ops.mkldnn._reorder_linear_weight(each.weight.detach(), x.shape[0]) for each in layers]
    product = torch.ops.mkldnn._linear_pointwise
    found["inductor"] = [_bound(torch.compile(each, backend="inductor"), x) for each in layers]
    found["inductor again"] = found["inductor"]
    found["packed bfloat16"] = [_bound(product, x, each, None, "none", [], "") for each in packed]
    for scheme in SCHEMES:
        modules = [fxopt.prepare(nn.Sequential(_copy(each)), scheme) for each in layers]
        found[scheme] = [_bound(torch.compile(each, backend="fxopt"), x) for each in modules]
    return found


def _copy(layer: nn.Linear) -> nn.Linear:
    copy = nn.Linear(layer.in_features, layer.out_features, bias=False, device="meta")
    copy.weight = nn.Parameter(layer.weight.detach().clone())
    return copy


def _bound(call: Callable[..., Any], *args: Any) -> Callable[[], Any]:
    return lambda: call(*args)


def _in_turn(calls: list[Callable[[], Any]]) -> Callable[[], Any]:
    turns = cycle(calls)
    return lambda: next(turns)()


def lines(options: argparse.Namespace) -> Iterator[Line]:
    """One shape after the other."""
    for rows, columns in options.shapes:
        for tokens in options.tokens:
            torch._dynamo.reset()
            yield measure(rows, columns, tokens, cold=options.cold, rounds=options.rounds)


def table(found: list[Line]) -> Table:
    """Ratios to Inductor in bfloat16."""
    names = list(found[0].ratios)
    made = Table("N x K", "tokens", "inductor us", *names)
    for line in found:
        ratios = [f"{line.ratios[name]['median']:.2f}x" for name in names]
        made.add_row(
            f"{line.rows} x {line.columns}", str(line.tokens), f"{line.microseconds['inductor']:.0f}", *ratios
        )
    return made


def _shape(text: str) -> tuple[int, int]:
    rows, columns = text.split("x")
    return int(rows), int(columns)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--shapes", nargs="*", type=_shape, default=SHAPES, help="NxK, as 2048x2048")
    parser.add_argument("--tokens", nargs="*", type=int, default=TOKENS)
    parser.add_argument("--rounds", type=int, default=40)
    parser.add_argument("--cold", action="store_true", help="weights that are not in the cache")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--json", type=Path, help="where the figures are written")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    with torch.inference_mode():
        found = list(lines(options))
    Console().print(table(found))
    if options.json is not None:
        figures = {
            "machine": describe(),
            "threads": options.threads,
            "lines": [asdict(line) for line in found],
        }
        options.json.write_text(json.dumps(figures, indent=1) + "\n")


if __name__ == "__main__":
    main()
