"""The Dynamo entry point: a graph in, a callable out; nothing else."""

from __future__ import annotations

import sys
import types
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from torch import fx

from fxopt.options import Options
from fxopt.pipeline import compile_graph, optional_names


def backend(
    gm: fx.GraphModule,
    example_inputs: Sequence[Any],
    *,
    mode: str | None = None,
    options: Mapping[str, Any] | None = None,
) -> Callable[..., Any]:
    """Compile one Dynamo graph: ``torch.compile(model, backend="fxopt")`` or ``backend=fxopt.backend``.

    Args:
        gm: Dynamo's graph.
        example_inputs: one value for each placeholder.
        mode: torch.compile's mode.
        options: fields of `fxopt.options.Options`, and Inductor's configuration keys.

    Raises:
        UnknownOption, OptionTypeError, OptionValueError, UnsupportedMode: before anything is traced by fxopt.
    """
    return compile_graph(gm, example_inputs, validate(mode=mode, options=options))


def validate(mode: str | None = None, options: Mapping[str, Any] | None = None) -> Options:
    """Check `mode` and `options` as `backend` would. The plugin calls this from inside `torch.compile`."""
    return Options.parse(mode, options, pass_names=optional_names())


def reset() -> None:
    """Forget CUDA graphs, fuel, records and converted weights.

    `torch.compiler.reset` leads here for compiled functions.
    """
    from fxopt.frontend.driver import FUEL
    from fxopt.integrations.generate import forget as forget_stand_ins
    from fxopt.report.record import forget
    from fxopt.runtime.held_weights import STORE

    STORE.clear()
    FUEL.reset()
    forget()
    forget_stand_ins()
    _reset_cuda_graphs()


def _reset_cuda_graphs() -> None:
    import torch

    if torch.cuda.is_available():
        from torch._inductor.cudagraph_trees import reset_cudagraph_trees

        reset_cudagraph_trees()


backend.validate = validate  # type: ignore[attr-defined]
backend.reset = reset  # type: ignore[attr-defined]


class _CallableModule(types.ModuleType):
    """``fxopt.backend`` is both this module and what a user passes as ``backend=fxopt.backend``."""

    def __call__(self, gm: fx.GraphModule, example_inputs: Sequence[Any], **given: Any) -> Callable[..., Any]:
        return backend(gm, example_inputs, **given)


sys.modules[__name__].__class__ = _CallableModule
