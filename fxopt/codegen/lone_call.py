"""One call of a semantic op by itself, as a value that another process can compile and run.

Its tensors are described, not kept: the sizes, strides and dtypes of tracing, and numbers that let a
measurement say what it would of the real ones.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from sympy.core.function import AppliedUndef
from torch import fx
from torch.utils import _pytree as pytree

from fxopt.ir.cost import hint
from fxopt.ir.facts import argument, val
from fxopt.ir.formula import captures_of
from fxopt.ir.ops import register_ops, semantic_op
from fxopt.ir.ops.op import is_symbol
from fxopt.ir.program import MaskProgram, ScoreProgram

TRUE = 0.9  # of booleans: a mask hides few keys


@dataclass(frozen=True)
class Example:
    """A tensor to measure with.

    Attributes:
        number: of integers, all alike. learned: whether a gradient of it is computed.
    """

    shape: tuple[int, ...]
    strides: tuple[int, ...]
    dtype: torch.dtype
    number: int = 0
    learned: bool = False

    def make(self, device: str) -> torch.Tensor:
        """Random numbers; booleans of which most are true."""
        steps = zip(self.shape, self.strides, strict=True)
        count = 1 + sum((size - 1) * step for size, step in steps) if all(self.shape) else 0
        if self.dtype.is_floating_point:
            numbers = torch.randn(count, device=device).to(self.dtype)
        elif self.dtype is torch.bool:
            numbers = torch.rand(count, device=device) < TRUE
        else:
            numbers = torch.full((count,), self.number, dtype=self.dtype, device=device)
        return numbers.as_strided(self.shape, self.strides).requires_grad_(self.learned)


@dataclass(frozen=True)
class LoneCall:
    """A call of the op ``fxopt::<op>``.

    Attributes:
        args, kwargs: as in a graph, with an `Example` in the place of each tensor.
    """

    op: str
    args: tuple[Any, ...]
    kwargs: tuple[tuple[str, Any], ...]

    @property
    def examples(self) -> list[Example]:
        """Of its tensors, in order."""
        leaves = pytree.tree_leaves((self.args, dict(self.kwargs)))
        return [each for each in leaves if isinstance(each, Example)]

    @property
    def is_training(self) -> bool:
        return any(each.learned for each in self.examples)

    def module(self) -> fx.GraphModule:
        """A module that calls the op with tensors in the order of `examples`."""
        register_ops()
        graph = fx.Graph()

        def placed(leaf: Any) -> Any:
            return graph.placeholder(f"x{len(graph.nodes)}") if isinstance(leaf, Example) else leaf

        args, kwargs = pytree.tree_map(placed, (self.args, dict(self.kwargs)))
        graph.output(graph.call_function(getattr(torch.ops.fxopt, self.op).default, args, kwargs))
        return fx.GraphModule(torch.nn.Module(), graph)

    def runner(self, compiled: Callable[..., torch.Tensor], device: str) -> Callable[[], Any]:
        """What calls a compiled `module` with examples, and computes gradients where it trains."""
        inputs = [each.make(device) for each in self.examples]
        learned = [each for each in inputs if each.requires_grad]

        def run() -> Any:
            with torch.set_grad_enabled(self.is_training):
                out = compiled(*inputs)
            return torch.autograd.grad(out, learned, torch.ones_like(out)) if self.is_training else out

        return run


def lone_call(node: fx.Node, learned: Callable[[fx.Node], bool]) -> LoneCall:
    """The call of a semantic op that `node` is.

    Args:
        learned: whether a gradient of what a node stands for is wanted.
    """
    op = semantic_op(node)
    assert op is not None
    indices = _indices(node)
    captures: Sequence[Any] = argument(node, "captures") or ()
    used = {each for place, each in enumerate(captures) if f"c{place}" in indices}
    # Of lengths and places: half of the keys are live. What is the index of something else is its first.
    middle = hint(val(node.args[1]).shape[-2]) // 2

    def leaf(each: Any) -> Any:
        value = val(each) if isinstance(each, fx.Node) else each
        if isinstance(value, torch.SymInt):
            return hint(value)
        if not isinstance(value, torch.Tensor):
            return value.node.hint if is_symbol(value) else value
        sizes, strides = (tuple(map(hint, part)) for part in (value.shape, value.stride()))
        number = middle if each in captures and each not in used else 0
        return Example(sizes, strides, value.dtype, number, value.is_floating_point() and learned(each))

    args, kwargs = pytree.tree_map(leaf, (node.args, dict(node.kwargs)))
    return LoneCall(op.name, args, tuple(sorted(kwargs.items())))


def _indices(node: fx.Node) -> set[str]:
    """The captures that programs of a call read where others are indexed."""
    texts = [argument(node, name) for name in ("score", "bias")]
    formulas = [ScoreProgram.parse(text).result for text in texts if text]
    if mask := argument(node, "mask"):
        formulas.append(MaskProgram.parse(mask).live)
    read = [index for formula in formulas for each in formula.atoms(AppliedUndef) for index in each.args]
    return {name for index in read for name in captures_of(index)}
