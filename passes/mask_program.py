"""The programs of an attention mask, from the operations that made it: which keys a query sees, and what is
added to their scores."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, TypeAlias

import sympy
import torch
from sympy.core.function import AppliedUndef
from sympy.logic.boolalg import Boolean
from torch import fx

from fxopt.ir.cone import cone, outer_of
from fxopt.ir.contract import Context
from fxopt.ir.facts import is_call, location, shape, val
from fxopt.ir.formula import AXES, capture, exact, integral, number_text, real_capture, size
from fxopt.ir.graph_facts import Facts
from fxopt.ir.index_rules import TABLE, captured, value_of
from fxopt.ir.linear import Unsupported
from fxopt.ir.ops.masking import LOWEST_SHARE
from fxopt.ir.predicate import INDEX, Sizes, Value, box, broadcast
from fxopt.ir.program import MaskProgram
from fxopt.ir.tables import PREFIX, Table

from .attention_steps import LITERALS
from .mask_memo import kept_outcome

Source: TypeAlias = fx.Node | Table


@dataclass(frozen=True)
class Recovered:
    """What a mask says, and what its names stand for.

    Attributes:
        program: where a key takes part. bias: what is added to its score. fills: what is added elsewhere.
        captures: tensors, and tables to be made. sizes: symbols of the graph's shapes.
        made_by: the operations that decide on it.
    """

    program: MaskProgram
    bias: sympy.Expr
    fills: frozenset[float]
    captures: Mapping[str, Source]
    sizes: Mapping[str, sympy.Symbol]
    made_by: tuple[fx.Node, ...]

    @property
    def bias_text(self) -> str:
        """Empty when nothing is added."""
        return "" if self.bias == 0 else number_text(self.bias)

    def renumbered(self, first: int) -> Recovered:
        """The same with captures named from ``c<first>`` on."""
        names = {name: f"c{first + place}" for place, name in enumerate(self.captures)}
        live, bias = (_renamed(formula, names) for formula in (self.program.live, self.bias))
        captures = {names[name]: source for name, source in self.captures.items()}
        return replace(self, program=MaskProgram(live), bias=bias, captures=captures)

    def __str__(self) -> str:
        named = [f"{name} is {_named_source(source)}" for name, source in self.captures.items()]
        named += [f"{name} is {symbol}" for name, symbol in self.sizes.items()]
        return "; ".join((str(self.program), *named))


def _named_source(source: Source) -> str:
    if not isinstance(source, fx.Node):
        return f"{source.root.name} as a table"
    origin: Any = source
    while is_call(origin, *LITERALS):
        origin = origin.args[0]
    return f"a literal ({location(source)})" if origin.op == "get_attr" else source.name


def recover(mask: fx.Node, attention: fx.Node) -> Recovered:
    """The programs of the mask of an attention op.

    Raises:
        Unsupported: the mask can not be expressed; the message says what stood in the way.
    """
    return kept_outcome("fxopt_mask_program", mask, attention, lambda: _recover(mask, attention))


def _recover(mask: fx.Node, attention: fx.Node) -> Recovered:
    try:
        return _by_rules(mask, attention)
    except Unsupported:
        # As it is: a tensor of bools, or of numbers that are added.
        if not isinstance(val(mask), torch.Tensor):
            raise
    return _expressed(mask, captured(_sizes(mask), mask), attention, (mask,))


def _by_rules(mask: fx.Node, attention: fx.Node) -> Recovered:
    return _expressed(mask, value_of(mask), attention, tuple(cone(mask)))


def _expressed(mask: fx.Node, value: Value, attention: fx.Node, made_by: tuple[fx.Node, ...]) -> Recovered:
    sizes = _sizes(mask)
    live, bias, fills = split(value)
    moved, domain = over_scores(sizes, value, attention)
    live = tidied(integral(live.xreplace(moved)), domain, sizes)
    axes = dict(zip(INDEX, AXES, strict=False))
    found = _named(live.xreplace(axes), bias.xreplace(moved).xreplace(axes), fills, made_by)
    _ = str(found.program), found.bias_text  # Unsupported, where a formula has no text
    return found


def _sizes(mask: fx.Node) -> Sizes:
    return Sizes(getattr(val(mask).fake_mode, "shape_env", None))


def over_scores(
    sizes: Sizes, value: Value, attention: fx.Node
) -> tuple[dict[sympy.Symbol, sympy.Expr], Boolean]:
    """The indices of a mask's value in terms of those of the scores, and the range of these."""
    query, key = shape(attention.args[0]), shape(attention.args[1])  # type: ignore[arg-type]
    target = tuple(sizes.size(each) for each in (*query[:-1], key[-2]))
    return dict(zip(INDEX, broadcast(value.shape, target), strict=False)), box(target)


