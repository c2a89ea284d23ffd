"""Attention over keys and values that are a linear function of latents -> attention over the latents.

    K = [c W_k^T, rest],  V = c W_v^T     softmax(q_1 W_k c^T + q_2 rest^T) c W_v^T

Multi-head latent attention keeps the latents c (B, 1, S, r) of all tokens in its cache, and expands them to
the keys and values of H heads: r * H * (Dk + Dv) multiplications for every token of the past, at every step.
A product with the weights on the side of the query, and one behind the attention, take their place: H * 2r
for every token, and no tensor of all heads and tokens. For many queries the expansion is the cheaper one.

Assumed: associativity, within the rounding that the expansion has too.

Source: DeepSeek-AI, "DeepSeek-V2", 2024, section 2.1.2 (the absorbed matrices), arXiv:2405.04434.
"""

from __future__ import annotations

import math
import operator
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import fx
from torch._ops import OpOverload

from fxopt.ir import facts
from fxopt.ir.contract import Context, Cost, Match, Miss, Verdict
from fxopt.ir.cost import hint, numel
from fxopt.ir.facts import argument, is_call, val
from fxopt.ir.ops.attention import ATTENTION
from fxopt.ir.ops.attention_providers import GROWN

from .latent_projections import COPIES, Heads, Projection, find_projection

aten = torch.ops.aten

DTYPES = (torch.float32, torch.bfloat16, torch.float64)


@dataclass(frozen=True)
class Keys:
    """K as a projection, and what stands beside it along D."""

    projection: Projection
    rest: Heads | None = None
    rest_first: bool = False

    @property
    def rest_width(self) -> int:
        return 0 if self.rest is None else hint(self.rest.width)

    @property
    def rest_heads(self) -> int:
        return 1 if self.rest is None or self.rest.is_shared else hint(self.rest.value.shape[1])


@dataclass(frozen=True)
class AbsorbLatentAttention:
    """Attention over latents instead of over the keys and values that they expand to."""

    name: ClassVar[str] = "absorb-latent-attention"
    after: ClassVar[tuple[str, ...]] = ("rewrite-attention", "remove-repeat-kv", "recover-mask")

    @property
    def anchors(self) -> tuple[OpOverload, ...]:
        return (ATTENTION.overload,)

    def match(self, node: fx.Node) -> Match | Miss | None:
        if argument(node, "query_rest") is not None:
            return None
        query, key, of_value = _operands(node)
        keys, value = _keys(Heads(key)), find_projection(Heads(of_value))
        if keys is None or isinstance(keys, Miss):
            return keys
        if value is None:
            return None if keys.rest is None else Miss("V made of latents, as K is", "another V")
        if keys.rest is None and facts.same_size(val(query).shape[-2], val(key).shape[-2]):
            return None  # tokens that attend to each other, of which nothing is cached
        return Match(node, (node,), {"keys": keys, "value": value})

    def legal(self, match: Match, ctx: Context) -> Verdict:
        node, keys = match.anchor, match["keys"]
        if ctx.facts.differentiates(node):
            return Verdict.no("wanted a decoding step, saw one that gradients may be wanted of")
        if ctx.facts.in_autocast(node):
            return Verdict.no("wanted products in the dtypes of their operands, saw autocast")
        read = [each for made in (keys.projection, match["value"]) for each in (made.source, made.weight)]
        kinds = {facts.dtype(each) for each in (*_operands(node), *_rest(keys), *read)}
        if len(kinds) > 1 or not kinds <= set(DTYPES):
            names = ", ".join(sorted(map(str, kinds)))
            return Verdict.no(f"wanted one dtype with the range of float32, saw {names}")
        for made in (keys.projection, match["value"]):
            if argument(made.linear, "bias") is not None:
                return Verdict.no(f"wanted a product, saw {made.linear.name} with a bias")
            changed = ctx.facts.unsafe_read([made.source, made.weight, made.linear], made.linear, node)
            if changed:
                return Verdict.no(changed)
        joined = [_operands(node)[1], *_rest(keys)]
        changed = ctx.facts.unsafe_read(joined, min(joined), node)
        return Verdict.no(changed) if changed else Verdict.yes()

    def profit(self, match: Match, ctx: Context) -> Verdict:
        rows = val(match.anchor).shape[-2]
        if not isinstance(rows, int):
            return Verdict.no(f"wanted a known number of queries, saw {rows}")
        for made in (match["keys"].projection, match["value"]):
            other = _other_reader(made.linear, match.anchor)
            if other is not None:
                return Verdict.no(f"{made.linear.name} is computed anyway, for {other.name}")
        before, after = _costs(match)
        numbers = (
            f"{rows} queries: {before.flops} flop and {before.bytes} B with K and V expanded, "
            f"{after.flops} flop and {after.bytes} B over latents"
        )
        return Verdict(after.flops < before.flops and after.bytes < before.bytes, numbers)

    def replace(self, match: Match, graph: fx.Graph) -> fx.Node:
        node, keys, value = match.anchor, match["keys"], match["value"]
        heads, whole = val(node).shape[1], _operands(node)[0]
        query, rest = _query_parts(graph, whole, keys)
        query = _by_heads(graph, query, keys.projection, heads, "bhqd,hdr->bhqr")
        scale = argument(node, "scale")
        scale = 1.0 / math.sqrt(val(whole).shape[-1]) if scale is None else scale
        kwargs: dict[str, Any] = {**node.kwargs, "scale": scale, "enable_gqa": True}
        if keys.rest is not None:
            kwargs |= {"query_rest": rest, "key_rest": keys.rest.in_graph(graph)}
        latents = (keys.projection.latent(graph), value.latent(graph))
        seen = graph.call_function(node.target, (query, *latents, *node.args[3:]), kwargs)  # type: ignore[arg-type]
        return _by_heads(graph, seen, value, heads, "bhqr,hdr->bhqd")


