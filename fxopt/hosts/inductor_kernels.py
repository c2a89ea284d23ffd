"""fxopt's kernels in the graphs that TorchInductor compiles for a GPU.

They are put there behind autograd, as torch's own nodes for Triton kernels, before Inductor fuses anything
and decides what is written in place. Inductor plans their memory and launches them, also within CUDA graphs.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch import fx

from fxopt.errors import UnsupportedTarget
from fxopt.hosts.host import Notes
from fxopt.hosts.kernels import wants_kernels
from fxopt.ir.contract import Evidence, Status
from fxopt.ir.copy_graph import copy_of
from fxopt.options import EMIT_KERNELS, Options

if TYPE_CHECKING:
    from fxopt.codegen.emit import Decide

UNMEASURED = (
    "all is left to TorchInductor: kernels are used where they were measured to be faster, under "
    'mode="max-autotune" or options={"tune_seconds": 60}, and all of them, unmeasured, with '
    'options={"kernels": "always"}'
)


def emitter(options: Options, notes: Notes) -> Callable[[fx.Graph], None] | None:
    """What puts kernels into a graph, in place; None when the options leave all to Inductor.

    A fault of fxopt leaves the graph as it was, and a note, unless `options.strict`.
    """
    if not wants_kernels(options):
        return None
    if options.kernels == "auto" and not options.measuring_seconds:
        notes.evidence.append(Evidence(EMIT_KERNELS, "graph", "-", Status.DISABLED, UNMEASURED))
        return None

    def emit(graph: fx.Graph) -> None:
        if is_part_of_an_op(graph):
            return
        before = copy_of(graph)
        try:
            _emit(graph, options, notes)
        except Exception as error:
            if options.strict:
                raise
            _restore(graph, before)
            notes.fail(EMIT_KERNELS, error)

    return emit


def mark_parts_of_ops(gm: fx.GraphModule) -> None:
    """Mark the graphs below `gm` that Inductor writes into the code of an op, such as what a scan combines
    with or what flex attention does to a score: they have no launches of their own."""
    for node in gm.graph.find_nodes(op="get_attr"):
        inner = getattr(gm, str(node.target), None)
        if isinstance(inner, fx.GraphModule):
            inner.meta[_PART] = any(user.target in _written_into() for user in node.users)
            mark_parts_of_ops(inner)


def is_part_of_an_op(graph: fx.Graph) -> bool:
    """Whether `mark_parts_of_ops` has marked the graph so."""
    return graph.owning_module is not None and bool(graph.owning_module.meta.get(_PART))


def _written_into() -> tuple[Any, ...]:
    ops = torch.ops.higher_order
    return ops.associative_scan, ops.flex_attention, ops.flex_attention_backward


_PART = "fxopt_part_of_an_op"


def _emit(graph: fx.Graph, options: Options, notes: Notes) -> None:
    from fxopt.codegen.emit import emit_kernels
    from fxopt.runtime.launch import dissolve_ops

    owner = graph.owning_module
    assert owner is not None
    with _decider(options) as decide:
        kernels, evidence = emit_kernels(owner, options, call=True, decide=decide)
    dissolve_ops(graph)
    graph.lint()
    notes.kernels += kernels
    notes.evidence += evidence


@contextmanager
def _decider(options: Options) -> Iterator[Decide | None]:
    """What decides about kernels by measuring them on this machine's GPU; None: all are used."""
    from fxopt.codegen.emit import target_of
    from fxopt.codegen.timing import GpuTimer
    from fxopt.codegen.tune import Budget, Tuner
    from fxopt.runtime.kernel_cache import cache_of

    try:
        target = target_of(options)
    except UnsupportedTarget:  # of which `emit_kernels` leaves evidence
        target = None
    if not options.measuring_seconds or target is None:
        yield None
        return
    cache = cache_of(options)
    timer = GpuTimer(cache, _config(options))
    budget = Budget(options.measuring_seconds)
    try:
        yield Tuner(cache, timer, target, budget, always=options.kernels == "always").decide
    finally:
        timer.close()


def _config(options: Options) -> dict[str, Any]:
    """Inductor's configuration for the regions that kernels are compared with."""
    from torch._inductor import list_mode_options

    mode = {} if options.mode == "default" else list_mode_options(options.mode)
    return {**mode, **plain_config(options), "triton.cudagraphs": False}


def plain_config(options: Options) -> dict[str, Any]:
    """What the user gave for Inductor, as far as another process can be given it."""
    given = options.host_config.items()
    return {name: value for name, value in given if isinstance(value, (bool, int, float, str))}


def _restore(graph: fx.Graph, before: fx.Graph) -> None:
    for node in reversed(list(graph.nodes)):
        graph.erase_node(node)
    graph.output(graph.graph_copy(before, {}))
