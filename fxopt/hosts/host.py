"""What a host is: it compiles a graph of plain ATen calls into a callable."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from torch import fx
from torch._dynamo.exc import RestartAnalysis, SkipFrame
from torch._subclasses.fake_tensor import (
    DataDependentOutputException,
    DynamicOutputShapeException,
    UnsupportedFakeTensorException,
    UnsupportedOperatorException,
)

from fxopt.ir.contract import Evidence
from fxopt.options import Options

# What Dynamo itself wants to see, wherever it is raised: it restarts the analysis or skips the frame.
RESTARTS: tuple[type[BaseException], ...] = (RestartAnalysis, SkipFrame)
# From a host, it breaks the graph on these as well.
CONTROL_FLOW: tuple[type[BaseException], ...] = (
    *RESTARTS,
    DataDependentOutputException,
    DynamicOutputShapeException,
    UnsupportedOperatorException,
    UnsupportedFakeTensorException,
)


Note = Callable[[Evidence], None]


@dataclass(frozen=True)
class Host:
    """A host compiler.

    Attributes:
        name: ``"inductor"`` or ``"eager"``.
        compile: (graph module, example inputs, options, note) -> callable that returns a tuple. Takes
            ownership of the graph module. `note` takes the evidence of what was done to the graphs after
            autograd, also later, when a backward graph is made.
    """

    name: str
    compile: Callable[[fx.GraphModule, Sequence[Any], Options, Note], Callable[..., Any]]
