"""fuse-append-attention: rotation, write and attention become one op; what cannot be moved stays."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch.nn import functional as F

from fxopt.ir.contract import Status
from fxopt.ir.graph_facts import Kernels
from support.decoding_layers import (
    FIRST,
    KERNELS,
    KV_HEADS,
    NEW,
    ROWS,
    B,
    D,
    Site,
    Tensor,
    attend,
    new_rows,
    turn,
)
from support.golden import assert_golden
from support.numerics import assert_closer
from support.rewriting import Rewritten, rewriting

NAME = "fuse-append-attention"
PASSES = ("eliminate-noops", "rewrite-attention", "remove-repeat-kv", "recover-mask", NAME)
ROTATED, APPENDED = "rotated, written and attended to", "are written and attended to"


def inputs(dtype: torch.dtype = torch.float32) -> list[Tensor]:
    """q, k, v, cos, sin, position, key, value, mask; rows in front of the new ones and behind are seen."""
    rows = new_rows()
    caches = [torch.randn(B, KV_HEADS, ROWS, D) for _ in range(2)]
    mask = torch.rand(B, 1, NEW, ROWS) > 0.3
    given = [*rows, torch.tensor(FIRST), *caches, mask]
    return [each.to(dtype) if each.is_floating_point() else each for each in given]


def turn_neighbours(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """As GLM has it."""
    cos, sin = (each[..., : D // 2].repeat_interleave(2, -1).unsqueeze(1) for each in (cos, sin))
    turned = torch.stack((-x[..., 1::2], x[..., 0::2]), dim=-1).flatten(-2)
    return x * cos + turned * sin


def turn_a_part(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """As Phi has it."""
    return torch.cat([turn(x[..., :8], cos[..., :8], sin[..., :8]), x[..., 8:]], dim=-1)


def turn_halves(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """As GPT-OSS has it: angles of half the width."""
    cos, sin = cos[..., : D // 2].unsqueeze(1), sin[..., : D // 2].unsqueeze(1)
    first, second = torch.chunk(x, 2, dim=-1)
    return torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1)


def turn_wide(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """As Cohere has it: in float32."""
    return turn(x.float(), cos.float(), sin.float()).to(x.dtype)


def turn_a_product(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    return turn(x * cos[:, None], cos, sin)


def append(key: Tensor, value: Tensor, k: Tensor, v: Tensor, position: Tensor) -> None:
    rows = torch.arange(k.shape[2], device=k.device) + position
    key.index_copy_(2, rows, k)
    value.index_copy_(2, rows, v)


def layer(rotate: Callable[..., Tensor]) -> Site:
    def site(
        q: Tensor, k: Tensor, v: Tensor, cos: Tensor, sin: Tensor, position: Tensor, key: Tensor,
        value: Tensor, mask: Tensor,
    ) -> Tensor:  # fmt: skip
        append(key, value, rotate(k, cos, sin), v, position)
        return attend(rotate(q, cos, sin), key, value, mask)

    return site


def sliced(q, k, v, cos, sin, position, key, value, mask):  # type: ignore[no-untyped-def] # noqa: ANN001, ANN201
    key[:, :, 4:7] = turn(k, cos, sin)
    value[:, :, 4:7] = v
    return attend(turn(q, cos, sin), key, value, mask)


def last_rows(q, k, v, cos, sin, position, key, value, mask):  # type: ignore[no-untyped-def] # noqa: ANN001, ANN201
    """As a growing cache with room has them, without a mask."""
    key[:, :, ROWS - NEW :].copy_(turn(k, cos, sin))
    value[:, :, ROWS - NEW :].copy_(v)
    return F.scaled_dot_product_attention(turn(q, cos, sin), key, value, enable_gqa=True)


def moved_on(q, k, v, cos, sin, position, key, value, mask):  # type: ignore[no-untyped-def] # noqa: ANN001, ANN201
    """As transformers has it: the position moves on before the rows are written."""
    rows = torch.arange(NEW) + position
    position.add_(NEW)
    key = key.index_copy_(2, rows, turn(k, cos, sin))
    return attend(turn(q, cos, sin), key, value.index_copy_(2, rows, v), mask) + key.sum()


def ring(q, k, v, cos, sin, position, key, value, mask):  # type: ignore[no-untyped-def] # noqa: ANN001, ANN201
    """One row, wherever it goes."""
    row = (position[None] * 7) % ROWS
    key.index_copy_(2, row, turn(k, cos, sin)[:, :, :1])
    value.index_copy_(2, row, v[:, :, :1])
    return attend(q[:, :, :1], key, value, mask[:, :, :1])


FIRES: dict[str, tuple[Site, str]] = {
    "halves": (layer(turn), ROTATED),
    "neighbours": (layer(turn_neighbours), ROTATED),
    "a part": (layer(turn_a_part), ROTATED),
    "half angles": (layer(turn_halves), ROTATED),
    "float32": (layer(turn_wide), ROTATED),
    "a product": (layer(turn_a_product), ROTATED),
    "no embedding": (layer(lambda x, cos, sin: x), APPENDED),
    "another embedding": (layer(lambda x, cos, sin: x * cos[:, None] + x.flip(-1) * sin[:, None]), APPENDED),
    "a slice": (sliced, ROTATED),
    "the last rows": (last_rows, ROTATED),
    "a position that moves on": (moved_on, ROTATED),
    "any one row": (ring, APPENDED),
}


def run(site: Site, given: list[Tensor], kernels: Kernels | None = KERNELS) -> tuple[Rewritten, list[Any]]:
    """What happened, and the result with all that may have been written."""
    found, args = rewriting(site, PASSES, kernels=kernels), [each.clone() for each in given]
    with torch.no_grad():
        return found, [found.call(*args), *args[5:8]]


def check(site: Site, dtype: torch.dtype = torch.float32) -> Rewritten:
    """The answer is eager's, whatever was done."""
    given = inputs(dtype)
    found, results = run(site, given)
    plain = [each.clone() for each in given]
    exact = [each.double() if each.is_floating_point() else each.clone() for each in given]
    eager, reference = [site(*plain), *plain[5:8]], [site(*exact), *exact[5:8]]
    assert_closer(reference, results, eager, strides=False)
    return found


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", FIRES)
def test_fires(name: str, dtype: torch.dtype) -> None:
    site, reason = FIRES[name]
    found = check(site, dtype)
    assert found.applied(NAME) == 1, found.reasons(NAME)
    assert reason in found.reasons(NAME)
    assert "cached" in found.providers[0]
    assert not [line for line in found.after[0].splitlines() if "index_copy_" in line or ".copy_" in line]


