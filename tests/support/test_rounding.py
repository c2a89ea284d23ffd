"""The extra draws are what they are said to be: neighbouring numbers, of a spread like eager's own error."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from support.numerics import assert_closer, run_reference64
from support.rounding import perturbed
from support.runs import train, train64
from support.zoo import ZOO


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_each_result_moves_to_a_neighbour_at_most(dtype: torch.dtype) -> None:
    x = torch.rand(1000).to(dtype)
    exact = x * 3
    (moved,) = perturbed(lambda: x * 3, count=1)()
    _, exponent = torch.frexp(exact.double())
    steps = (moved.double() - exact.double()).abs() / (
        torch.finfo(dtype).eps * (exponent - 1).double().exp2()
    )
    assert steps.max() == 1
    assert 0.2 < float((steps > 0).double().mean()) < 0.5


def test_copies_views_selections_and_writes_are_exact() -> None:
    x = torch.randn(6, 8)

    def run() -> list[torch.Tensor]:
        written = x.clone()
        written[2] = 1.5
        return [
            x.t().reshape(-1),
            torch.cat([x, x]),
            F.embedding(torch.tensor([1, 3]), x),
            x.masked_fill(x > 0, torch.finfo(torch.float32).min),
            torch.where(x > 0, x, 0.0),
            written,
            torch.full((3,), 1 / 3),
            x > 0,
        ]

    before = x.clone()
    for got, want in zip(perturbed(run, count=1)()[0], run(), strict=True):
        assert torch.equal(got, want)
    assert torch.equal(x, before)


def test_draws_differ_and_repeat() -> None:
    x = torch.randn(40, 40)
    first, second = perturbed(lambda: x @ x, count=2)()
    assert not torch.equal(first, second)
    assert torch.equal(first, perturbed(lambda: x @ x, count=1)()[0])


@pytest.mark.parametrize("name", ["bert", "llama", "t5", "vit"])
def test_spread_is_of_the_size_of_eagers_error(name: str) -> None:
    """The median over the gradients: the draws must neither be lenient nor say nothing."""
    architecture = ZOO[name]
    model = architecture.make_model().train()
    inputs = architecture.make_inputs(training=True)
    reference = train64(model, inputs)["gradients"]
    eager = train(model, model, inputs)["gradients"]
    (draw,) = (result["gradients"] for result in perturbed(lambda: train(model, model, inputs), count=1)())
    ratios = [
        ((draw[key] - exact).norm() / (eager[key] - exact).norm()).item()
        for key, exact in reference.items()
        if exact is not None and exact.abs().max() > 1e-9
    ]

    assert 0.7 < torch.tensor(ratios).median() < 2.5


def test_fault_is_rejected_in_spite_of_the_draws() -> None:
    """The epsilon of one norm of a model: a relative change of a few millionths."""
    architecture = ZOO["llama"]
    model, faulty = architecture.make_model(), architecture.make_model()
    vars(faulty.get_submodule("model.layers.0.input_layernorm"))["variance_epsilon"] = 1e-5
    inputs = architecture.make_inputs()
    reference, eager = run_reference64(model, inputs).logits, model(**inputs).logits
    others = perturbed(lambda: model(**inputs).logits)
    assert_closer(reference, eager.clone(), eager, roundings=others)
    with pytest.raises(AssertionError, match="rms error"):
        assert_closer(reference, faulty(**inputs).logits, eager, roundings=others)
