"""The operators of a region as the text of a function in plain torch, for the kernel's file."""

from __future__ import annotations

import operator
from collections.abc import Collection, Iterable, Mapping
from typing import Any

import sympy
import torch
from torch import fx

from fxopt.codegen.gather import entries_of
from fxopt.codegen.print_index import print_index
from fxopt.codegen.trace import needed_for, operator_name
from fxopt.codegen.view_index import readers_of
from fxopt.ir.cost import hint
from fxopt.ir.ops.code_products import CODES, WIDENING, is_op
from fxopt.ir.ops.uniform import is_uniform
from fxopt.ir.sizes import size_of


def reference_text(
    members: Iterable[fx.Node],
    outputs: Collection[fx.Node],
    parameters: Mapping[fx.Node, str],
    sizes: Mapping[str, str],
    given: Iterable[str],
) -> str:
    """``def reference(...)`` over `parameters` and the sizes `given`, which computes `outputs` op by op.

    `sizes` are those that are read from the parameters: name -> expression.
    """
    writer = _Writer(dict(parameters))
    needed = needed_for(outputs, parameters)
    for node in members:
        if node in needed:  # what only other kernels read, they may compute again
            writer.write(node)
    arguments = [
        *(f"{name}: torch.Tensor" for name in dict.fromkeys(parameters.values())),
        *(f"{one}: int" for one in given),
    ]
    results = ", ".join(writer.named[node] for node in outputs)
    known = [f"{name} = {text}" for name, text in sizes.items()]
    lines = [f"    {line}" for line in [*known, *writer.lines, f"return {results}"]]
    return "\n".join([f"def reference({', '.join(arguments)}):", *lines])


class _Writer:
    """Writes nodes, and what they need that is neither a parameter nor a member, in order."""

    def __init__(self, named: dict[fx.Node, str]) -> None:
        self.named, self.lines = named, list[str]()
        self.device = f"{next(iter(named.values()))}.device"

    def write(self, node: fx.Node) -> str:
        if node in self.named:
            return self.named[node]
        value = node.meta.get("val")
        if isinstance(value, (torch.SymInt, int)):
            return f"({print_index(size_of(value))})"
        arguments = [self.text(one) for one in node.args]
        arguments += [f"{key}={self.text(one)}" for key, one in node.kwargs.items()]
        name = f"{operator_name(node)}_{len(self.lines)}"
        call = f"{_callee(node)}({', '.join(arguments)})"
        if node.target is operator.getitem:
            call = f"{arguments[0]}[{arguments[1]}]"
        self.lines.append(f"{name} = {call}")
        self.named[node] = name
        return name

    def text(self, argument: Any) -> str:
        if isinstance(argument, fx.Node):
            return self.write(argument)
        if isinstance(argument, (list, tuple)):
            return f"[{', '.join(map(self.text, argument))}]"
        if isinstance(argument, torch.device):
            return self.device
        if isinstance(argument, float) and sympy.sympify(argument) in (sympy.oo, -sympy.oo, sympy.nan):
            return f"float('{argument}')"
        return repr(argument)


def _callee(node: fx.Node) -> str:
    target = node.target
    if is_uniform(target):
        return "philox_uniform"
    if name := next((one for one in WIDENING if is_op(target, one)), None):
        return name
    if isinstance(target, torch._ops.OpOverload):
        return f"torch.ops.{target}"
    return f"{target.__module__.lstrip('_')}.{target.__name__}"  # type: ignore[union-attr]


def example_text(parameters: Mapping[fx.Node, str], sizes: Mapping[str, int]) -> str:
    """``def example_inputs(device)``: one value for each parameter, of the shapes seen while compiling."""
    lines = ["generator = torch.Generator(device).manual_seed(0)"]
    names = []
    for node, name in parameters.items():
        lines.append(f"{name} = {_example(node)}")
        names.append(name)
    names += map(str, sizes.values())
    lines.append(f"return {', '.join(names)}{',' if len(names) == 1 else ''}")
    return "\n".join(["def example_inputs(device):", *(f"    {line}" for line in lines)])


def _fill(node: fx.Node) -> str:
    """Numbers as tensors have them: weights' codes take all values, bits of e4m3 none of NaN, and places
    exist."""
    dtype = node.meta["val"].dtype
    if dtype.is_floating_point:
        return "normal_(generator=generator)"
    readers = [one.target for one in readers_of(node)]
    if dtype is torch.int8 and any(is_op(one, name) for one in readers for name in WIDENING):
        return "random_(-127, 128, generator=generator)"
    if dtype is torch.uint8 and any(is_op(one, CODES) for one in readers):
        return "random_(0, 127, generator=generator).mul_(2)"
    return f"random_(0, {entries_of(node) or 2}, generator=generator)"


def _example(node: fx.Node) -> str:
    value = node.meta["val"]
    shape, strides = (tuple(hint(one) for one in part) for part in (value.shape, value.stride()))
    # What is expanded is written once.
    stored = tuple(1 if stride == 0 else size for size, stride in zip(shape, strides, strict=True))
    text = f"torch.empty_strided({stored}, {strides}, dtype={value.dtype}, device=device)"
    text = f"{text}.{_fill(node)}"
    return text if stored == shape else f"{text}.expand{shape}"
