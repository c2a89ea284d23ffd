"""fxopt.prepare: dense weights are freed, the state is complete, any backend computes the same."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from transformers import (
    GPT2Config,
    GPT2LMHeadModel,
    T5Config,
    T5EncoderModel,
)

import fxopt
from fxopt.errors import NotAModule, OptionValueError
from fxopt.integrations.quantized_module import QuantizedLinear
from fxopt.ir.quantization_policy import SCHEMES
from support.compiled import compile_fxopt
from support.held import live_bytes
from support.quantizable import distance, ids, llama
from support.quantizing import with_rounded


def projections(model: nn.Module) -> list[str]:
    return [name for name, each in model.named_modules() if type(each) is nn.Linear and "lm_head" not in name]


@pytest.fixture(autouse=True)
def _without_gradients() -> Any:
    with torch.no_grad():
        yield


@pytest.mark.parametrize("scheme", SCHEMES)
def test_eager_and_compiled_are_those_of_the_rounded_weights(scheme: str) -> None:
    model = llama()
    stored = copy.deepcopy(model)
    format = {"int8-dynamic": "int8", "fp8": "fp8_e4m3", "fp8-dynamic": "fp8_e4m3"}.get(scheme, scheme)
    with_rounded(stored, projections(stored), format)
    wanted, names = stored(ids()).logits, projections(model)
    assert fxopt.prepare(model, scheme) is model
    made = [name for name, each in model.named_modules() if isinstance(each, QuantizedLinear)]
    assert made == names
    limit = 8e-2 if scheme.endswith("dynamic") else 1e-4
    assert distance(model(ids()).logits, wanted) < limit
    compiled = compile_fxopt(model)
    assert distance(compiled(ids()).logits, wanted) < limit
    assert distance(compiled(ids()).logits, model(ids()).logits) < 1e-5 or scheme.endswith("dynamic")


@pytest.mark.parametrize("backend", ["inductor", "fxopt"])
def test_inductor_computes_the_same(backend: str) -> None:
    model = fxopt.prepare(llama(), "int4")
    compiled = torch.compile(model, backend=backend)
    assert distance(compiled(ids()).logits, model(ids()).logits) < 1e-5
    torch._dynamo.reset()


def test_one_graph_with_the_op() -> None:
    from fxopt.report.record import collect

    model = fxopt.prepare(llama(), "nf4")
    with collect() as records:
        compile_fxopt(model)(ids())
    (record,) = records
    assert [each[:2] for each in record.providers].count(("qlinear", "product")) == 14


@pytest.mark.parametrize("scheme", SCHEMES)
def test_state_is_loaded_into_another_model(scheme: str, tmp_path: Path) -> None:
    model = fxopt.prepare(llama(), scheme)
    wanted = model(ids()).logits
    again = fxopt.load_quantized(llama(), model.state_dict())
    assert torch.equal(again(ids()).logits, wanted)
    model.save_pretrained(tmp_path)
    loaded = fxopt.load_quantized(llama(), tmp_path)
    assert torch.equal(loaded(ids()).logits, wanted)
    loaded.load_state_dict(model.state_dict())
    torch.save(model.state_dict(), tmp_path / "state.pt")
    from_file = torch.load(tmp_path / "state.pt")
    assert torch.equal(fxopt.load_quantized(llama(), from_file)(ids()).logits, wanted)


def test_state_that_does_not_fit(tmp_path: Path) -> None:
    state = fxopt.prepare(llama(), "int8").state_dict()
    del state["model.norm.weight"]
    with pytest.raises(RuntimeError, match=r"missing in the state: \['model.norm.weight'\]"):
        fxopt.load_quantized(llama(), state)
    with pytest.raises(RuntimeError, match="no \\*.safetensors"):
        fxopt.load_quantized(llama(), tmp_path)


OTHERS: dict[str, tuple[Callable[[], nn.Module], str]] = {
    "fewer": (lambda: nn.Sequential(nn.Linear(384, 512)), "1 is not in the model"),
    "shape": (lambda: nn.Sequential(nn.Linear(384, 384), nn.BatchNorm1d(512)), r"0 is of \(384, 384\)"),
    "kind": (lambda: nn.Sequential(nn.Conv1d(384, 512, 1), nn.BatchNorm1d(512)), "0 is a Conv1d, no linear"),
    "more": (lambda: nn.Sequential(nn.Linear(384, 512), nn.BatchNorm1d(512), nn.BatchNorm1d(512)),
             r"missing in the state: .*'2.running_mean'"),
}  # fmt: skip


@pytest.mark.parametrize("case", OTHERS)
def test_state_of_another_model(case: str) -> None:
    make, reason = OTHERS[case]
    state = fxopt.prepare(nn.Sequential(nn.Linear(384, 512), nn.BatchNorm1d(512)), "int8").state_dict()
    if case == "fewer":
        state = {name.replace("0.", "1."): each for name, each in state.items() if name.startswith("0.")}
    with pytest.raises(RuntimeError, match=reason):
        fxopt.load_quantized(make(), state)


@pytest.mark.parametrize("part", ["codes", "scales", "offsets", "meaning"])
def test_damaged_state(part: str) -> None:
    state = fxopt.prepare(nn.Sequential(nn.Linear(384, 512)), "int4").state_dict()
    state[f"0.{part}"] = state[f"0.{part}"][:7]
    with pytest.raises(RuntimeError, match="the state of 0 is damaged"):
        fxopt.load_quantized(nn.Sequential(nn.Linear(384, 512)), state)
    del state[f"0.{part}"]
    with pytest.raises(RuntimeError):
        fxopt.load_quantized(nn.Sequential(nn.Linear(384, 512)), state)


def test_state_of_another_format() -> None:
    """The codes of both have one shape and one dtype."""
    prepared = [fxopt.prepare(nn.Sequential(nn.Linear(384, 384)), each) for each in ("nf4", "fp4")]
    with pytest.raises(RuntimeError, match="0 is format fp4, .* its state is format nf4"):
        prepared[1].load_state_dict(prepared[0].state_dict())


@pytest.mark.parametrize("scheme", ["int8-dynamic", "int4"])
def test_dense_weights_are_freed(scheme: str) -> None:
    """What is held beside other tests' tensors, after the model has run compiled, is the quantized model."""
    before = live_bytes()
    model = fxopt.prepare(llama(), scheme)
    compiled = compile_fxopt(model)
    compiled(ids())
    size = sum(each.numel() * each.element_size() for each in model.state_dict().values())
    dense = sum(each.numel() * 4 for each in llama().state_dict().values())
    assert size < 0.45 * dense
    assert live_bytes() - before <= 1.15 * size