def split(value: Value) -> tuple[Boolean, sympy.Expr, frozenset[float]]:
    """Where a key takes part, what is added to its score there, and what is added elsewhere.

    Raises:
        Unsupported: live keys get numbers of several forms.
    """
    if value.dtype is torch.bool:
        return value.where(1), sympy.Integer(0), frozenset()
    if not value.dtype.is_floating_point:
        raise Unsupported(f"a mask of {value.dtype}")
    fills = {case.number for case in value.cases if is_fill(case.number, value.dtype)}
    kept = [case for case in value.cases if case.number not in fills]
    numbers = {case.number for case in kept}
    if len(numbers) > 1:
        raise Unsupported(f"live keys whose scores get {', '.join(sorted(map(str, numbers)))}")
    number: Any = numbers.pop() if numbers else 0.0
    live = sympy.Or(*(case.guard for case in kept))
    if isinstance(number, float):
        if not math.isfinite(number):
            raise Unsupported(f"live keys whose scores get {number}")
        number = exact(number)
    return live, number, frozenset(fills)


def is_fill(number: Any, dtype: torch.dtype) -> bool:
    """A constant that excludes a key, in a mask of this dtype."""
    if not isinstance(number, float):
        return False
    # bfloat16 has the range of float32: its lowest number, widened, excludes as well.
    return number == -math.inf or number <= LOWEST_SHARE * torch.finfo(dtype).min


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


def _named(
    live: Boolean, bias: sympy.Expr, fills: frozenset[float], made_by: tuple[fx.Node, ...]
) -> Recovered:
    """With ``c0, c1, ...`` and ``n0, n1, ...`` in the place of the names of nodes and symbols."""
    # What stands for a value of an enclosing graph is captured there.
    own = [node for node in made_by if outer_of(node) is None or len(made_by) == 1]
    nodes = {node.name: node for node in own}
    if len(nodes) != len(own):
        raise Unsupported("nodes of one name in nested graphs")
    accesses = live.atoms(AppliedUndef) | bias.atoms(AppliedUndef)
    names = {source: f"c{place}" for place, source in enumerate(sorted({str(a.func) for a in accesses}))}
    captures = {name: _source(source, nodes) for source, name in names.items()}
    symbols = sorted((live.free_symbols | bias.free_symbols) - set(AXES), key=str)
    found = {f"n{place}": symbol for place, symbol in enumerate(symbols)}
    sizes = {symbol: size(name) for name, symbol in found.items()}
    live, bias = (_renamed(formula, names).xreplace(sizes) for formula in (live, bias))
    return Recovered(MaskProgram(live), bias, fills, captures, found, made_by)


def _renamed(formula: Any, names: Mapping[str, str]) -> Any:
    """With other names of captured tensors."""

    def rename(access: Any) -> Any:
        make = capture if access.is_integer else real_capture
        return make(names[str(access.func)])(*access.args)

    return formula.replace(lambda part: isinstance(part, AppliedUndef), rename)


def _source(name: str, nodes: Mapping[str, fx.Node]) -> Source:
    if name.startswith(PREFIX):
        table: Table = nodes[name.removeprefix(PREFIX)].meta[TABLE]
        return table
    return nodes[name]


def in_words(recovered: Recovered, score: str) -> str:
    """The programs as evidence: ``mask="k <= q" score="50*tanh(s/50) + c1[h]*k"``."""
    program, *names = str(recovered).split("; ")
    bias = recovered.bias_text
    changed = f' score="{" + ".join([score or "s", *([bias] if bias else [])])}"' if score or bias else ""
    return "; ".join([f'mask="{program}"{changed}', *names])


def written(made_by: tuple[fx.Node, ...], attention: fx.Node, ctx: Context) -> str | None:
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
