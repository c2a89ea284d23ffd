"""What Dynamo does after a graph has run: which outputs it stores into which attributes.

Uses private torch APIs, listed in docs/torch_apis.md. Where they are not as expected, nothing is known.
"""

from __future__ import annotations

import logging
from typing import Any

from torch import fx

log = logging.getLogger("fxopt")


def stored_attributes(gm: fx.GraphModule) -> dict[int, str | None]:
    """Position of an output of Dynamo's graph -> the attribute that the result is stored into.

    The attribute is written as its Dynamo source (``"L['cache'].layers[0].keys"``); it is None for an object
    that the compiled code makes itself. To be called while Dynamo has the graph compiled.
    """
    try:
        return _stored_attributes(gm)
    except Exception as error:
        log.debug("what is stored after the graph is not known: %s: %s", type(error).__name__, error)
        return {}


def _stored_attributes(gm: fx.GraphModule) -> dict[int, str | None]:
    from torch._dynamo.source import AttrSource
    from torch._dynamo.symbolic_convert import InstructionTranslator

    positions: dict[str, list[int]] = {}
    for place, arg in enumerate(gm.graph.output_node().args[0]):  # type: ignore[arg-type]
        if isinstance(arg, fx.Node):
            positions.setdefault(arg.name, []).append(place)
    found: dict[int, str | None] = {}
    effects = InstructionTranslator.current_tx().output.side_effects
    for holder, changes in effects.store_attr_mutations.items():
        for attribute, value in changes.items():
            proxy = getattr(value, "proxy", None)
            node = getattr(proxy, "node", None)
            places = positions.get(node.name, []) if isinstance(node, fx.Node) else []
            if len(places) != 1:
                continue
            source = getattr(holder, "source", None)
            found[places[0]] = None if source is None else source_name(AttrSource(source, attribute))
    return found


def source_name(source: Any) -> str | None:
    """The expression of a Dynamo source; None for what the compiled code makes, which has no name."""
    try:
        name = source.name
        return str(name() if callable(name) else name)  # a method in older versions of torch
    except NotImplementedError:
        return None


def source_of(placeholder: fx.Node) -> str:
    """The expression of the source of an input; empty where it has none."""
    source = getattr(placeholder, "_dynamo_source", None)
    return "" if source is None else source_name(source) or ""
