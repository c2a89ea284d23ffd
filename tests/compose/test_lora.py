"""Low-rank adapters (PEFT): gradients for the adapters alone, and the adapter that is switched on counts."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model

from fxopt.report.record import GraphRecord
from support.compiled import all_handled, compile_fxopt
from support.numerics import assert_closer
from support.rounding import perturbed
from support.runs import Result, infer, infer64, train, train64
from support.zoo import ZOO

LAYERS = 2
# Architecture -> the linears that get an adapter; those of GPT-2 have their weights transposed.
TARGETS = {
    "llama": ["q_proj", "v_proj"],
    "gpt2": ["c_attn", "c_proj"],
    "bert": ["query", "value", "dense"],
}


def adapted(name: str) -> PeftModel:
    """Adapters that change something: by default PEFT sets one factor of each to zero."""
    config = LoraConfig(
        r=4, target_modules=TARGETS[name], init_lora_weights=False, fan_in_fan_out=name == "gpt2"
    )
    model: PeftModel = get_peft_model(ZOO[name].make_model("eager"), config)
    return model


def make_inputs(name: str, *, training: bool = False) -> dict[str, Any]:
    architecture = ZOO[name]
    return architecture.make_inputs(training=training, mask=architecture.masks[-1])


def trained(result: Result) -> set[str]:
    return {name for name, gradient in result["gradients"].items() if gradient is not None}


def attentions(records: Sequence[GraphRecord]) -> int:
    return sum(len(record.applied("rewrite-attention")) for record in records)


@pytest.mark.parametrize("name", TARGETS)
def test_training(name: str) -> None:
    model, inputs = adapted(name).train(), make_inputs(name, training=True)
    eager = train(model, model, inputs)
    with all_handled() as records:
        candidate = train(compile_fxopt(model), model, inputs)
    others = perturbed(lambda: train(model, model, inputs))
    assert_closer(train64(model, inputs), candidate, eager, roundings=others)
    assert trained(candidate) == {name for name, _ in model.named_parameters() if "lora_" in name}
    assert attentions(records) == LAYERS


def test_adapters_are_switched_without_stale_code() -> None:
    """One compiled model: with the first adapter, with another one, without any, and with the first again."""
    model, inputs = adapted("llama"), make_inputs("llama")
    model.add_adapter("other", LoraConfig(r=2, target_modules=["k_proj"], init_lora_weights=False))
    compiled = compile_fxopt(model)

    def compare(what: str) -> torch.Tensor:
        eager, candidate = infer(model, inputs), infer(compiled, inputs)
        others = perturbed(lambda: infer(model, inputs))
        assert_closer(infer64(model, inputs), candidate, eager, roundings=others, what=what)
        logits: torch.Tensor = eager["output"].logits
        return logits

    with all_handled():
        answers = [compare("first")]
        model.set_adapter("other")
        answers.append(compare("other"))
        with model.disable_adapter():
            answers.append(compare("none"))
        model.set_adapter("default")
        compare("first again")
    for one, other in itertools.combinations(answers, 2):
        assert (one - other).abs().max() > 0.1


def test_a_merged_adapter_is_an_ordinary_linear() -> None:
    model, inputs = adapted("llama"), make_inputs("llama")
    reference = infer64(model, inputs)
    merged = model.merge_and_unload()
    eager = infer(merged, inputs)
    others = perturbed(lambda: infer(merged, inputs))
    with all_handled() as records:
        candidate = infer(compile_fxopt(merged), inputs)
    assert_closer(reference, candidate, eager, roundings=others)
    assert attentions(records) == LAYERS
