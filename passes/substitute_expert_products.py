"""Products with a stack of matrices, those of experts -> ``fxopt::expert_linear`` of the quantized stack.

    bmm(x (S, 1, K), w[experts])             a matrix is picked for each token
    bmm(x (E, T, K), w)                      each expert is given tokens of its own
    _grouped_mm(x (S, K), w, ends)           tokens stand in the order of experts, up to row ends[e]

with w a parameter (E, K, N), or (E, N, K) transposed, and operands of `bmm` in either order. Only on request,
as `substitute-qlinear`. Assumed of the last: rows beyond the last end are read by nobody; they become zero.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import fx
from torch._ops import OpOverload

from fxopt.ir import facts
from fxopt.ir.contract import Context, Match, Miss, Verdict
from fxopt.ir.facts import is_call
from fxopt.ir.layer_names import parameter_name
from fxopt.ir.ops.expert_linear import EXPERT_LINEAR

from .packed_parameters import decide, is_shown, packed_inputs, parameter, unturned

aten = torch.ops.aten

_INTEGERS = (torch.int32, torch.int64)


@dataclass(frozen=True)
class SubstituteExpertProducts:
    """Experts with quantized weights."""

    name: ClassVar[str] = "substitute-expert-products"
    after: ClassVar[tuple[str, ...]] = ("substitute-qlinear",)

    @property
    def anchors(self) -> tuple[OpOverload, ...]:
        return (aten.bmm.default, *_grouped())

    def match(self, node: fx.Node) -> Match | Miss | None:
        if not is_shown(node.graph):
            return None
        found = _batched(node) if is_call(node, aten.bmm.default) else _of_groups(node)
        return Match(node, (node,), found | {"found": {}}) if isinstance(found, dict) else found

    def legal(self, match: Match, ctx: Context) -> Verdict:
        node = match.anchor
        if facts.dtype(match["x"]) != facts.dtype(node):
            return Verdict.no(f"a result of {facts.dtype(node)} of tokens of {facts.dtype(match['x'])}")
        return decide(match, parameter_name(match["weight"]), ctx)

    def profit(self, match: Match, ctx: Context) -> Verdict:
        return Verdict.yes(match["found"]["chosen"].sizes(match["weight"]))

    def replace(self, match: Match, graph: fx.Graph) -> fx.Node:
        chosen, weight, call = match["found"]["chosen"], match["weight"], graph.call_function
        count, *sizes = facts.shape(weight)
        parts = packed_inputs(graph, weight, chosen)[:3]
        kinds = chosen.attributes | {"count": count}
        if is_call(match.anchor, *_grouped()):
            experts = _experts_of_rows(graph, match["x"], match["ends"])
            return call(EXPERT_LINEAR.overload, (match["x"], experts, *parts), kinds)
        x = call(aten.transpose.int, (match["x"], 1, 2)) if match["is_left"] else match["x"]
        rows = call(aten.reshape.default, (x, [-1, sizes[0 if match["transposed"] else 1]]))
        experts = _experts_of_batch(graph, x, match, facts.val(match.anchor).device)
        out = call(EXPERT_LINEAR.overload, (rows, experts, *parts), kinds)
        shape = _batch_shape(match)
        wide = call(aten.reshape.default, (out, [*shape, sizes[1 if match["transposed"] else 0]]))
        return call(aten.transpose.int, (wide, 1, 2)) if match["is_left"] else wide


def _grouped() -> tuple[OpOverload, ...]:
    """Products of groups: PyTorch's, and that of transformers for other dtypes than bfloat16, if loaded."""
    own = getattr(torch.ops.transformers, "grouped_mm_fallback", None)
    return (aten._grouped_mm.default, *(() if own is None else (own.default,)))


