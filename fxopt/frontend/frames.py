"""The frame that Dynamo captures a graph from.

Uses private torch APIs, listed in docs/torch_apis.md. Where they are not as expected, nothing is known.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import Any

import torch
from torch import fx

from fxopt.frontend.side_effects import source_of
from fxopt.ir.facts import val
from fxopt.runtime.frames import Frame

log = logging.getLogger("fxopt")


def captured_frame(gm: fx.GraphModule) -> Frame | None:
    """The frame of the graph that Dynamo is compiling, of which `gm` is the normalized form."""
    try:
        from torch._dynamo.symbolic_convert import InstructionTranslator

        code = InstructionTranslator.current_tx().output.root_tx.f_code
    except Exception as error:
        log.debug("the frame of a graph is not known: %s: %s", type(error).__name__, error)
        return None
    placeholders = gm.graph.find_nodes(op="placeholder")
    values = [val(node) for node in placeholders]
    tensors = [value if isinstance(value, torch.Tensor) else None for value in values]
    return Frame(
        code,
        [source_of(node) for node in placeholders],
        [None if tensor is None else _fixed(tensor.shape) for tensor in tensors],
        [None if tensor is None else _fixed(tensor.stride()) for tensor in tensors],
    )


def _fixed(numbers: Sequence[Any]) -> tuple[int | None, ...]:
    return tuple(number if isinstance(number, int) else None for number in numbers)
