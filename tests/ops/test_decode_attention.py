"""Attention of a few queries over a long cache: the answer of the whole, from the keys that are live."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch.nn.functional import scaled_dot_product_attention as sdpa
from transformers import LlamaConfig, LlamaForCausalLM, StaticCache

from fxopt.ir.ops import attention_providers, register_ops
from fxopt.ir.ops.decode_attention import in_decode, span_of
from fxopt.ir.ops.masking import MEAN, NAN, ZERO
from fxopt.report.record import collect
from support.numerics import assert_closer
from support.reference import reference_mode
from support.rewriting import Rewritten, rewriting

PASSES = ("eliminate-noops", "rewrite-attention", "fold-causal-mask", "remove-repeat-kv", "recover-mask")
C, D = 150, 8


def inputs(
    heads: tuple[int, int], rows: int, dtype: torch.dtype = torch.float32, batch: int = 2
) -> list[torch.Tensor]:
    q = torch.randn(batch, heads[0], rows, D).to(dtype)
    k, v = (torch.randn(batch, heads[1], C, D).to(dtype) for _ in range(2))
    return [q, k, v]


def cached(rows: int, filled: int = 60, batch: int = 2) -> torch.Tensor:
    """What generate passes: query i sees the first `filled` keys and those up to its own, but no padding."""
    places = torch.arange(C)
    live = (places < filled + torch.arange(rows)[:, None] + 1).expand(batch, 1, rows, C).clone()
    live[0, :, :, :7] = False
    return live


def plain(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, live: torch.Tensor) -> torch.Tensor:
    """As transformers has it: keys repeated for every query head."""
    groups = q.shape[1] // k.shape[1]
    k, v = (
        each[:, :, None].expand(-1, -1, groups, -1, -1).reshape(len(q), q.shape[1], C, D) for each in (k, v)
    )
    return sdpa(q, k, v, attn_mask=live, scale=0.3)


def check(found: Rewritten, args: list[torch.Tensor]) -> None:
    with torch.no_grad():
        got, eager = found.call(*args), plain(*args)
        with reference_mode():
            exact = plain(*(each.double() if each.is_floating_point() else each for each in args))
    assert_closer(exact, got, eager, strides=False)


@pytest.fixture
def at_any_size(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(attention_providers, "DECODE_NUMBERS", 0)


@pytest.mark.usefixtures("at_any_size")
@pytest.mark.parametrize(
    ("heads", "rows", "dtype"),
    [
        ((2, 2), 1, torch.float32), ((6, 2), 1, torch.float32), ((6, 2), 5, torch.bfloat16),
        ((6, 2), 16, torch.float16), ((5, 1), 1, torch.bfloat16), ((5, 1), 5, torch.float32),
        ((7, 7), 16, torch.float32), ((7, 7), 1, torch.float16),
    ],
)  # fmt: skip
def test_fires_with_the_answer_of_the_whole(heads: tuple[int, int], rows: int, dtype: torch.dtype) -> None:
    found = rewriting(plain, PASSES)
    check(found, [*inputs(heads, rows, dtype), cached(rows)])
    assert "('attention', 'decode', '')" in found.providers
    assert f"{C}, {D}, {heads[0] // heads[1]}" not in found.lowered[0]


@pytest.mark.usefixtures("at_any_size")
@pytest.mark.parametrize("batch", [1, 3])
def test_a_mask_for_each_head(batch: int) -> None:
    q, k, v = inputs((6, 2), 3, batch=batch)
    live = torch.rand(batch, 6, 3, C) < 0.1
    found = rewriting(plain, PASSES)
    check(found, [q, k, v, live])
    assert "('attention', 'decode', '')" in found.providers


@pytest.mark.usefixtures("at_any_size")
@pytest.mark.parametrize("rows", [1, 4])
@pytest.mark.parametrize("filled", [C, 1])
def test_full_and_nearly_empty_caches(filled: int, rows: int) -> None:
    live = torch.zeros(1, 1, 1, C, dtype=torch.bool)
    live[..., :filled] = True
    found = rewriting(plain, PASSES)
    check(found, [*inputs((4, 2), rows), live])


def rows_without_a_key() -> torch.Tensor:
    live = cached(3)
    live[1, :, 1] = False
    return live


@pytest.mark.parametrize("dead", [ZERO, MEAN, NAN])
@pytest.mark.parametrize("live", [rows_without_a_key(), torch.zeros(2, 1, 3, C, dtype=torch.bool)])
def test_rows_without_a_live_key(dead: str, live: torch.Tensor) -> None:
    register_ops()
    q, k, v = inputs((4, 2), 3)
    out = in_decode(q, k, v, live, enable_gqa=True, dead_rows=dead)
    alone = ~live.any(-1, keepdim=True)
    wanted = sdpa(q, k, v, attn_mask=live, enable_gqa=True)
    mean = v.mean(-2, keepdim=True).repeat_interleave(2, 1).expand_as(wanted)
    instead = {ZERO: torch.zeros_like(wanted), MEAN: mean, NAN: torch.full_like(wanted, math.nan)}[dead]
    torch.testing.assert_close(out, torch.where(alone, instead, wanted), equal_nan=True)


def test_the_span_of_what_is_live() -> None:
    live = torch.zeros(2, 1, 2, 9, dtype=torch.bool)
    assert span_of(live, False).tolist() == [9, 0, 0]
    live[0, 0, 1, 3] = live[1, 0, 0, 6] = True
    assert span_of(live, False).tolist() == [3, 7, 0]


REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "many queries": ({"rows": 17}, ""),
    "few keys": ({}, "numbers in the keys of all heads, pays from"),
    "gradients": ({"grad": True}, "it has no gradient"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_not(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    given, reason = REFUSED[name]
    if name != "few keys":
        monkeypatch.setattr(attention_providers, "DECODE_NUMBERS", 0)
    rows = given.get("rows", 1)
    q, k, v = inputs((4, 2), rows)
    with torch.set_grad_enabled("grad" in given):
        found = rewriting(plain, PASSES)
        found.call(q.requires_grad_("grad" in given), k, v, cached(rows))
    assert all("'decode', ''" not in provider for provider in found.providers)
    assert reason in found.providers[0]


@pytest.mark.usefixtures("at_any_size")
@pytest.mark.parametrize("host", ["eager", "inductor"])
def test_decoding_over_a_static_cache(host: str) -> None:
    """Step by step: logits and the buffers of the cache are eager's."""
    config = LlamaConfig(
        vocab_size=31, hidden_size=16, intermediate_size=16, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=64,
    )  # fmt: skip
    model = LlamaForCausalLM(config).eval()
    caches = [StaticCache(config, max_cache_len=48) for _ in range(2)]
    ids = torch.randint(0, 31, (2, 9), generator=torch.Generator().manual_seed(0))
    compiled = torch.compile(model, backend="fxopt", options={"host": host})
    with torch.no_grad(), collect() as found:
        for cache in caches:
            model(ids, past_key_values=cache)
        for step in range(3):
            live = (torch.arange(48) <= 9 + step).expand(2, 1, 1, 48).clone()
            live[0, ..., :2] = False
            how = {"attention_mask": live, "position_ids": torch.full((2, 1), 9 + step)}
            eager = model(ids[:, :1], past_key_values=caches[0], **how).logits
            got = compiled(ids[:, :1], past_key_values=caches[1], **how).logits
            torch.testing.assert_close(got, eager)
    for one, other in zip(caches[0].layers, caches[1].layers, strict=True):
        torch.testing.assert_close(one.keys, other.keys)
        torch.testing.assert_close(one.values, other.values)
    chosen = {provider for record in found for op, provider, _ in record.providers if op == "attention"}
    assert chosen == {"decode"}


@pytest.mark.parametrize(("batch", "chosen"), [(1, False), (128, True)])
def test_over_a_cache_that_grows(batch: int, chosen: bool) -> None:
    """Its length is a symbol; where heads are grouped, a large one is packed."""

    def step(
        q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, new: torch.Tensor, keep: torch.Tensor
    ) -> torch.Tensor:
        k, v = (torch.cat([each, new], 2) for each in (k, v))
        k, v = (each[:, :, None].expand(-1, -1, 2, -1, -1).flatten(1, 2) for each in (k, v))
        return sdpa(q, k, v, attn_mask=keep[:, None, None])

    found = rewriting(step, PASSES, dynamic=None)
    with torch.no_grad():
        for length in (20, 21, 40):
            q, new = torch.randn(batch, 4, 1, D), torch.randn(batch, 2, 1, D)
            k, v = torch.randn(batch, 2, length, D), torch.randn(batch, 2, length, D)
            keep = torch.ones(batch, length + 1, dtype=torch.bool)
            keep[0, :5] = False
            torch.testing.assert_close(found.call(q, k, v, new, keep), step(q, k, v, new, keep))
    assert found.graphs == 2
    assert ("'decode', ''" in found.providers[-1]) == chosen, found.providers