def _operands(node: fx.Node) -> list[fx.Node]:
    """Q, K and V."""
    return list(node.args[:3])  # type: ignore[arg-type]


def _keys(key: Heads) -> Keys | Miss | None:
    """K as a projection of latents and, before or behind it, something else."""
    parts = key.parts()
    made = [find_projection(part) for part in parts]
    if not any(made):
        return None
    if len(parts) > 2 or (len(parts) == 2 and all(made)):
        return Miss("K made of latents and one other part", f"{sum(map(bool, made))} of {len(parts)} parts")
    place = 0 if made[0] is not None else 1
    projection = made[place]
    assert projection is not None
    if len(parts) == 1:
        return Keys(projection)
    rest = parts[1 - place]
    if not isinstance(rest.width, int):
        return Miss("parts of K of known width", f"{rest.width}")
    return Keys(projection, rest, rest_first=place == 1)


def _rest(keys: Keys) -> list[fx.Node]:
    """What stands beside the projection."""
    return [] if keys.rest is None else [keys.rest.node]


def _other_reader(linear: fx.Node, anchor: fx.Node) -> fx.Node | None:
    """Who reads what a linear function made, besides what leads to the anchor alone."""
    pending: list[fx.Node] = [linear]
    found: set[fx.Node] = set()
    while pending:
        for user in pending.pop().users:
            if user is anchor or user in found:
                continue
            if not _is_layout(user):
                return user
            found.add(user)
            pending.append(user)
    return None


def _is_layout(node: fx.Node) -> bool:
    """It moves numbers, and computes none."""
    if node.target is operator.getitem or is_call(node, aten.cat.default, *COPIES):
        return True
    return isinstance(node.target, OpOverload) and node.target.is_view


def _costs(match: Match) -> tuple[Cost, Cost]:
    """Expanded and absorbed. A cache that grows is judged at the length that others are judged at."""
    keys, value = match["keys"], match["value"]
    query, key, _ = map(val, _operands(match.anchor))
    batch, heads, rows, width = map(hint, query.shape)
    columns = hint(key.shape[-2])
    if not isinstance(key.shape[-2], int):
        columns = max(GROWN, columns)
    weights = {each.linear: val(each.weight) for each in (keys.projection, value)}.values()
    entries, made = sum(map(numel, weights)), sum(hint(weight.shape[0]) for weight in weights)
    depths = keys.projection.depth + value.depth
    cached = batch * columns * (depths + keys.rest_width * keys.rest_heads)
    scores = batch * heads * rows * columns
    taken = keys.projection.width * keys.projection.depth + value.width * value.depth
    # K and V of all heads are written, and read again.
    expanded = Cost(
        bytes=key.element_size() * (entries + cached + 2 * batch * columns * made),
        flops=2 * batch * columns * entries + 2 * scores * (width + value.width),
    )
    absorbed = Cost(
        bytes=key.element_size() * (entries + cached),
        flops=2 * batch * heads * rows * taken + 2 * scores * (depths + keys.rest_width),
    )
    return expanded, absorbed


def _query_parts(graph: fx.Graph, query: fx.Node, keys: Keys) -> tuple[fx.Node, fx.Node | None]:
    """What of Q meets the projection, and what meets the rest of K."""
    if keys.rest is None:
        return query, None
    cut = keys.rest_width if keys.rest_first else keys.projection.width
    ends = ((0, cut), (cut, val(query).shape[-1]))
    first, second = (graph.call_function(aten.slice.Tensor, (query, 3, *end)) for end in ends)
    return (second, first) if keys.rest_first else (first, second)


def _by_heads(
    graph: fx.Graph, tensor: fx.Node, made: Projection, heads: facts.Size, equation: str
) -> fx.Node:
    """(B, Hq, Sq, *) by the matrices of the heads; the query heads of a group have one in common."""
    matrices = made.matrices(graph)
    if facts.same_size(heads, made.heads):
        return graph.call_function(aten.einsum.default, (equation, [tensor, matrices]))
    tensor = graph.call_function(aten.unflatten.int, (tensor, 1, [made.heads, -1]))
    grouped = equation.replace("bh", "bhg")
    out = graph.call_function(aten.einsum.default, (grouped, [tensor, matrices]))
    return graph.call_function(aten.flatten.using_ints, (out, 1, 2))
