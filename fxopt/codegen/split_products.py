"""A product whose columns are too few for all SMs, in two launches.

Programs sum pieces of the depth into a scratch tensor; a second launch adds the pieces up, always in the same
order, and computes what follows the product. On request the programs add to one sum each, in whichever order
they come: less memory, and results that differ in their last bits from run to run.
"""

from __future__ import annotations

from dataclasses import replace

import sympy

from fxopt.codegen.indexing import axis, product
from fxopt.codegen.matmul import MatmulBody
from fxopt.codegen.split import Split, place_of, scratch_tensor, total_of
from fxopt.codegen.statements import Body, Product, Reduce, Store


def can_split_products(body: MatmulBody) -> bool:
    """Whether all results follow products of one part, element by element."""
    if len(body.parts) > 1 or body.parts[0].distance or not body.summed.size.is_Integer:
        return False
    products = frozenset(one.name for one in body.products)
    needed = body.needed_for({one.source for one in body.stores}, products)
    behind = {one.name: one for one in body.statements if one.name in needed}
    computed = any(isinstance(one, Reduce) or one.on_r for one in behind.values())
    return not computed and products <= needed and not any(one.on_r for one in body.stores)


def split_products(body: MatmulBody, length: int, *, atomic: bool = False) -> Split:
    """`body` with its depth cut into pieces of `length`. `atomic`: pieces are added as they come."""
    pieces = sympy.Integer(-(-int(body.summed.size) // length))
    kept = sympy.Integer(1) if atomic else pieces
    scratch = tuple(scratch_tensor(place, one.dtype) for place, one in enumerate(body.products))
    names = body.names | {node: node.name for node in scratch}
    piece = axis("piece", pieces)
    outer = (*(one for one in (body.batch, body.rows) if one is not None), body.parts[0].columns)
    found = list(zip(scratch, body.products, strict=True))
    sums = [(node, _sum_of(one)) for node, one in found]
    total = total_of(Body(outer, names, body.statements, body.stores), names, sums, kept)
    at = place_of(piece, outer).subs(piece.symbol, 0) if atomic else place_of(piece, outer)
    stores = [Store(node, at, one.name, False, added=atomic) for node, one in found]
    needed = body.needed_for(one.name for one in body.products)
    statements = [one for one in body.statements if one.name in needed]
    partial = replace(body, names=names, statements=statements, stores=stores, piece=piece, length=length)
    return Split(partial, total, scratch, (kept, product(one.size for one in outer)))


def _sum_of(one: Product) -> Reduce:
    """The pieces of a product, added up."""
    return Reduce(one.name, (), one.dtype, 1, False, one.origin, "sum")
