"""The program of an attention mask: which keys a query sees, from the operations that made the mask."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import sympy
from sympy.core.function import AppliedUndef
from sympy.logic.boolalg import Boolean
from torch import fx

from fxopt.ir.cone import cone
from fxopt.ir.contract import Context
from fxopt.ir.facts import Facts, shape, val
from fxopt.ir.formula import AXES, capture, size
from fxopt.ir.index_rules import value_of
from fxopt.ir.linear import Unsupported
from fxopt.ir.predicate import INDEX, Sizes, box, broadcast
from fxopt.ir.program import MaskProgram

from .mask_proof import live_of


@dataclass(frozen=True)
class Recovered:
    """A program, and what its names stand for: captured tensors and sizes."""

    program: MaskProgram
    captures: Mapping[str, fx.Node]
    sizes: Mapping[str, sympy.Symbol]

    def __str__(self) -> str:
        named = [f"{name} is {node.name}" for name, node in self.captures.items()]
        named += [f"{name} is {symbol}" for name, symbol in self.sizes.items()]
        return "; ".join((str(self.program), *named))


def recover(mask: fx.Node, attention: fx.Node) -> Recovered:
    """The program of the mask of an attention op.

    Raises:
        Unsupported: the mask is no function of indices and of integers or bools; the message says what stood
            in the way.
    """
    # Layers share their mask, and passes ask several times. A copy of the node copies what is kept with it.
    key = (mask, *(str(val(arg).shape) for arg in attention.args[:2]))
    kept = mask.meta.get(_KEPT)
    if kept is None or kept[0] != key:
        kept = mask.meta[_KEPT] = (key, _outcome(mask, attention))
    if isinstance(kept[1], Unsupported):
        raise kept[1]
    return kept[1]


_KEPT = "fxopt_mask_program"


def _outcome(mask: fx.Node, attention: fx.Node) -> Recovered | Unsupported:
    try:
        return _recover(mask, attention)
    except Unsupported as refusal:
        return refusal


def _recover(mask: fx.Node, attention: fx.Node) -> Recovered:
    value = value_of(mask)
    sizes = Sizes(getattr(val(mask).fake_mode, "shape_env", None))
    query, key = shape(attention.args[0]), shape(attention.args[1])  # type: ignore[arg-type]
    target = tuple(sizes.size(each) for each in (*query[:-1], key[-2]))
    moved = dict(zip(INDEX, broadcast(value.shape, target), strict=False))
    live = tidied(live_of(value).xreplace(moved), box(target), sizes)
    return _named(live.xreplace(dict(zip(INDEX, AXES, strict=False))), mask)


def tidied(formula: Boolean, domain: Boolean, sizes: Sizes) -> Boolean:
    """The same condition within `domain`, without the parts that always hold there, or never."""
    formula = sympy.to_nnf(formula, simplify=False)
    if isinstance(formula, sympy.And):
        kept = list(dict.fromkeys(tidied(arg, domain, sizes) for arg in formula.args))
        for part in list(kept):
            others = sympy.And(domain, *(each for each in kept if each != part))
            if sizes.implies(others, part):
                kept.remove(part)
        return sympy.And(*kept)
    if isinstance(formula, sympy.Or):
        return _convex(sympy.Or(*(tidied(arg, domain, sizes) for arg in formula.args)), domain, sizes)
    if sizes.implies(domain, formula):
        return sympy.true
    return sympy.false if sizes.impossible(domain, formula) else formula


def _convex(formula: Boolean, domain: Boolean, sizes: Sizes) -> Boolean:
    """A disjunction as the conjunction of those of its relations that it implies, where the two are the same.

    ``0 <= q - k <= 4 or 0 < k - q <= 4`` is how a trace spells a distance of at most 4.
    """
    relations = sorted(formula.atoms(sympy.core.relational.Relational), key=str)
    if not isinstance(formula, sympy.Or) or len(relations) > MOST_RELATIONS:
        return formula
    premise = sympy.And(domain, formula)
    needed = sympy.And(*(each for each in relations if sizes.implies(premise, each)))
    return needed if sizes.implies(sympy.And(domain, needed), formula) else formula


# More would take long to look at, and no mask that was seen has them.
MOST_RELATIONS = 8


def _named(live: Boolean, mask: fx.Node) -> Recovered:
    """With ``c0, c1, ...`` and ``n0, n1, ...`` in the place of the names of nodes and symbols."""
    nodes = {node.name: node for node in cone(mask)}
    captures: dict[str, fx.Node] = {}
    renamed: dict[sympy.Basic, sympy.Basic] = {}
    for access in sorted(live.atoms(AppliedUndef), key=str):
        source = str(access.func)
        name = next((name for name, node in captures.items() if node.name == source), f"c{len(captures)}")
        captures[name] = nodes[source]
        renamed[access] = capture(name)(*access.args)
    symbols = sorted(live.free_symbols - set(AXES), key=str)
    found = {f"n{place}": symbol for place, symbol in enumerate(symbols)}
    live = live.xreplace(renamed).xreplace({symbol: size(name) for name, symbol in found.items()})
    if len(nodes) != len(cone(mask)):
        raise Unsupported("nodes of one name in nested graphs")
    return Recovered(MaskProgram(live), captures, found)


def written(made_by: list[fx.Node], attention: fx.Node, ctx: Context) -> str | None:
    """Why the mask is not what the operations alone say: something writes to it, or to what it is made of."""
    outside: dict[fx.Graph, Facts] = {}
    for node in made_by:
        if node.graph is ctx.graph:
            stale = ctx.facts.unsafe_read([node], node, attention)
        else:
            facts = outside.get(node.graph) or outside.setdefault(node.graph, Facts(node.graph))
            stale = facts.unsafe_read([node], node, node.graph.output_node())
        if stale:
            return stale
    return None
