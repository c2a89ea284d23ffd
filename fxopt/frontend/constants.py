"""Tensors that the traced code makes of literals, ``torch.tensor([])``: calls again, as Dynamo wrote them.

The re-trace runs such a call at once and keeps its result as an attribute of the graph module. AOTAutograd
would take the attribute for a parameter that Dynamo does not know, and Inductor for an input instead of a
constant.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import fx
from torch._dynamo.source import ConstantSource

# A literal of more elements than this stays an attribute: as text it would blow up the graph.
LARGEST = 64


def restore_constants(gm: fx.GraphModule) -> None:
    """Write small constants as calls of `torch.tensor`, and tell AOTAutograd where the others come from."""
    sources = getattr(gm, "_param_name_to_source", None)
    for node in gm.graph.find_nodes(op="get_attr"):
        value = getattr(gm, str(node.target), None)
        if not isinstance(value, torch.Tensor) or isinstance(value, torch.nn.Parameter):
            continue
        copies = [user for user in node.users if user.target is torch.ops.aten.lift_fresh_copy.default]
        if value.numel() <= LARGEST and len(copies) == len(node.users):
            _write_calls(gm.graph, node, copies, value)
        elif sources is not None and node.target not in sources:
            sources[str(node.target)] = ConstantSource(f"fxopt_{node.target}")
    _delete_unused_buffers(gm)


def _write_calls(graph: fx.Graph, node: fx.Node, copies: list[fx.Node], value: torch.Tensor) -> None:
    arguments: dict[str, Any] = {"dtype": value.dtype, "device": value.device}
    for copy in copies:
        with graph.inserting_before(copy):
            # The shape of an empty tensor cannot be told from a nest of lists in all cases.
            call = (
                graph.call_function(torch.tensor, (value.tolist(),), arguments)
                if value.numel()
                else graph.call_function(torch.empty, (tuple(value.shape),), arguments)
            )
        call.meta = copy.meta.copy()
        copy.replace_all_uses_with(call)
        graph.erase_node(copy)
    graph.erase_node(node)


def _delete_unused_buffers(gm: fx.GraphModule) -> None:
    used = {str(node.target) for node in gm.graph.find_nodes(op="get_attr")}
    for name in [name for name in gm._buffers if name.startswith("_tensor_constant")]:
        if name not in used:
            delattr(gm, name)
