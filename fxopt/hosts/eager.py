"""The host without a compiler: op by op, with emitted kernels in Triton's interpreter."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import fx
from torch.utils.checkpoint import checkpoint, noop_context_fn

from fxopt.hosts.host import Host, Notes
from fxopt.hosts.kernels import compile_with_kernels, makes_kernels
from fxopt.options import Options


def _compile(
    gm: fx.GraphModule, example_inputs: Sequence[Any], options: Options, notes: Notes
) -> Callable[..., Any]:
    if makes_kernels(options, example_inputs):
        return compile_with_kernels(gm, example_inputs, options, notes)
    for module in gm.modules():
        if isinstance(module, fx.GraphModule):
            _call_checkpoint(module)
            _call_regions(module)
    return gm.forward


def _call_checkpoint(gm: fx.GraphModule) -> None:
    """Replace torch's operator for checkpointed code, which is made for tracing, by what it stands for.

    Run as it is, the operator does not restore the random state before it recomputes, because Inductor does
    so by other means: gradients behind a dropout would be wrong.
    """
    calls = gm.graph.find_nodes(
        op="call_function", target=torch.ops.higher_order.tag_activation_checkpoint, sort=False
    )
    for node in calls:
        node.target = _checkpointed
    if calls:
        gm.recompile()


def _checkpointed(body: fx.GraphModule, *args: Any, **options: Any) -> Any:
    # As in the operator: the end of a recomputation may be what leaves a mode that the body has entered.
    options |= {"use_reentrant": False, "early_stop": False}
    return checkpoint(body, *args, context_fn=_contexts(body), **options)


def _call_regions(gm: fx.GraphModule) -> None:
    """Call nested compile regions directly: torch's operator for them has a backward for tracing only."""
    calls = gm.graph.find_nodes(op="call_function", target=torch.ops.higher_order.invoke_subgraph, sort=False)
    for node in calls:
        node.target = _run_region
    if calls:
        gm.recompile()


def _run_region(body: fx.GraphModule, identifier: str, *operands: Any) -> Any:
    return body(*operands)


def _contexts(body: fx.GraphModule) -> Callable[[], Any]:
    """The function that the user gave for selective checkpointing, which Dynamo keeps here."""
    found: Callable[[], Any] = body.meta.get("_checkpoint_context_fn", noop_context_fn)
    return found


EAGER = Host("eager", _compile)
