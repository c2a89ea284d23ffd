"""Semantic ops -> what the host compiles: each call is replaced by its provider's ops.

After this stage the graph holds nothing that the host does not know, so that Inductor fuses around it and
its caches key on what is really computed. The trace of a provider is kept per signature: the layers of a
model share it.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import fx
from torch._subclasses import FakeTensorMode
from torch.utils import _pytree as pytree

from fxopt.frontend.constants import restore_constants
from fxopt.frontend.dead_code import erase_unused
from fxopt.frontend.outputs import keep_output_layout, output_layout, with_strides
from fxopt.frontend.restore_writes import restore_writes
from fxopt.frontend.retrace import fresh, traced
from fxopt.ir.graph_facts import Facts, Kernels
from fxopt.ir.ops import Provider, SemanticOp, semantic_op
from fxopt.ir.propagate import equivalent, evaluate, fake_mode_of, propagate_from, signature
from fxopt.report.record import GraphRecord

_KEPT_META = ("stack_trace", "nn_module_stack", "source_fn_stack", "seq_nr")


def lower(gm: fx.GraphModule, record: GraphRecord, kernels: Kernels | None = None) -> fx.GraphModule:
    """Replace the semantic ops of `gm` and of its sub-graphs, in place. Returns `gm`.

    Args:
        kernels: says of a call whether the host will put a kernel in its place. None: it makes none.
    """
    for module in gm.modules():
        if isinstance(module, fx.GraphModule):
            _lower_graph(module, record, kernels)
            restore_writes(module)
            restore_constants(module)
            module.recompile()
            if module is not gm:
                _forget_outputs(module)
    return gm


def _forget_outputs(subgraph: fx.GraphModule) -> None:
    """Torch reads from the values of a nested region's outputs which need grad; ours never do."""
    for node in subgraph.graph.output_node().all_input_nodes:
        node.meta.pop("val", None)


def _lower_graph(gm: fx.GraphModule, record: GraphRecord, kernels: Kernels | None) -> None:
    unused: dict[fx.Node, None] = {}
    calls = [(node, op) for node in gm.graph.nodes if (op := semantic_op(node)) is not None]
    if not calls:
        return
    mode = fake_mode_of(gm.graph)
    facts = Facts(gm.graph, kernels)
    layout = output_layout(gm.graph)
    traces: dict[Any, fx.GraphModule] = {}
    for node, op in calls:
        provider, said = op.choose(node, facts)
        record.note_provider(node, op.name, provider.name, "; ".join(said))
        trace = _trace(op, provider, node, mode, traces)
        unused |= dict.fromkeys(node.all_input_nodes)
        _inline(gm.graph, node, trace, facts, mode)
    # A mask whose formula is used needs no tensor.
    erase_unused(unused)
    keep_output_layout(gm, layout)
    gm.graph.lint()
    gm.recompile()


def _trace(
    op: SemanticOp,
    provider: Provider,
    node: fx.Node,
    mode: FakeTensorMode | None,
    traces: dict[Any, fx.GraphModule],
) -> fx.GraphModule:
    flat, spec = pytree.tree_flatten((node.args, node.kwargs))
    key = (op.name, provider.name, spec, tuple(map(signature, flat)))
    if key in traces:
        return traces[key]
    nodes = [arg for arg in flat if isinstance(arg, fx.Node)]

    def call(*values: Any) -> Any:
        given = iter(values)
        args, kwargs = pytree.tree_unflatten(
            [next(given) if isinstance(a, fx.Node) else a for a in flat], spec
        )
        return provider.build(*args, **kwargs)

    if mode is None:
        raise ValueError(f"{node.name}: a semantic op in a graph without tensors")
    # Nodes may share one value, as copies of one trace do, and an argument may be given twice here and not in
    # a call that shares the trace: by the same object tracing would take two inputs for one.
    inputs = [fresh(arg.meta["val"], mode) for arg in nodes]
    with mode, torch.no_grad():
        traces[key] = traced(call, *inputs)
    return traces[key]


def _inline(
    graph: fx.Graph, node: fx.Node, trace: fx.GraphModule, facts: Facts, mode: FakeTensorMode | None
) -> None:
    """Copy `trace` in the place of `node`; inside of an autocast region, under a disabled one."""
    flat, _ = pytree.tree_flatten((node.args, node.kwargs))
    inputs = iter(arg for arg in flat if isinstance(arg, fx.Node))
    env = {placeholder: next(inputs) for placeholder in trace.graph.find_nodes(op="placeholder")}
    with graph.inserting_before(node):
        guard = _disable_autocast(graph, node) if facts.in_autocast(node) else None
        for inner in trace.graph.nodes:
            if inner.op not in ("placeholder", "output"):
                env[inner] = _copy(graph, inner, env, node)
        if guard is not None:
            graph.call_function(torch.amp.autocast_mode._exit_autocast, (guard,)).meta["val"] = None
        result = fx.node.map_arg(trace.graph.output_node().args[0], lambda n: env[n])
        if isinstance(result, fx.Node) and mode is not None:
            result = _in_layout_of_readers(graph, node, result, facts, mode)
    _rewire(graph, node, result)


def _in_layout_of_readers(
    graph: fx.Graph, node: fx.Node, result: fx.Node, facts: Facts, mode: FakeTensorMode
) -> fx.Node:
    """`result`, which a provider may lay out in another way than the op's body; a copy if a reader of `node`
    can not take that.
    """
    recorded = node.meta["val"]
    if equivalent(recorded, result.meta["val"]):
        return result
    before: dict[fx.Node, Any] = {}
    users = list(node.users)
    node.replace_all_uses_with(result)
    try:
        propagate_from(result, recorded, mode, before.setdefault, lambda n: facts.mode_at(n)[1])
    except (RuntimeError, ValueError):  # a view that needs the strides that were recorded
        for changed, value in before.items():
            changed.meta["val"] = value
        copy = with_strides(graph, result, recorded)
        copy.meta["val"] = evaluate(copy, mode)
        for user in users:
            user.replace_input_with(result, copy)
        return copy
    return result


def _copy(graph: fx.Graph, inner: fx.Node, env: dict[fx.Node, fx.Node], origin: fx.Node) -> fx.Node:
    if inner.op != "call_function":
        raise ValueError(f"{inner.format_node()}: the body of {origin.target} holds state")
    copy = graph.node_copy(inner, lambda n: env[n])
    for key in _KEPT_META:
        copy.meta.pop(key, None)
        if key in origin.meta:
            copy.meta[key] = origin.meta[key]
    return copy


def _disable_autocast(graph: fx.Graph, node: fx.Node) -> fx.Node:
    device = (
        node.meta["val"].device if isinstance(node.meta["val"], torch.Tensor) else node.meta["val"][0].device
    )
    enter = torch.amp.autocast_mode._enter_autocast
    guard = graph.call_function(enter, (device.type, None, False, None))
    guard.meta["val"] = None
    return guard


def _rewire(graph: fx.Graph, node: fx.Node, result: Any) -> None:
    if isinstance(result, fx.Node):
        node.replace_all_uses_with(result)
        graph.erase_node(node)
        return
    for user in list(node.users):
        user.replace_all_uses_with(result[user.args[1]])
        graph.erase_node(user)
    graph.erase_node(node)
