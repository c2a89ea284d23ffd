"""Every architecture gives eager's answer in inference: without a mask, and padded on either side."""

from __future__ import annotations

import functools

import pytest

from support.compiled import all_handled, compile_fxopt
from support.numerics import assert_closer
from support.rounding import perturbed
from support.runs import infer, infer64
from support.trees import aliases
from support.zoo import ZOO, cases


@pytest.mark.parametrize(("name", "attention"), cases(turn=0))
def test_answer_is_eagers(name: str, attention: str) -> None:
    architecture = ZOO[name]
    model = architecture.make_model(attention)
    with all_handled():
        compiled = compile_fxopt(model)
        for mask in (None, *architecture.masks):
            inputs = architecture.make_inputs(mask=mask)
            eager, candidate = infer(model, inputs), infer(compiled, inputs)
            others = perturbed(functools.partial(infer, model, inputs))
            what = f"{name}, {attention}, mask {mask}"
            assert_closer(infer64(model, inputs), candidate, eager, roundings=others, what=what)
            assert aliases(candidate) == aliases(eager)
