"""What AOTAutograd makes of a function that fxopt has rewritten."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import fx
from torch._functorch.aot_autograd import aot_module_simplified, make_boxed_func

from fxopt.codegen.attention_emit import kernel_serves
from fxopt.frontend.lower import lower
from fxopt.frontend.normalize import normalize
from fxopt.ir.graph_facts import Kernels
from fxopt.ir.ops import register_ops
from fxopt.options import Options
from fxopt.pipeline import rewrite
from fxopt.report.record import GraphRecord

_CPU = frozenset({"cpu"})
_KERNELS = Kernels(_CPU, functools.partial(kernel_serves, devices=_CPU))


def graphs_of(
    model: Callable[..., Any],
    kwargs: dict[str, Any],
    *,
    training: bool,
    dynamic: bool | None = None,
    decompositions: Mapping[Any, Any] | None = None,
    kernels: bool = False,
) -> list[fx.GraphModule]:
    """The forward and backward graphs of a call, after AOTAutograd. `kernels`: attention stays, for them."""
    register_ops()
    seen: list[fx.GraphModule] = []

    def compiler(gm: fx.GraphModule, inputs: Sequence[Any]) -> Callable[..., Any]:
        seen.append(gm)
        return make_boxed_func(gm.forward)

    def backend(gm: fx.GraphModule, inputs: Sequence[Any]) -> Callable[..., Any]:
        record = GraphRecord(index=0)
        normal = normalize(gm, inputs)
        rewrite(normal, Options(strict=True), record)
        lowered = lower(normal, record, _KERNELS if kernels else None)
        return aot_module_simplified(
            lowered, inputs, fw_compiler=compiler, bw_compiler=compiler, decompositions=decompositions
        )

    result = torch.compile(model, backend=backend, dynamic=dynamic)(**kwargs)
    if training:
        first = result if isinstance(result, torch.Tensor) else result[0]
        first.float().square().mean().backward()
    return seen