def test_fires_golden() -> None:
    found, _ = run(FIRES["halves"][0], inputs())
    assert_golden(found.before[0], "fuse_append_attention", "halves_before")
    assert_golden(found.after[0], "fuse_append_attention", "halves_after")


def rotated_keys_are_read(q, k, v, cos, sin, position, key, value, mask):  # type: ignore[no-untyped-def] # noqa: ANN001, ANN201
    k = turn(k, cos, sin)
    append(key, value, k, v, position)
    return attend(turn(q, cos, sin), key, value, mask) + k.sum()


def angles_of_their_own(q, k, v, cos, sin, position, key, value, mask):  # type: ignore[no-untyped-def] # noqa: ANN001, ANN201
    append(key, value, turn(k, sin, cos), v, position)
    return attend(turn(q, cos, sin), key, value, mask)


def only_queries(q, k, v, cos, sin, position, key, value, mask):  # type: ignore[no-untyped-def] # noqa: ANN001, ANN201
    append(key, value, k, v, position)
    return attend(turn(q, cos, sin), key, value, mask)


@pytest.mark.parametrize(
    ("site", "reason"),
    [(rotated_keys_are_read, "as well"), (angles_of_their_own, "alike"), (only_queries, "alike")],
)
def test_rotated_in_front(site: Site, reason: str) -> None:
    found = check(site)
    assert found.applied(NAME) == 1
    assert reason in found.reasons(NAME)


def rotated_behind_the_cache(q, k, v, cos, sin, position, key, value, mask):  # type: ignore[no-untyped-def] # noqa: ANN001, ANN201
    append(key, value, k, v, position)
    return attend(turn(q, cos, sin), key * 2, value, mask)


