"""The host without a compiler: runs the rewritten graph op by op."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from torch import fx

from fxopt.hosts.host import Host
from fxopt.options import Options


def _compile(gm: fx.GraphModule, example_inputs: Sequence[Any], options: Options) -> Callable[..., Any]:
    return gm.forward


EAGER = Host("eager", _compile)