def test_dtypes_of_parts_are_kept() -> None:
    model = fxopt.prepare(llama(), {"*.q_proj": "fp8", "*": "int8"})
    dtypes = [each.dtype for each in model.model.layers[0].self_attn.buffers()]
    parts = copy.deepcopy(model.model.layers[0].self_attn.q_proj.quantized)
    model.bfloat16()
    assert [each.dtype for each in model.model.layers[0].self_attn.buffers()] == dtypes
    assert parts.same_as(model.model.layers[0].self_attn.q_proj.quantized)
    assert model(ids()).logits.dtype is torch.bfloat16
    assert distance(model(ids()).logits.float(), copy.deepcopy(model).float()(ids()).logits) < 3e-2


def test_autocast() -> None:
    model = fxopt.prepare(llama(), "int4")
    wanted = model(ids()).logits
    with torch.autocast("cpu", torch.bfloat16):
        out = model(ids()).logits
    assert out.dtype is torch.bfloat16
    assert distance(out.float(), wanted) < 3e-2


def notes(model: nn.Module) -> dict[str, Any]:
    return {note.name: note for note in model.fxopt_linears}


def test_notes_say_what_became_of_each_layer() -> None:
    model = fxopt.prepare(llama(), "int4", skip="*.o_proj")
    found = notes(model)
    assert found["lm_head"].reason == "it makes the logits"
    assert found["model.layers.1.self_attn.o_proj"].reason == "the options skip '*.o_proj'"
    up = found["model.layers.0.mlp.up_proj"]
    assert (up.format, up.source, up.route) == ("int4 of groups of 32", "Linear", "fxopt::qlinear")
    assert up.bytes_before == 4 * 384 * 768
    assert up.bytes_after == model.model.layers[0].mlp.up_proj.quantized.nbytes
    assert 20 < up.decibels < 24
    summary = str(model.fxopt_linears)
    assert summary.startswith("12 of 15 linear layers quantized, ")
    assert "lm_head: 983040 B, dense: it makes the logits" in summary


