"""What the front end makes of a function: Dynamo's graph, the normalized one, and what the latter returns."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from torch import fx

import fxopt.pipeline as pipeline
from fxopt.frontend.normalize import normalize
from fxopt.hosts.eager import EAGER
from fxopt.ir.ops import register_ops
from fxopt.options import Options
from fxopt.report.record import GraphRecord


@dataclass
class Captured:
    """The graphs of one function, in the order in which Dynamo gave them, and what they return."""

    result: Any = None
    dynamo: list[fx.GraphModule] = field(default_factory=list)
    graphs: list[fx.GraphModule] = field(default_factory=list)

    @property
    def graph(self) -> fx.GraphModule:
        """The only normalized graph."""
        (only,) = self.graphs
        return only


def capture(
    fn: Callable[..., Any], *inputs: Any, dynamic: bool | None = False, fullgraph: bool = True
) -> Captured:
    """Normalize the graphs of `fn` and run them op by op, without any pass. Whatever fails is raised."""
    register_ops()
    found = Captured()

    def backend(gm: fx.GraphModule, example_inputs: Sequence[Any]) -> Callable[..., Any]:
        found.dynamo.append(gm)
        found.graphs.append(normalize(gm, example_inputs))
        return EAGER.compile(copy.deepcopy(found.graphs[-1]), example_inputs, Options(), GraphRecord(0))

    torch._dynamo.reset()
    found.result = torch.compile(fn, backend=backend, dynamic=dynamic, fullgraph=fullgraph)(*inputs)
    return found


def watch_lowered(monkeypatch: pytest.MonkeyPatch) -> list[fx.GraphModule]:
    """The graphs that hosts are given from now on, filled as compilation goes on."""
    lowered: list[fx.GraphModule] = []
    lower = pipeline.lower

    def watched(*arguments: Any) -> fx.GraphModule:
        lowered.append(lower(*arguments))
        return lowered[-1]

    monkeypatch.setattr(pipeline, "lower", watched)
    return lowered


def calls(gm: fx.GraphModule) -> Iterator[fx.Node]:
    """All calls in `gm` and in its sub-graphs."""
    for module in gm.modules():
        if isinstance(module, fx.GraphModule):
            yield from (node for node in module.graph.nodes if node.op == "call_function")


def targets(gm: fx.GraphModule) -> list[str]:
    """The names of the functions that one graph calls, in order."""
    return [_name(node.target) for node in gm.graph.nodes if node.op == "call_function"]


def subgraph_targets(gm: fx.GraphModule) -> dict[str, list[str]]:
    """For each direct sub-graph module, the functions that it calls."""
    return {
        name: targets(module) for name, module in gm.named_children() if isinstance(module, fx.GraphModule)
    }


def _name(target: Any) -> str:
    return (
        str(target) if isinstance(target, torch._ops.OpOverload) else str(getattr(target, "__name__", target))
    )
