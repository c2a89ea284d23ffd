"""Every architecture gives eager's loss, outputs and gradients in a training step."""

from __future__ import annotations

import pytest

from support.compiled import all_handled, compile_fxopt
from support.numerics import assert_closer
from support.rounding import perturbed
from support.runs import train, train64
from support.trees import aliases
from support.zoo import ZOO, cases


@pytest.mark.parametrize(("name", "attention"), cases(turn=1))
def test_gradients_are_eagers(name: str, attention: str) -> None:
    architecture = ZOO[name]
    model = architecture.make_model(attention).train()
    mask = architecture.masks[-1] if architecture.masks else None
    inputs = architecture.make_inputs(training=True, mask=mask)
    eager = train(model, model, inputs)
    with all_handled():
        candidate = train(compile_fxopt(model), model, inputs)
    others = perturbed(lambda: train(model, model, inputs))
    what = f"{name}, {attention}"
    assert_closer(train64(model, inputs), candidate, eager, roundings=others, what=what)
    assert aliases(candidate) == aliases(eager)
