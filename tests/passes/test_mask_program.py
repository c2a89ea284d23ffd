"""Mask programs: recovered from the operations that make the mask, and equal to it at every entry."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import fx
from torch.fx.experimental.proxy_tensor import make_fx

from fxopt.ir.cone import symbols
from fxopt.ir.formula import number_text, size
from fxopt.ir.program import MaskProgram
from fxopt.ir.tables import Table
from fxopt.ir.tile_values import TileValues
from fxopt.passes.mask_check import difference
from fxopt.passes.mask_program import Recovered, recover

B, H, S, T, D = 2, 3, 6, 8, 4
Mask = Callable[..., torch.Tensor]

q_index = torch.arange(S).view(1, 1, S, 1)
k_index = torch.arange(T).view(1, 1, 1, T)


def attention(mask: Mask, *data: torch.Tensor, sizes: str = "fake") -> tuple[fx.GraphModule, fx.Node]:
    """An attention over S queries and T keys under `mask`. `sizes`: make_fx's tracing_mode."""

    def attend(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, *data: torch.Tensor) -> torch.Tensor:
        rows, columns = torch.arange(q.shape[2]).view(1, 1, -1, 1), torch.arange(k.shape[2]).view(1, 1, 1, -1)
        return torch.nn.functional.scaled_dot_product_attention(q, k, v, mask(rows, columns, *data))

    gm = make_fx(attend, tracing_mode=sizes, pre_dispatch=True)(*_inputs(*data))
    (node,) = gm.graph.find_nodes(
        op="call_function", target=torch.ops.aten.scaled_dot_product_attention.default
    )
    return gm, node


def _inputs(*data: torch.Tensor) -> list[torch.Tensor]:
    return [torch.randn(B, H, S, D), torch.randn(B, H, T, D), torch.randn(B, H, T, D), *data]


def site(mask: Mask, *data: torch.Tensor) -> tuple[Recovered, dict[str, torch.Tensor]]:
    """The program of the mask of an attention; its captured tensors by name."""
    gm, node = attention(mask, *data)
    found = recover(node.args[3], node)
    return found, _captured(gm, found, _inputs(*data))


def _captured(gm: fx.GraphModule, found: Recovered, inputs: list[torch.Tensor]) -> dict[str, torch.Tensor]:
    values: dict[str, torch.Tensor] = {}

    class Watch(fx.Interpreter):
        def run_node(self, n: fx.Node) -> Any:
            result = super().run_node(n)
            values[n.name] = result
            return result

    Watch(gm).run(*inputs)
    return {name: _of_source(source, values) for name, source in found.captures.items()}


def _of_source(source: fx.Node | Table, values: dict[str, torch.Tensor]) -> torch.Tensor:
    if isinstance(source, fx.Node):
        return values[source.name]
    env: dict[fx.Node, Any] = {source.base: torch.arange(int(source.low), int(source.high) + 1)}
    for step in source.steps:
        args = fx.node.map_arg(step.args, lambda n: env.get(n, values.get(n.name)))
        kwargs = fx.node.map_arg(step.kwargs, lambda n: env.get(n, values.get(n.name)))
        env[step] = step.target(*args, **kwargs)  # type: ignore[operator]
    made: torch.Tensor = env[source.root]
    return made


def check(mask: Mask, *data: torch.Tensor) -> str:
    """Recover the program, compare it with the mask entry by entry, and return its text."""
    found, captured = site(mask, *data)
    wanted = mask(q_index, k_index, *data)
    live = found.program.compute((B, H), (0, S), (0, T), captured, {}, torch.device("cpu"))
    if not wanted.is_floating_point():
        assert torch.equal(live.expand(B, H, S, T), wanted.expand(B, H, S, T)), str(found)
        return str(found.program)
    ranges = ((0, B), (0, H), (0, S), (0, T))
    bias = TileValues(ranges, captured, {}, torch.device("cpu")).number(found.bias)
    got = torch.where(live, bias, next(iter(found.fills), -math.inf))
    torch.testing.assert_close(got.expand(B, H, S, T), wanted.expand(B, H, S, T), msg=str(found))
    return " | ".join([str(found.program), *([found.bias_text] if found.bias_text else [])])


padding = torch.tensor([[0, 1, 1, 1, 1, 1, 1, 0], [1, 1, 1, 1, 1, 0, 0, 0]])
documents = torch.tensor([[0, 0, 0, 1, 1, 2, 2, 2], [0, 1, 1, 1, 1, 1, 2, 3]])
lowest = torch.finfo(torch.float32).min
batches = torch.arange(B).view(B, 1, 1, 1)


