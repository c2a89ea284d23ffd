"""Which nodes are matrix products that kernels compute, and of what."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from fxopt.ir.cost import hint, numel
from fxopt.ir.ops.code_products import PRODUCT, is_op

aten = torch.ops.aten

MOST_ROWS = 16  # of a product with few rows: what the smallest tile of a matrix unit has
CHOSEN = "fxopt_product"  # in the metadata of products with many rows that are to become kernels
_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
_PLAIN = (aten.mm.default, aten.bmm.default)
_WITH_BIAS = (aten.addmm.default, aten.baddbmm.default)


@dataclass(frozen=True)
class Operands:
    """Of ``left @ right + bias``."""

    left: fx.Node
    right: fx.Node
    bias: fx.Node | None = None


def operands_of_product(node: fx.Node) -> Operands | None:
    """The operands of a product that a kernel may compute; None for everything else."""
    given: Any = node.args
    if node.target in _PLAIN:
        found = Operands(*given)
    elif is_op(node.target, PRODUCT):
        left, right = given
        same_type = left.meta["val"].dtype == right.meta["val"].dtype in (torch.int8, *_DTYPES)
        return Operands(left, right) if same_type else None
    elif node.target in _WITH_BIAS and all(value == 1 for value in node.kwargs.values()):
        found = Operands(given[1], given[2], given[0])
    else:
        return None
    used = (node, found.left, found.right)
    if len({one.meta["val"].dtype for one in used}) > 1 or node.meta["val"].dtype not in _DTYPES:
        return None
    return found


def is_skinny(node: fx.Node) -> bool:
    """Whether `node` is a product of matrices with few rows, as the decoding of few sequences has."""
    found = operands_of_product(node)
    if found is None or found.left.meta["val"].dim() > 2:
        return False
    rows, depth = found.left.meta["val"].shape
    return hint(rows) <= MOST_ROWS and hint(depth) > 1


def is_large(node: fx.Node) -> bool:
    """Whether `node` is any other product that could be a kernel: one with many rows, or of stacks."""
    found = operands_of_product(node)
    return found is not None and not is_skinny(node) and hint(found.left.meta["val"].shape[-1]) > 1


def in_kernel(node: fx.Node) -> bool:
    """Whether a kernel computes the product `node`: one with few rows, or one that was chosen."""
    return is_skinny(node) or bool(node.meta.get(CHOSEN)) and is_large(node)


def known_operands(node: fx.Node) -> Operands:
    """`operands_of_product` of what is known to be one."""
    found = operands_of_product(node)
    assert found is not None
    return found


def left_operand(product: fx.Node) -> fx.Node:
    """What a product has the rows of."""
    return known_operands(product).left


def flops_of_product(product: fx.Node) -> int:
    """Two operations for each summand of a product, at the sizes seen while tracing."""
    return 2 * numel(product.meta["val"]) * hint(left_operand(product).meta["val"].shape[-1])
