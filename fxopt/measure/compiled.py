"""`torch.compile` for comparisons."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from typing import Any

import torch


def apart() -> dict[str, Any]:
    """The keyword that keeps one `torch.compile` apart from the others of the same code.

    Dynamo keeps compilations by code object, and looks through those of all backends and models at every
    call: with several in one process, one would be charged for the guards of the others.
    """
    known = inspect.signature(torch.compile).parameters
    return {"isolate_recompiles": True} if "isolate_recompiles" in known else {}


def compile_with(model: Any, backend: str, options: Mapping[str, Any] | None = None) -> Callable[..., Any]:
    """`model` compiled with `backend`, apart from what else is compiled."""
    given = dict(options) if options else None
    compiled: Callable[..., Any] = torch.compile(model, backend=backend, options=given, **apart())
    return compiled
