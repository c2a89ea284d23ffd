"""What a host is: it compiles a graph of plain ATen calls into a callable."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

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

if TYPE_CHECKING:
    from fxopt.codegen.kernel_file import KernelFile

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


class Notes(Protocol):
    """What a host reports of graphs after autograd, also later, when a backward graph is made.

    Attributes:
        evidence: what was done, and why not more. kernels: what was emitted.
    """

    evidence: list[Evidence]
    kernels: list[KernelFile]

    def fail(self, stage: str, error: BaseException) -> None:
        """A fault of fxopt that the host has survived."""


@dataclass(frozen=True)
class Host:
    """A host compiler.

    Attributes:
        name: ``"inductor"`` or ``"eager"``.
        compile: (graph module, example inputs, options, notes) -> callable that returns a tuple. Takes
            ownership of the graph module.
    """

    name: str
    compile: Callable[[fx.GraphModule, Sequence[Any], Options, Notes], Callable[..., Any]]
