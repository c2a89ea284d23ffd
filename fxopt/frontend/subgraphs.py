"""Which outer nodes the inputs of sub-graphs stand for, so that facts can be followed outwards."""

from __future__ import annotations

import torch
from torch import fx
from torch._ops import HigherOrderOperator
from torch.utils import _pytree as pytree

from fxopt.ir.cone import inside

OUTER_KEY = "fxopt_outer"
# The calls of a sub-graph, kept on its inputs.
CALLS_KEY = "fxopt_calls"

# Higher-order ops whose sub-graphs are ordinary forward code of the user, run once for each call on its
# operands. The sub-graphs of all others (loops, flex attention, autograd.Function) mean something else: their
# consumers read them as Dynamo wrote them.
PLAIN_CALLS = frozenset(
    {
        "tag_activation_checkpoint",
        "wrap_activation_checkpoint",
        "wrap",
        "wrap_with_set_grad_enabled",
        "wrap_with_autocast",
        "cond",
        "invoke_subgraph",
    }
)


# Those that take the sub-graph first, and then one argument for each of its inputs.
_FLAT_CALLS = frozenset({"tag_activation_checkpoint", "wrap_activation_checkpoint", "wrap"})


def link_subgraphs(gm: fx.GraphModule) -> None:
    """Note on each input of a sub-graph what its calls pass for it; one entry a call, None for a constant.

    Rewrites replace nodes of the outer graph, so this is done anew before facts are asked.
    """
    unlink_subgraphs(gm)
    for module in _graph_modules(gm):
        for node in module.graph.nodes:
            if isinstance(node.target, HigherOrderOperator) and node.target.name() in PLAIN_CALLS:
                _link_call(module, node)


def _link_call(gm: fx.GraphModule, call: fx.Node) -> None:
    called: list[fx.GraphModule] = []
    operands: list[fx.Node | None] = []
    for arg in pytree.tree_leaves(call.args):
        node = arg if isinstance(arg, fx.Node) else None
        held = getattr(gm, str(node.target), None) if node is not None and node.op == "get_attr" else None
        if isinstance(held, fx.GraphModule):
            called.append(held)
        else:
            operands.append(node)
    for module in called:
        placeholders = module.graph.find_nodes(op="placeholder")
        if len(operands) < len(placeholders):
            continue
        # What is not passed on (a predicate, an identifier) comes first.
        passed = operands[len(operands) - len(placeholders) :]
        for placeholder, outer in zip(placeholders, passed, strict=True):
            placeholder.meta[OUTER_KEY] = (*placeholder.meta.get(OUTER_KEY, ()), outer)
            placeholder.meta[CALLS_KEY] = (*placeholder.meta.get(CALLS_KEY, ()), call)


def unlink_subgraphs(gm: fx.GraphModule) -> None:
    """Drop what `link_subgraphs` noted: references between graphs must not outlive the passes."""
    for module in _graph_modules(gm):
        for placeholder in module.graph.find_nodes(op="placeholder"):
            placeholder.meta.pop(OUTER_KEY, None)
            placeholder.meta.pop(CALLS_KEY, None)


def pass_in(outer: fx.Node, graph: fx.Graph) -> fx.Node | None:
    """The input of a sub-graph that stands for `outer`, a node of the graph around it; a new one if need be.

    None when the calls of the sub-graph take no further operand, or come before `outer`.
    """
    try:
        return inside(graph, outer)
    except LookupError:
        placeholders = graph.find_nodes(op="placeholder")
    calls: tuple[fx.Node, ...] = placeholders[-1].meta.get(CALLS_KEY, ()) if placeholders else ()
    if not calls or not all(_takes(call, outer) for call in calls):
        return None
    with graph.inserting_after(placeholders[-1]):
        made = graph.placeholder(outer.name)
    made.meta = {"val": outer.meta["val"], OUTER_KEY: (outer,) * len(calls), CALLS_KEY: calls}
    for call in calls:
        call.args = (*call.args, outer)
        call.graph.owning_module.recompile()  # type: ignore[union-attr]
    return made


def _takes(call: fx.Node, outer: fx.Node) -> bool:
    flat = isinstance(call.target, HigherOrderOperator) and call.target.name() in _FLAT_CALLS
    return flat and call.graph is outer.graph and outer < call


def _graph_modules(gm: torch.nn.Module) -> list[fx.GraphModule]:
    return [module for module in gm.modules() if isinstance(module, fx.GraphModule)]
