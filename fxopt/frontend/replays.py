"""Which graphs are steps over a key-value cache that can be replayed, and how: see `fxopt.runtime.graphs`."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import fx

from fxopt.frontend.device_lengths import with_device_lengths
from fxopt.frontend.length_flow import Refusal
from fxopt.ir import facts
from fxopt.ir.contract import Evidence, Status
from fxopt.ir.cost import bytes_of
from fxopt.ir.facts import location, val
from fxopt.ir.graph_facts import Facts
from fxopt.options import Options
from fxopt.runtime import cuda_graphs
from fxopt.runtime.device_lengths import DeviceLengths, LengthsCall
from fxopt.runtime.graphs import Places, Replay
from fxopt.runtime.kv_calls import Plan

NAME = "replay"
# Another function for a call with such inputs, or None.
Instead = Callable[[Sequence[Any]], Callable[..., Any] | None]
# An input that is larger than this is read where it is, whatever it is: copying it would take microseconds.
_MOST_COPIED = 2**22


@dataclass
class Step:
    """A graph that is to be replayed.

    Attributes:
        device: of its inputs. places: of them.
        lengths: how it is called; None where its sizes stay as they are.
    """

    device: torch.device
    places: Places
    lengths: DeviceLengths | None

    def around(self, compiled: Callable[..., Any], note: Callable[[str], None]) -> Callable[..., Any]:
        """`compiled`, which takes what the graph takes, as a function of what the graph took before."""
        replay = Replay(compiled, self.places, self.device, cuda_graphs.recorder_for(self.device), note)
        return replay if self.lengths is None else LengthsCall(replay, self.lengths)

    def unless_fit(self, instead: Instead, captured: Callable[..., Any]) -> Instead:
        """`instead`, and `captured` for calls that the graph is not for."""
        lengths = self.lengths
        if lengths is None:
            return instead
        return lambda inputs: instead(inputs) or (None if lengths.takes(inputs) else captured)


def is_wanted(gm: fx.GraphModule, options: Options) -> bool:
    """Whether steps on the devices of the inputs of `gm` are to be replayed."""
    return options.replays_on({device.type for device in _devices(gm)})


def find_step(gm: fx.GraphModule, growing: Plan, options: Options) -> tuple[Step | None, list[Evidence]]:
    """Whether `gm`, a normalized graph with semantic ops, is such a step; it is changed where caches grow.

    Args:
        growing: its caches that grow; of windows, it is noted how much memory they are to have.
    """
    first = next((node for node in gm.graph.nodes if node.op == "call_function"), None)
    if first is None or not is_wanted(gm, options) or not (growing.appends or _static_caches(gm)):
        return None, []
    where = first.name, location(first)
    try:
        device = _checked_device(gm)
        lengths = _lengths(gm, growing)
    except Refusal as refusal:
        return None, [Evidence(NAME, *where, Status.ILLEGAL, str(refusal))]
    reason = "launched as a whole where its caches have the same memory as before"
    return Step(device, _places(gm, lengths), lengths), [Evidence(NAME, *where, Status.APPLIED, reason)]


def _lengths(gm: fx.GraphModule, growing: Plan) -> DeviceLengths | None:
    """How `gm` is called from now on; None for calls that stay as they are."""
    numbers = any(isinstance(val(node), torch.SymInt) for node in gm.graph.find_nodes(op="placeholder"))
    if not growing.appends and not numbers:
        return None
    lengths = with_device_lengths(gm, growing.appends)
    totals = {window.source: window.total for window in lengths.windows}
    growing.appends = [replace(each, total=totals.get(each.source)) for each in growing.appends]
    return lengths


def _checked_device(gm: fx.GraphModule) -> torch.device:
    devices = _devices(gm)
    if len(devices) != 1:
        raise Refusal(f"wanted inputs on one device, saw {sorted(map(str, devices))}")
    if torch.is_grad_enabled() and facts.may_train(gm.graph):
        raise Refusal("wanted a graph without gradients")
    return devices.pop()


def _tensors(gm: fx.GraphModule) -> list[tuple[int, fx.Node]]:
    placeholders = gm.graph.find_nodes(op="placeholder")
    return [(place, node) for place, node in enumerate(placeholders) if facts.is_tensor(node)]


def _devices(gm: fx.GraphModule) -> set[torch.device]:
    return {val(node).device for _, node in _tensors(gm)}


def _static_caches(gm: fx.GraphModule) -> list[fx.Node]:
    """Inputs that are written to, and are promised to stay where they are; but no buffers of modules."""
    found = Facts(gm.graph)
    nodes = [node for _, node in _tensors(gm) if _is_static(node) and not _is_of_module(node)]
    return [node for node in nodes if found.written_after(node, node) is not None]


def _is_static(node: fx.Node) -> bool:
    return "_dynamo_static_input_type" in (node.meta.get("tensor_dict") or {})


def _is_of_module(node: fx.Node) -> bool:
    return "NN_MODULE" in str(getattr(getattr(node, "_dynamo_source", None), "guard_source", ""))


def _places(gm: fx.GraphModule, lengths: DeviceLengths | None) -> Places:
    found = Facts(gm.graph)
    bound: list[int] = []
    copied: list[int] = []
    longer = set() if lengths is None else {place for place, _ in lengths.sizes.places}
    for place, node in _tensors(gm):
        stays = _is_static(node) or _is_of_module(node) or found.written_after(node, node) is not None
        stays = stays or (place not in longer and bytes_of(val(node)) > _MOST_COPIED)
        (bound if stays else copied).append(place)
    return Places(tuple(bound), tuple(copied))