def a_part_of_the_cache(q, k, v, cos, sin, position, key, value, mask):  # type: ignore[no-untyped-def] # noqa: ANN001, ANN201
    append(key, value, k, v, position)
    return attend(q, key[:, :, :8], value[:, :, :8], mask[..., :8])


def written_again(q, k, v, cos, sin, position, key, value, mask):  # type: ignore[no-untyped-def] # noqa: ANN001, ANN201
    append(key, value, k, v, position)
    key[:, :, 0] = 0
    return attend(q, key, value, mask)


def read_in_between(q, k, v, cos, sin, position, key, value, mask):  # type: ignore[no-untyped-def] # noqa: ANN001, ANN201
    append(key, value, k, v, position)
    total = key.sum()
    return attend(q, key, value, mask) + total


def other_order(q, k, v, cos, sin, position, key, value, mask):  # type: ignore[no-untyped-def] # noqa: ANN001, ANN201
    rows = position - torch.arange(NEW)
    key.index_copy_(2, rows, k)
    value.index_copy_(2, rows, v)
    return attend(q, key, value, mask)


def from_the_end(q, k, v, cos, sin, position, key, value, mask):  # type: ignore[no-untyped-def] # noqa: ANN001, ANN201
    rows = torch.arange(NEW) + (position - ROWS)
    key[:, :, rows] = k
    value[:, :, rows] = v
    return attend(q, key, value, mask)


def other_rows_of_values(q, k, v, cos, sin, position, key, value, mask):  # type: ignore[no-untyped-def] # noqa: ANN001, ANN201
    key.index_copy_(2, torch.arange(NEW) + position, k)
    value.index_copy_(2, torch.arange(NEW) + 1 + position, v)
    return attend(q, key, value, mask)


def moved_on_in_between(q, k, v, cos, sin, position, key, value, mask):  # type: ignore[no-untyped-def] # noqa: ANN001, ANN201
    key.index_copy_(2, torch.arange(NEW) + position, k)
    position.view(1).add_(1)
    value.index_copy_(2, torch.arange(NEW) + position, v)
    return attend(q, key, value, mask)


def fewer_queries(q, k, v, cos, sin, position, key, value, mask):  # type: ignore[no-untyped-def] # noqa: ANN001, ANN201
    append(key, value, k, v, position)
    return attend(q[:, :, -1:], key, value, mask[:, :, -1:])


REFUSED: dict[Site, str] = {
    rotated_behind_the_cache: "a cache among the inputs",
    a_part_of_the_cache: "a cache among the inputs",
    written_again: "new rows written behind one another",
    read_in_between: "uses a cache between the write and attention",
    other_order: "new rows written behind one another",
    from_the_end: "may count from the end",
    other_rows_of_values: "written to the same rows",
    moved_on_in_between: "is written by",
    fewer_queries: "as many new rows as queries",
}


@pytest.mark.parametrize("site", REFUSED, ids=lambda site: site.__name__)
def test_near_miss(site: Site) -> None:
    found = check(site)
    assert found.applied(NAME) == 0
    assert REFUSED[site] in found.reasons(NAME)


def test_refuses_without_kernels() -> None:
    found, _ = run(FIRES["halves"][0], inputs(), kernels=None)
    assert found.statuses(NAME) == [Status.UNPROFITABLE]


def test_refuses_where_gradients_are_needed() -> None:
    found = rewriting(FIRES["halves"][0], PASSES, kernels=KERNELS)
    given = inputs()
    given[0].requires_grad_()
    found.call(*given).sum().backward()
    assert found.applied(NAME) == 0
    assert "gradient" in found.reasons(NAME)


def test_refuses_keys_and_values_in_one_cache() -> None:
    def site(q: Tensor, k: Tensor, cache: Tensor, mask: Tensor) -> Tensor:
        cache.index_copy_(2, torch.arange(NEW), k)
        return attend(q, cache, cache, mask)

    found, given = rewriting(site, PASSES, kernels=KERNELS), inputs()
    with torch.no_grad():
        found.call(given[0], given[1], given[6], given[8])
    assert "memory of their own" in found.reasons(NAME)