def test_conv1d_and_tied_weights() -> None:
    sizes = {"n_embd": 384, "n_head": 6, "n_layer": 1, "vocab_size": 640}
    model = GPT2LMHeadModel(GPT2Config(**sizes, bos_token_id=1, eos_token_id=1)).eval()
    wanted = model(ids()).logits
    fxopt.prepare(model, "int8")
    assert distance(model(ids()).logits, wanted) < 2e-2
    found = notes(model)
    assert found["transformer.h.0.attn.c_attn"].source == "Conv1D"
    assert found["lm_head"].reason == "it makes the logits"
    again = GPT2LMHeadModel(model.config).eval()
    assert torch.equal(fxopt.load_quantized(again, model.state_dict())(ids()).logits, model(ids()).logits)


def test_layers_that_a_model_keeps_in_float32() -> None:
    sizes = {"d_model": 384, "d_ff": 768, "d_kv": 64, "num_heads": 6, "num_layers": 1, "vocab_size": 640}
    model = T5EncoderModel(T5Config(**sizes)).eval()
    fxopt.prepare(model, "int8")
    found = notes(model)
    assert found["encoder.block.0.layer.1.DenseReluDense.wo"].reason == "the model keeps it in float32"
    assert not found["encoder.block.0.layer.1.DenseReluDense.wi"].reason
    model(ids())


class Subclass(nn.Linear):
    """Not to be taken for a plain one."""


def test_what_is_left_alone() -> None:
    model = nn.Sequential(nn.Linear(384, 384), Subclass(384, 384), nn.Linear(8, 8), nn.Linear(384, 384))
    model[3].weight[0, 0] = float("nan")
    fxopt.prepare(model, "int8")
    assert [type(each) for each in model] == [QuantizedLinear, Subclass, nn.Linear, nn.Linear]
    assert notes(model)["3"].reason == "it has entries that are not finite"


def test_wrong_formats() -> None:
    with pytest.raises(OptionValueError):
        fxopt.prepare(llama(), "int5")


@pytest.mark.parametrize(
    "call", [fxopt.prepare, fxopt.invalidate, lambda model: fxopt.calibrate(model, [torch.zeros(1)])]
)
def test_what_is_no_module(call: Any) -> None:
    with pytest.raises(NotAModule, match=r"wanted a torch\.nn\.Module, got 'llama' \(str\)"):
        call("llama")


def test_patterns_that_fit_no_layer() -> None:
    with pytest.warns(UserWarning, match=r"no linear layer has a name that fits 'nothing\.\*', 'lm_haed'$"):
        fxopt.prepare(llama(), {"nothing.*": "int8", "*": "int8"}, skip=["lm_haed", "lm_head"])


def test_a_model_of_which_nothing_is_quantized() -> None:
    wanted = r"none of 2 linear layers is quantized\. 0: 64 x 64 numbers, worth it from \d+\."
    with pytest.warns(UserWarning, match=wanted):
        fxopt.prepare(nn.Sequential(nn.Linear(64, 64), nn.Linear(64, 64)), "int8")


def test_a_model_without_linear_layers_is_no_mistake(recwarn: pytest.WarningsRecorder) -> None:
    fxopt.prepare(nn.Sequential(nn.ReLU()), "int8")
    fxopt.prepare(nn.Sequential(nn.Linear(64, 64)))
    assert not recwarn.list


def test_gradients_flow_to_adapters() -> None:
    with torch.enable_grad():
        model = fxopt.prepare(llama(), "int4")
        wrapped = nn.Sequential(nn.Linear(384, 384), model.model.layers[0].mlp)
        compiled = compile_fxopt(wrapped)
        x = torch.randn(5, 384)
        grads = []
        for each in (wrapped, compiled):
            wrapped.zero_grad()
            each(x).square().sum().backward()
            grads.append(wrapped[0].weight.grad.clone())
        assert distance(*grads) < 1e-4
