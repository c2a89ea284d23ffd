"""Compiles a function whose linear layers are to be quantized, and keeps what tests look at."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import fx

from fxopt.frontend.normalize import normalize
from fxopt.frontend.packed_weights import hide_parameters, show_parameters
from fxopt.ir.contract import Evidence
from fxopt.ir.ops import register_ops
from fxopt.ir.quantize import quantize
from fxopt.ir.quantized_weight import QuantizedWeight
from fxopt.options import Options
from fxopt.pipeline import compile_graph, load_passes, run_pass
from fxopt.report.record import collect

from .golden import render

NAME = "substitute-qlinear"
NAMES = (NAME, "substitute-expert-products")


@dataclass
class Quantized:
    """The compiled function, and the evidence of the passes, one list a graph."""

    call: Callable[..., Any]
    evidence: list[list[Evidence]] = field(default_factory=list)

    @property
    def entries(self) -> list[Evidence]:
        return [each for graph in self.evidence for each in graph]

    @property
    def applied(self) -> list[str]:
        return [each.reason for each in self.entries if each.status.value == "applied"]

    @property
    def refused(self) -> list[str]:
        return [each.reason for each in self.entries if each.status.value != "applied"]


def quantizing(
    fn: Callable[..., Any],
    scheme: Any = "int8",
    *,
    dynamic: bool | None = False,
    host: str = "eager",
    **more: Any,
) -> Quantized:
    """`fn` compiled by fxopt with `options={"quantize": scheme, **more}`."""
    found = Quantized(fn)
    options = Options.parse(options={"quantize": scheme, "host": host, "strict": True, **more})

    def backend(gm: fx.GraphModule, inputs: Sequence[Any]) -> Callable[..., Any]:
        with collect(private=True) as records:
            compiled = compile_graph(gm, inputs, options)
        assert not records[0].failures and not records[0].refusals
        found.evidence.append([each for each in records[0].evidence if each.rewrite in NAMES])
        return compiled

    found.call = torch.compile(fn, backend=backend, dynamic=dynamic, fullgraph=True)
    return found


def texts(
    fn: Callable[..., Any], args: Sequence[Any], scheme: str = "int8", name: str = NAME
) -> tuple[str, str]:
    """The graph of `fn`, before and after the pass of this name."""
    register_ops()
    seen: list[str] = []

    def backend(gm: fx.GraphModule, inputs: Sequence[Any]) -> Callable[..., Any]:
        normal = normalize(gm, inputs)
        seen.append(render(normal))
        show_parameters(normal, inputs)
        (one,) = (each for each in load_passes() if each.name == name)
        run_pass(one, normal, Options.parse(options={"quantize": scheme, "strict": True}))
        hide_parameters(normal)
        seen.append(render(normal))
        return gm.forward

    torch.compile(fn, backend=backend, fullgraph=True)(*args)
    return seen[0], seen[1]


def with_rounded(
    module: torch.nn.Module, names: Sequence[str], format: str, group: int | None = None
) -> None:
    """Replace weights of layers by what they are once they are quantized."""
    with torch.no_grad():
        for name in names:
            weight = module.get_submodule(name).weight
            weight.copy_(rounded(weight, format, group).dequantize(weight.dtype))


def rounded(weight: torch.Tensor, format: str, group: int | None = None) -> QuantizedWeight:
    return quantize(weight.detach(), format, group)