def spelled(m: torch.Tensor) -> torch.Tensor:
    return torch.where(m, torch.zeros(()), lowest)


def bucket(distance: torch.Tensor) -> torch.Tensor:
    """Small distances exactly, larger ones by their logarithm."""
    far = distance.abs()
    coarse = 1 + torch.log2(far.float() + 1.0).to(torch.int64)
    return torch.where(far < 2, far, torch.min(coarse, torch.full_like(coarse, 4)))


def of_queries(d: torch.Tensor, q: torch.Tensor) -> torch.Tensor:
    return d[:, None, : q.shape[2], None]


def zeros(like: torch.Tensor) -> torch.Tensor:
    return torch.zeros_like(like, dtype=torch.float32)


def excluded(p: torch.Tensor) -> torch.Tensor:
    return p[:, None, None] == 0


PROGRAMS: dict[str, tuple[Mask, tuple[torch.Tensor, ...], str]] = {
    "causal": (lambda q, k: k <= q, (), "k <= q"),
    "causal_with_a_cache": (lambda q, k: k - 2 <= q, (), "k <= q + 2"),
    "length_of_a_static_cache": (
        lambda q, k, n: k <= q + n, (torch.tensor(2),), "k <= c0[0, 0, q, 0]"),
    "padding": (lambda q, k, p: p.bool()[:, None, None, :], (padding,), "c0[b, k]"),
    "gathered_padding": (
        lambda q, k, p: (k <= q) & p.bool()[torch.arange(B).view(B, 1, 1, 1), k],
        (padding,),
        "c0[b, k] and k <= q",
    ),
    "window": (lambda q, k, p: (k <= q) & (q - k < 3) & (p[:, None, None] != 0), (padding,),
               "c0[b, k] and k <= q and k > q - 3"),
    "both_ways": (lambda q, k: (k - q <= 2) & (q - k <= 1), (), "k <= q + 2 and k >= q - 1"),
    "distance": (lambda q, k: (q - k).abs() <= 2, (), "k <= q + 2 and k >= q - 2"),
    "distance_and_padding": (
        lambda q, k, p: ((k - q).abs() < 3) & p.bool()[:, None, None, :],
        (padding,),
        "c0[b, k] and k < q + 3 and k > q - 3",
    ),
    "prefix": (lambda q, k: (k <= q) | (k < 3), (), "k < 3 or k <= q"),
    "documents": (
        lambda q, k, d: (k <= q) & (of_queries(d, q) == d[:, None, None, :]),
        (documents,),
        "c0[b, k] == c0[b, q] and k <= q",
    ),
    "images": (
        lambda q, k, d: (k <= q) | ((of_queries(d, q) == d[:, None, None]) & (of_queries(d, q) > 0)),
        (documents,),
        "(c0[b, k] == c0[b, q] and c0[b, q] > 0) or k <= q",
    ),
    "additive": (lambda q, k, p: spelled((k <= q) & p.bool()[:, None, None]), (padding,),
                 "c0[b, k] and k <= q"),
    "filled": (
        lambda q, k, p: zeros(q - k).masked_fill(k > q, lowest).masked_fill(excluded(p), lowest),
        (padding,),
        "c0[b, k] and k <= q",
    ),
    "not_of_or": (lambda q, k, p: ~((k > q) | (p[:, None, None] == 0)), (padding,), "c0[b, k] and k <= q"),
    "whole_tensor": (lambda q, k, m: m, (torch.rand(B, 1, S, T) > 0.5,), "c0[b, 0, q, k]"),
    "chunks": (lambda q, k: (k <= q) & (k // 3 == q // 3), (), "(k)//3 == (q)//3 and k <= q"),
    "distance_times_a_slope": (
        lambda q, k, t: (k - q).float() * t[None, :, None, None], (torch.rand(H),),
        "True | k*c0[h] - q*c0[h]"),
    "slopes_under_a_causal_mask": (
        lambda q, k, t: torch.where(k <= q, 0.0, lowest) + t.view(1, H, 1, 1) * k, (torch.rand(H),),
        "k <= q | k*c0[h]"),
    "relative_table": (
        lambda q, k, t: t[:, (k - q + S)[0, 0]][None], (torch.rand(H, S + T),), "True | c0[h, k - q + 6]"),
    "buckets": (
        lambda q, k, t: torch.nn.functional.embedding(bucket((k - q)[0, 0]), t).permute(2, 0, 1)[None],
        (torch.rand(5, H),), "True | c0[c1[k - q + 5], h]"),
    "a_table_of_places": (
        lambda q, k, t, i: t[i.view(-1)].view(*i.shape, t.shape[1]).permute(2, 0, 1)[None],
        (torch.rand(9, H), torch.randint(9, (S, T))), "True | c0[c1[q, k], h]"),
    "a_bias_of_numbers": (lambda q, k, m: m, (torch.rand(B, 1, S, T),), "True | c0[b, 0, q, k]"),
    "an_entry_between": (lambda q, k: torch.where(k <= q, 0.0, -1e4), (), "True | c0[0, 0, q, k]"),
    "a_bias_where_it_is_live": (
        lambda q, k, t, p: torch.where(p.bool()[:, None, None], t[None, :, None], -torch.inf),
        (torch.rand(H, T), padding), "c1[b, k] | c0[h, k]"),
    "of_each_head": (lambda q, k, m: (k <= q) & m[None, :, None, :], (torch.rand(H, T) > 0.5,),
                     "c0[h, k] and k <= q"),
    "running_sum_is_captured": (
        lambda q, k, d: d.diff(dim=-1, prepend=d[:, :1]).ne(0).cumsum(-1)[:, None, None, :] == q,
        (documents,),
        "c0[b, k] == q",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", PROGRAMS)
def test_recovered(name: str) -> None:
    mask, data, text = PROGRAMS[name]
    assert check(mask, *data) == text


# The table may be too short for other sizes, and an index in front of its first entry counts from its end.
ONLY_OF_KNOWN_SIZES = "relative_table"


@pytest.mark.parametrize("name", PROGRAMS)
def test_recovered_from_sizes_that_are_not_known(name: str) -> None:
    """The same formula: at these sizes its text is that of the formula of known sizes."""
    mask, data, text = PROGRAMS[name]
    _, node = attention(mask, *data, sizes="symbolic")
    found = recover(node.args[3], node)
    assert difference(found, node.args[3], node) is None
    if name == ONLY_OF_KNOWN_SIZES:
        assert found.bias_text == "c0[h, q, k]"
        return
    hints = symbols([*found.made_by, node])
    here = {size(name): hints[symbol] for name, symbol in found.sizes.items()}
    bias = [number_text(found.bias.xreplace(here))] if found.bias != 0 else []
    assert " | ".join([str(MaskProgram(found.program.live.xreplace(here))), *bias]) == text


def test_captured_integers_are_not_computed_with() -> None:
    """They may be as large as they like: a sum of them is a tensor of its own."""
    text = check(lambda q, k, d: (d + 2)[:, None, None, :] > q, documents)
    assert text == "c0[b, k] > q"


def shifted(number: torch.Tensor, shift: int) -> torch.Tensor:
    return number - shift if shift else number


def masks() -> st.SearchStrategy[Mask]:
    numbers = st.sampled_from(
        [
            lambda q, k, p, d: q,
            lambda q, k, p, d: k,
            lambda q, k, p, d: q - k,
            lambda q, k, p, d: d[:, None, None, :],
            lambda q, k, p, d: d[:, None, :S, None],
        ]
    )
    conditions = st.one_of(
        st.builds(
            lambda compare, a, b, shift: (
                lambda *args: compare(a(*args), b(*args) - shift if shift else b(*args))
            ),
            st.sampled_from([torch.le, torch.lt, torch.eq, torch.ge, torch.ne]),
            numbers,
            numbers,
            st.integers(-2, 3),
        ),
        st.just(lambda q, k, p, d: p.bool()[:, None, None, :]),
        st.just(lambda q, k, p, d: p[:, None, None, :] == 0),
    )
    joins = st.sampled_from([torch.logical_and, torch.bitwise_or, lambda a, b: a & ~b, lambda a, b: ~(a | b)])
    return st.recursive(
        conditions,
        lambda inner: st.builds(
            lambda join, a, b: lambda *args: join(a(*args), b(*args)), joins, inner, inner
        ),
        max_leaves=5,
    )


@settings(max_examples=40, deadline=None)
@given(masks(), st.booleans())
def test_recovered_from_random_code(mask: Mask, additive: bool) -> None:
    def shaped(q: torch.Tensor, k: torch.Tensor, p: torch.Tensor, d: torch.Tensor) -> torch.Tensor:
        found = mask(q, k, p, d).expand(B, 1, S, T)
        return spelled(found) if additive else found

    check(shaped, padding, documents)
