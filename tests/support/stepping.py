"""Fixtures of tests of steps past Dynamo's guards, whose compiled decoder serves a whole file."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch

from fxopt.runtime import step_loops


def compiled_once(decoder: Callable[[], torch.nn.Module]) -> Any:
    """A fixture: the decoder compiled, and the loops over its tensors in C++. To be assigned to a name."""

    @pytest.fixture(scope="module")
    def compiled() -> Any:
        step_loops.CURRENT.build(wait=True)
        torch._dynamo.reset()
        return torch.compile(decoder().eval(), backend="fxopt", options={"host": "eager"})

    return compiled


def kept_compiler() -> Any:
    """What to assign to `fresh_compiler`: what is compiled stays, and what a test changes it changes back."""

    @pytest.fixture(autouse=True)
    def fresh_compiler() -> Iterator[None]:
        with torch.no_grad(), torch._dynamo.config.patch(recompile_limit=256):
            yield

    return fresh_compiler