def _batched(node: fx.Node) -> dict[str, Any] | Miss | None:
    """Of `bmm`: x, the stack, whose matrices are picked, and which operand it is."""
    for place in (1, 0):
        weight, turned, experts = _stack(node.args[place])
        if weight is None:
            continue
        is_left, x = place == 0, node.args[1 - place]
        batch, tokens = facts.shape(x)[0], facts.shape(x)[1 + is_left]  # type: ignore[arg-type]
        if not isinstance(tokens, int) and not isinstance(batch, int):
            return Miss("a known number of experts, or of tokens for each", f"{batch} and {tokens}")
        # The right operand is (K, N), the left one (N, K).
        parts = {"x": x, "weight": weight, "experts": experts, "is_left": is_left}
        return parts | {"transposed": turned if is_left else not turned}
    return None


def _stack(operand: Any) -> tuple[fx.Node | None, bool, fx.Node | None]:
    """The parameter (E, ., .), whether its matrices are transposed, and whose are picked; None: all."""
    base, turned = unturned(operand)
    experts = None
    if is_call(base, aten.index.Tensor, aten.index_select.default) and (experts := _picks(base)) is not None:
        base = base.args[0]
    weight, inner = parameter(base)
    is_stack = weight is not None and facts.rank(weight) == 3
    return (weight if is_stack else None), turned != inner, experts


def _picks(node: fx.Node) -> fx.Node | None:
    """The integers (S,) that matrices of a stack are picked by."""
    arguments: Any = node.args[1:]
    if is_call(node, aten.index_select.default):
        place = arguments[1] if arguments[0] in (0, -3) else None
    else:
        place, *rest = arguments[0]
        place = place if all(each is None for each in rest) else None
    plain = isinstance(place, fx.Node) and facts.rank(place) == 1 and facts.dtype(place) in _INTEGERS
    return place if plain else None


def _of_groups(node: fx.Node) -> dict[str, Any] | Miss | None:
    x, operand, ends = (node.args[0], node.args[1], _argument(node, 2, "offs"))
    base, turned = unturned(operand)
    weight, inner = parameter(base)
    if weight is None or facts.rank(weight) != 3:
        return None
    if facts.rank(x) != 2 or not isinstance(ends, fx.Node):  # type: ignore[arg-type]
        return Miss("tokens (S, K), and where those of each expert end", "another kind of groups")
    if any(_argument(node, place, name) is not None for place, name in ((3, "bias"), (4, "out_dtype"))):
        return Miss("a product alone", "a bias or another dtype")
    return {"x": x, "weight": weight, "ends": ends, "transposed": turned == inner}


def _argument(node: fx.Node, place: int, name: str) -> Any:
    return node.args[place] if len(node.args) > place else node.kwargs.get(name)


def _experts_of_rows(graph: fx.Graph, x: fx.Node, ends: fx.Node) -> fx.Node:
    """Of each row the first expert that ends behind it."""
    ones = graph.call_function(
        aten.ones_like.default,
        (graph.call_function(aten.select.int, (x, 1, 0)),),
        {"dtype": facts.dtype(ends)},
    )
    numbers = graph.call_function(aten.cumsum.default, (ones, 0), {"dtype": facts.dtype(ends)})
    return graph.call_function(aten.searchsorted.Tensor, (ends, numbers))


def _experts_of_batch(graph: fx.Graph, x: fx.Node, match: Match, device: torch.device) -> fx.Node:
    """The expert of each row of x (B, T, K): that which is picked for its batch, or of the same number."""
    call, of_batch = graph.call_function, match["experts"]
    batch, tokens = _sizes(match)
    if of_batch is None:
        of_batch = call(aten.arange.default, (batch,), {"device": device})
    elif facts.same_size(tokens, 1):
        return of_batch  # type: ignore[no-any-return]
    first = call(aten.select.int, (x, 2, 0))
    zeros = call(aten.zeros_like.default, (first,), {"dtype": torch.int64})
    each = call(aten.add.Tensor, (zeros, call(aten.unsqueeze.default, (of_batch, 1))))
    return call(aten.reshape.default, (each, [-1]))


def _sizes(match: Match) -> tuple[Any, Any]:
    """B and T of x."""
    return facts.shape(match["x"])[0], facts.shape(match["x"])[1 + match["is_left"]]


def _batch_shape(match: Match) -> list[Any]:
    """(B, T) of the result, the one that is not known as -1."""
    batch, tokens = _sizes(match)
    return [batch, -1] if isinstance(batch, int) else [-1, tokens]
