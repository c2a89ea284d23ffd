"""What stands against another module in the place of a linear layer: what is done with it besides calls."""

from __future__ import annotations

import ast
import functools
import inspect
import textwrap
from collections.abc import Iterator
from types import FunctionType
from typing import Any

import torch
from torch import nn

_FLOATS = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
# What `register_forward_hook` and its like fill.
_HOOKS = (
    "_forward_hooks",
    "_forward_hooks_with_kwargs",
    "_forward_hooks_always_called",
    "_forward_pre_hooks",
    "_forward_pre_hooks_with_kwargs",
    "_backward_hooks",
    "_backward_pre_hooks",
    "_is_full_backward_hook",
)

# A path from a module to one inside, and the conditions under which its weight is read.
Read = tuple[str, tuple[ast.expr, ...]]


def obstacle(model: nn.Module, name: str) -> str:
    """Why a quantized layer cannot take the place of the linear layer `name`, or nothing."""
    module: Any = model.get_submodule(name)
    if not name:
        return "it is the model itself, which is changed in place"
    if "weight" not in module._parameters:
        return "its weight is computed before each call, as by pruning: no parameter holds it"
    if module.weight.dtype not in _FLOATS:
        return f"wanted floats of 16 bits or more, saw {module.weight.dtype}"
    if "forward" in vars(module):
        return "its forward was replaced"
    parts = name.split(".")
    for count in range(len(parts)):
        parent = model.get_submodule(".".join(parts[:count]))
        if _reads(parent, ".".join(parts[count:])):
            return f"{type(parent).__name__} reads its weight besides calling it"
    return ""


def keep_hooks(old: nn.Module, new: nn.Module) -> None:
    """Have `new` call the hooks of `old`; their handles remove them from it."""
    for name in _HOOKS:
        if name in vars(old):
            vars(new)[name] = vars(old)[name]


def _reads(parent: nn.Module, path: str) -> bool:
    """Whether a method of `parent` has ``self.<path>.weight`` where it comes to that."""
    found: tuple[Read, ...] = _all(type(parent))  # type: ignore[arg-type]
    return any(own == path and all(_holds(parent, test) for test in tests) for own, tests in found)


@functools.cache
def _all(kind: type[Any]) -> tuple[Read, ...]:
    return tuple(read for function in _methods(kind) for read in _reads_of(function))


def _methods(kind: type[Any]) -> Iterator[Any]:
    """Functions of a class that run in its calls and look at weights."""
    known: set[str] = set()
    for base in kind.__mro__:
        if base is nn.Module or base.__name__ == "PreTrainedModel":
            return
        for name, function in vars(base).items():
            inner = inspect.unwrap(function) if isinstance(function, FunctionType) else None
            if inner is None or name in known or "init" in name or "reset" in name:
                continue
            known.add(name)
            if "weight" in inner.__code__.co_names:
                yield inner


def _reads_of(function: Any) -> list[Read]:
    try:
        tree = ast.parse(textwrap.dedent(inspect.getsource(function)))
    except (OSError, TypeError, SyntaxError):
        return []
    found = _Reads()
    found.visit(tree)
    return found.reads


class _Reads(ast.NodeVisitor):
    """Collects ``self.<path>.weight``."""

    def __init__(self) -> None:
        self.reads: list[Read] = []
        self.tests: tuple[ast.expr, ...] = ()

    def visit_If(self, node: ast.If) -> None:
        self.visit(node.test)
        outer = self.tests
        self.tests = (*outer, node.test)
        for each in node.body:
            self.visit(each)
        self.tests = (*outer, ast.UnaryOp(ast.Not(), node.test))
        for each in node.orelse:
            self.visit(each)
        self.tests = outer

    def visit_Attribute(self, node: ast.Attribute) -> None:
        path = ast.unparse(node)
        if node.attr == "weight" and path.startswith("self.") and path.count(".") > 1:
            self.reads.append((path.removeprefix("self.").removesuffix(".weight"), self.tests))
        self.generic_visit(node)


def _holds(module: nn.Module, test: ast.expr) -> bool:
    """Whether a condition on attributes of `module` is true, as far as that can be told."""
    nodes = list(ast.walk(test))
    names = {each.id for each in nodes if isinstance(each, ast.Name)}
    if names != {"self"} or any(isinstance(each, ast.Call) for each in nodes):
        return True
    try:
        code = compile(ast.fix_missing_locations(ast.Expression(test)), "<condition>", "eval")
        return bool(eval(code, {"self": module}))
    except Exception:  # of the user's own classes
        return True
