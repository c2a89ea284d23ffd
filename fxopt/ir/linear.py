"""Linear integer arithmetic: can a set of conditions hold? Does it imply another one?

Conditions are sympy relations over integer symbols. A condition becomes a constraint
``sum(c_i * x_i) + c >= 0``; Fourier-Motzkin elimination, with constants rounded to integers, then looks for
a contradiction. The answer "impossible" is a proof. "Possible" is not: rational points count, terms that are
not linear (a product of two sizes, a division) count as free variables, and large systems are given up. So
every caller asks for impossibility, and whatever cannot be proven stays as it is.

Source: Dantzig and Eaves, "Fourier-Motzkin elimination and its dual", 1973.
"""

from __future__ import annotations

import functools
import itertools
import math
from collections import Counter
from collections.abc import Iterable, Iterator

import sympy
from sympy.logic.boolalg import Boolean

# Systems larger than these are given up: masks need a dozen constraints and a few cases.
MAX_CONSTRAINTS = 120
MAX_CASES = 64


class Unsupported(Exception):  # noqa: N818 - a typed refusal, not an error: it becomes evidence
    """Something that the index arithmetic does not cover. The message says what was seen."""


# {(term, coefficient)} and the constant; meaning: their sum is not negative
Constraint = tuple[frozenset[tuple[sympy.Expr, int]], int]


def impossible(*conditions: Boolean) -> bool:
    """Proven: no integers make all `conditions` true at once."""
    try:
        systems = list(itertools.islice(_cases(sympy.And(*conditions)), MAX_CASES + 1))
    except Unsupported:
        return False
    return len(systems) <= MAX_CASES and all(_contradictory(system) for system in systems)


def implies(premise: Boolean, conclusion: Boolean) -> bool:
    """Proven: wherever `premise` is true, `conclusion` is."""
    return impossible(premise, sympy.Not(conclusion))


def equivalent(domain: Boolean, a: Boolean, b: Boolean) -> bool:
    """Proven: `a` and `b` agree everywhere in `domain`."""
    return implies(sympy.And(domain, a), b) and implies(sympy.And(domain, b), a)


def _cases(formula: Boolean) -> Iterator[frozenset[Constraint]]:
    """The disjunctive normal form, case by case, each as a system of constraints."""
    if isinstance(formula, sympy.Not):
        formula = _negated(formula.args[0])
    if formula == sympy.false:
        return
    if formula == sympy.true:
        yield frozenset()
    elif isinstance(formula, sympy.Or):
        for arg in formula.args:
            yield from _cases(arg)
    elif isinstance(formula, sympy.And):
        parts = [list(itertools.islice(_cases(arg), MAX_CASES + 1)) for arg in formula.args]
        if math.prod(len(part) for part in parts) > MAX_CASES:
            raise Unsupported("too many cases")
        for combination in itertools.product(*parts):
            yield frozenset().union(*combination)
    else:
        yield from _atom(formula)


def _negated(formula: Boolean) -> Boolean:
    """The negation, moved inwards."""
    if isinstance(formula, sympy.And):
        return sympy.Or(*(sympy.Not(arg) for arg in formula.args))
    if isinstance(formula, sympy.Or):
        return sympy.And(*(sympy.Not(arg) for arg in formula.args))
    raise Unsupported(f"the condition not {formula}")


def _atom(formula: Boolean) -> Iterator[frozenset[Constraint]]:
    """One relation between integers."""
    if not isinstance(formula, sympy.core.relational.Relational):
        raise Unsupported(f"the condition {formula}")
    difference = formula.lhs - formula.rhs
    if isinstance(formula, sympy.Eq):
        yield frozenset({_at_least_zero(difference), _at_least_zero(-difference)})
    elif isinstance(formula, sympy.Ne):
        yield frozenset({_at_least_zero(difference - 1)})
        yield frozenset({_at_least_zero(-difference - 1)})
    elif isinstance(formula, sympy.Ge):
        yield frozenset({_at_least_zero(difference)})
    elif isinstance(formula, sympy.Gt):
        yield frozenset({_at_least_zero(difference - 1)})
    elif isinstance(formula, sympy.Le):
        yield frozenset({_at_least_zero(-difference)})
    else:
        yield frozenset({_at_least_zero(-difference - 1)})


@functools.lru_cache(maxsize=4096)
def _at_least_zero(expression: sympy.Expr) -> Constraint:
    terms: dict[sympy.Expr, int] = {}
    constant = 0
    for term, coefficient in sympy.expand(expression).as_coefficients_dict().items():
        if not coefficient.is_Integer:
            raise Unsupported(f"the coefficient {coefficient}")
        if term == 1:
            constant += int(coefficient)
        else:
            terms[term] = int(coefficient)
    return _reduced(terms, constant)


def _reduced(terms: dict[sympy.Expr, int], constant: int) -> Constraint:
    """Divided by the greatest common factor; the constant is rounded down, as terms are integers."""
    live = {term: factor for term, factor in terms.items() if factor}
    divisor = math.gcd(*live.values()) if live else 1
    return frozenset((term, factor // divisor) for term, factor in live.items()), constant // divisor


def _contradictory(system: Iterable[Constraint]) -> bool:
    """Eliminate variable after variable; a constant below zero is the contradiction."""
    current = set(system)
    current |= {sign for terms, _ in current for term, _ in terms for sign in _declared_sign(term)}
    while True:
        if any(not terms and constant < 0 for terms, constant in current):
            return True
        current = {entry for entry in current if entry[0]}
        if not current or len(current) > MAX_CONSTRAINTS:
            return False
        current = _eliminate(current, _cheapest(current))


def _declared_sign(term: sympy.Expr) -> list[Constraint]:
    """What sympy knows of a term, sizes for one, and therefore leaves out of conditions."""
    if term.is_positive:
        return [(frozenset({(term, 1)}), -1)]
    return [(frozenset({(term, 1)}), 0)] if term.is_nonnegative else []


def _cheapest(system: set[Constraint]) -> sympy.Expr:
    """The variable whose elimination makes the fewest new constraints."""
    above: Counter[sympy.Expr] = Counter()
    below: Counter[sympy.Expr] = Counter()
    for terms, _ in system:
        for term, factor in terms:
            (above if factor > 0 else below)[term] += 1
    return min({*above, *below}, key=lambda term: (above[term] * below[term], str(term)))


def _eliminate(system: set[Constraint], variable: sympy.Expr) -> set[Constraint]:
    kept: set[Constraint] = set()
    lower: list[Constraint] = []
    upper: list[Constraint] = []
    for entry in system:
        factor = dict(entry[0]).get(variable, 0)
        if factor == 0:
            kept.add(entry)
        else:
            (lower if factor > 0 else upper).append(entry)
    return kept | {_combined(one, other, variable) for one in lower for other in upper}


def _combined(lower: Constraint, upper: Constraint, variable: sympy.Expr) -> Constraint:
    """The positive combination of the two in which `variable` cancels."""
    a, b = dict(lower[0]), dict(upper[0])
    scale_a, scale_b = -b[variable], a[variable]
    terms = {term: scale_a * a.get(term, 0) + scale_b * b.get(term, 0) for term in {*a, *b}}
    return _reduced(terms, scale_a * lower[1] + scale_b * upper[1])
