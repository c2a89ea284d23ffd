"""rewrite-attention: a refusal names what was wanted, the first thing that differed, and the user's line."""

from __future__ import annotations

import inspect
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn.functional import relu, softmax

from support.attention import NAME, PASSES, S, Site, inputs
from support.rewriting import rewriting

T = torch.Tensor


def unknown_step(q: T, k: T, v: T, keep: T) -> T:
    w = q @ k.mT
    w = relu(w)  # here
    w = w * 0.5 + torch.arange(S) * 0.1
    return softmax(w.masked_fill(~keep, -3e38), -1) @ v


def unknown_step_beside_a_mask_of_products(q: T, k: T, v: T, keep: T) -> T:
    bias = (q @ v.mT).sin() * 0.1
    w = (q @ k.mT).sort(-1)[0]  # here
    return softmax(bias.cos().roll(1) + w * 2.0, -1) @ v


def hook(q: T, k: T, v: T, keep: T) -> Any:
    w = q @ k.mT  # here
    return softmax(w * 0.5 + torch.arange(S) * 0.1, -1) @ v, w.amax()


def below(q: T, k: T, v: T, keep: T) -> T:
    w = softmax(q @ k.mT * 0.5, -1)
    w = w.roll(1, -1)  # here
    return w @ v


def no_product(q: T, k: T, v: T, keep: T) -> T:
    w = torch.cdist(q, k)  # here
    return softmax(-w, -1) @ v


REFUSALS: dict[Site, str] = {
    unknown_step: "scale, mask and casts between QK^T and softmax, saw aten.relu.default",
    unknown_step_beside_a_mask_of_products: "scale, mask and casts between QK^T and softmax, saw ",
    hook: "scores that only the softmax reads, saw matmul is read by mul, amax",
    below: "casts, dropout and the product with V below the softmax, saw aten.roll.default",
    no_product: "scale, mask and casts between QK^T and softmax, saw aten.cdist.default",
}


@pytest.mark.parametrize("site", REFUSALS, ids=lambda f: f.__name__)
def test_refusal_names_the_difference_and_its_line(site: Site) -> None:
    found = rewriting(site, PASSES)
    args = inputs()
    out, wanted = found.call(*args), site(*args)
    (reason,) = {entry.reason for entry in found.evidence if entry.rewrite == NAME}
    assert REFUSALS[site] in reason
    assert f"({__file__}:{_marked(site)})" in reason
    for got, exact in zip(_several(out), _several(wanted), strict=True):
        assert torch.equal(got, exact)


def _several(result: Any) -> tuple[T, ...]:
    return result if isinstance(result, tuple) else (result,)


def _marked(site: Site) -> int:
    lines, first = inspect.getsourcelines(site)
    return first + next(place for place, line in enumerate(lines) if "# here" in line)


def test_an_encoder_layer_in_one_op_says_so() -> None:
    """The fast path of nn.TransformerEncoder in eval()."""
    encoder = nn.TransformerEncoder(nn.TransformerEncoderLayer(8, 2, 16, batch_first=True), 2).eval()
    found = rewriting(lambda x: encoder(x), PASSES)
    x = torch.randn(2, 5, 8)
    with torch.no_grad():
        assert torch.equal(found.call(x), encoder(x))
    wanted = "wanted products around a softmax, saw all of it in one op of torch"
    assert found.reasons(NAME).count(wanted) == 2, found.reasons(NAME)
