"""recover-mask with sizes that are not known while compiling: tables are as long as those are."""

from __future__ import annotations

import math
import re
from collections.abc import Callable

import pytest
import torch
from torch.nn.functional import embedding, softmax

from support.numerics import assert_closer
from support.reference import reference_mode
from support.rewriting import rewriting

pytestmark = pytest.mark.usefixtures("blocks_at_any_size")

NAME = "recover-mask"
PASSES = ("eliminate-noops", "rewrite-attention", "fold-causal-mask", "remove-repeat-kv", NAME)
B, H, D, BUCKETS = 2, 3, 8, 12
T = torch.Tensor


def one_way(distance: T) -> T:
    """T5's decoder: buckets of one key, then of ever more; none of later keys."""
    far = -torch.min(distance, torch.zeros_like(distance))
    coarse = 6 + (torch.log(far.float() / 6) / math.log(100 / 6) * 6).to(torch.long)
    return torch.where(far < 6, far, torch.min(coarse, torch.full_like(coarse, BUCKETS - 1)))


def both_ways(distance: T) -> T:
    """MPNet, and T5's encoder: half of the buckets are those of later keys."""
    far, later = distance.abs(), (distance > 0).to(torch.long) * 6
    coarse = 3 + (torch.log(far.float() / 3) / math.log(100 / 3) * 3).to(torch.long)
    return later + torch.where(far < 3, far, torch.min(coarse, torch.full_like(coarse, 5)))


def clipped(distance: T) -> T:
    return distance.clamp(-5, 6) + 5


def attend(bucket: Callable[[T], T]) -> Callable[..., T]:
    def call(q: T, k: T, v: T, table: T) -> T:
        i, j = torch.arange(q.shape[2])[:, None], torch.arange(k.shape[2])[None]
        bias = embedding(bucket(j - i), table).permute(2, 0, 1).unsqueeze(0)
        return softmax((q @ k.mT + bias).masked_fill((j > i) | (j < i - 20), -math.inf), -1) @ v

    return call


def inputs(length: int) -> list[T]:
    torch.manual_seed(0)
    return [*(torch.randn(B, H, length, D) for _ in range(3)), torch.randn(BUCKETS, H)]


def gradients(call: Callable[..., T], args: list[T]) -> list[T]:
    leaves = [each.detach().clone().requires_grad_() for each in args]
    out = call(*leaves)
    (out * torch.linspace(-1, 1, out.numel(), dtype=out.dtype).view(out.shape)).sum().backward()
    return [leaf.grad for leaf in leaves if leaf.grad is not None]


@pytest.mark.parametrize("bucket", [one_way, both_ways, clipped], ids=lambda f: f.__name__)
def test_a_table_of_the_distance(bucket: Callable[[T], T]) -> None:
    plain = attend(bucket)
    found = rewriting(plain, PASSES, dynamic=True)
    for length in (400, 333):
        args = inputs(length)
        with reference_mode():
            exact = gradients(plain, [each.double() for each in args])
        assert_closer(exact, gradients(found.call, args), gradients(plain, args))
    assert found.graphs == 1
    assert re.search(r"c\d\[c\d\[k - q \+ n0 - 1\], h\]", found.reasons(NAME))
    assert "'blocks'" in found.providers[0]


def test_not_of_a_size_that_depends_on_data() -> None:
    """No input has it: the buckets are captured whole."""

    def call(q: T, k: T, v: T, table: T, flags: T) -> T:
        k, v = (each[:, :, flags.nonzero()[:, 0]] for each in (k, v))
        distance = torch.arange(k.shape[2]) - torch.arange(q.shape[2])[:, None]
        bias = embedding(clipped(distance), table).permute(2, 0, 1)[None]
        return softmax(q @ k.mT + bias, -1) @ v

    args = [*inputs(20), (torch.arange(20) % 3 > 0).float()]
    with torch._dynamo.config.patch(capture_dynamic_output_shape_ops=True):
        found = rewriting(call, PASSES, dynamic=True)
        torch.testing.assert_close(found.call(*args), call(*args))
    assert "[q, k], h]" in found.reasons(NAME)
