"""Graphs as stable, short text, compared with files in tests/golden/. FXOPT_GOLDEN=update rewrites them."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import torch
from torch import fx
from torch._ops import OpOverload

GOLDEN = Path(__file__).resolve().parent.parent / "golden"


def render(gm: fx.GraphModule) -> str:
    """One line a node: name, op, arguments, dtype and shape of the result."""
    return "\n".join(_line(node) for node in gm.graph.nodes) + "\n"


def assert_golden(text: str, rewrite: str, case: str) -> None:
    """`text` equals the golden file; a missing one fails."""
    path = GOLDEN / rewrite / f"{case}.txt"
    if os.environ.get("FXOPT_GOLDEN") == "update":
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    assert path.exists(), f"no golden file {path.name}: run with FXOPT_GOLDEN=update and read what it writes"
    assert text == path.read_text()


def _line(node: fx.Node) -> str:
    if node.op == "output":
        return f"return {_argument(node.args[0])}"
    if node.op in ("placeholder", "get_attr"):
        return f"{node.name} = {node.op}{_value(node)}"
    arguments = [_argument(arg) for arg in node.args]
    arguments += [f"{name}={_argument(arg)}" for name, arg in node.kwargs.items()]
    return f"{node.name} = {_target(node.target)}({', '.join(arguments)}){_value(node)}"


def _target(target: Any) -> str:
    return str(target) if isinstance(target, OpOverload) else str(getattr(target, "__name__", target))


def _argument(arg: Any) -> str:
    if isinstance(arg, fx.Node):
        return arg.name
    if isinstance(arg, (list, tuple)):
        return "[" + ", ".join(_argument(item) for item in arg) + "]"
    return f"{arg:.6g}" if isinstance(arg, float) else str(arg)


def _value(node: fx.Node) -> str:
    value = node.meta.get("val")
    if not isinstance(value, torch.Tensor):
        return ""
    shape = ", ".join(str(size) for size in value.shape)
    return f" : {str(value.dtype).removeprefix('torch.')}[{shape}]"
