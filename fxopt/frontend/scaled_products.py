"""PyTorch's products of float8, ``_scaled_mm`` and ``_scaled_mm_v2``, whose right operand is a weight.

    (a (M, K) @ b (K, N)) * scale_a * scale_b + bias

with one scale, or one for each row of a and column of b. On a GPU they stay: tensor cores multiply float8,
and no product of fxopt's is faster. A processor has none, and PyTorch's product is slow there. Numbers of
float8 are numbers of float32, so nothing is rounded on the way to fxopt's product.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import fx

from fxopt.frontend.linear_site import Site
from fxopt.ir.facts import PLAIN_FLOATS, argument, aten, dtype, same_size, shape, val
from fxopt.ir.sources import CannotConvert, affine
from fxopt.ir.sources.found import Found

# Of `torch.nn.functional.ScalingType`: one scale, and one for each row.
_RECIPES = (0, 1)


def scaled_site(node: fx.Node) -> Site:
    """What a call of one of the two multiplies with.

    Raises:
        CannotConvert: it stays as it is.
    """
    left, weight, bias = (argument(node, name) for name in ("self", "mat2", "bias"))
    scale_a, scale_b = _scales(node)
    depth, columns = map(int, shape(weight))
    if val(left).device.type != "cpu":
        raise CannotConvert("a GPU multiplies float8 itself")
    if dtype(node) not in PLAIN_FLOATS:
        raise CannotConvert(f"a result of {dtype(node)}")
    if not _is_of_rows(scale_a, shape(left)[0], 0) or not _is_of_rows(scale_b, columns, 1):
        raise CannotConvert(f"scales of blocks: {tuple(shape(scale_a))} and {tuple(shape(scale_b))}")

    def convert(values: Any) -> Found:
        codes, scale = values
        block = (1 if scale.numel() > 1 else columns, depth)
        return Found(affine.from_blocks(codes.t(), scale.float(), block), "PyTorch float8")

    def finish(graph: fx.Graph, product: fx.Node) -> fx.Node:
        wide = graph.call_function(aten.mul.Tensor, (product, scale_a))
        if bias is not None:
            wide = graph.call_function(aten.add.Tensor, (wide, bias))
        return graph.call_function(aten.to.dtype, (wide, dtype(node)))

    def own(values: Any, given: torch.Tensor) -> torch.Tensor:
        right, scale = values
        ones = torch.ones((given.shape[0], 1) if scale.numel() > 1 else ())
        return torch._scaled_mm(given.to(dtype(left)), right, ones, scale, out_dtype=dtype(node))

    return Site(node, left, None, (weight, scale_b), convert, "scaled_mm", own, torch.float32, finish)


def _scales(node: fx.Node) -> tuple[fx.Node, fx.Node]:
    """Those of both operands, where they are plain numbers."""
    one, other = argument(node, "scale_a"), argument(node, "scale_b")
    if isinstance(one, fx.Node):
        if argument(node, "scale_result") is not None:
            raise CannotConvert("a result that is scaled")
        return one, other
    recipes = [*argument(node, "recipe_a"), *argument(node, "recipe_b")]
    if len(one) != 1 or len(other) != 1 or any(each not in _RECIPES for each in recipes):
        raise CannotConvert(f"scales of blocks, or of several levels: recipes {recipes}")
    if any((*argument(node, "swizzle_a"), *argument(node, "swizzle_b"), *argument(node, "contraction_dim"))):
        raise CannotConvert("scales, or dimensions, in an order of their own")
    return one[0], other[0]


def _is_of_rows(scale: fx.Node, count: Any, place: int) -> bool:
    """One number, or one for each of `count` along dimension `place`."""
    sizes = shape(scale)
    if all(same_size(each, 1) for each in sizes):
        return True
    return len(sizes) == 2 and same_size(sizes[place], count) and same_size(sizes[1 - place], 1)
