"""Experts in `fxopt.prepare`: freed, computed, saved and loaded as linear layers are."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from transformers import (
    AutoModelForCausalLM,
    DeepseekV3Config,
    DeepseekV3ForCausalLM,
    GptOssConfig,
    GptOssForCausalLM,
    MixtralConfig,
    MixtralForCausalLM,
    NemotronHConfig,
    NemotronHForCausalLM,
    PreTrainedModel,
    Qwen3MoeConfig,
    Qwen3MoeForCausalLM,
)

import fxopt
from fxopt.integrations.quantized_experts import QuantizedExperts, QuantizedStack, stack_names
from fxopt.ir.quantize import quantize_parameter
from fxopt.report.record import collect
from support.compiled import compile_fxopt
from support.held import live_bytes
from support.quantizable import distance, ids

SIZES = {"hidden_size": 384, "vocab_size": 640, "num_hidden_layers": 1, "num_attention_heads": 6}
HEADS = {"num_key_value_heads": 6, "num_experts_per_tok": 2}


def mixtral(**more: Any) -> PreTrainedModel:
    sizes = {**SIZES, **HEADS, "intermediate_size": 384, "num_local_experts": 4}
    return MixtralForCausalLM(MixtralConfig(**sizes, **more)).eval()


def qwen() -> PreTrainedModel:
    sizes = {**SIZES, **HEADS, "intermediate_size": 384, "num_experts": 4, "moe_intermediate_size": 384}
    return Qwen3MoeForCausalLM(Qwen3MoeConfig(**sizes, decoder_sparse_step=1)).eval()


def gpt_oss() -> PreTrainedModel:
    """Transposed stacks, biases, and a gate of its own."""
    sizes = {**SIZES, **HEADS, "intermediate_size": 384, "num_local_experts": 4, "head_dim": 64}
    model = GptOssForCausalLM(GptOssConfig(**sizes, layer_types=["full_attention"])).eval()
    for name, each in model.named_parameters():
        if name.endswith("proj_bias"):
            each.data.normal_()
    return model


def deepseek() -> PreTrainedModel:
    """Behind a router of groups, with a shared expert."""
    routed = {"n_routed_experts": 4, "n_group": 2, "topk_group": 1, "first_k_dense_replace": 0}
    latent = {"q_lora_rank": 64, "kv_lora_rank": 64, "qk_rope_head_dim": 32, "qk_nope_head_dim": 32}
    sizes = {**SIZES, **HEADS, **routed, **latent, "v_head_dim": 64, "intermediate_size": 384}
    return DeepseekV3ForCausalLM(DeepseekV3Config(**sizes, moe_intermediate_size=384)).eval()


def nemotron() -> PreTrainedModel:
    """Experts without a gate."""
    routed = {"n_routed_experts": 4, "moe_intermediate_size": 384, "moe_shared_expert_intermediate_size": 384}
    sizes = {**SIZES, **HEADS, **routed, "intermediate_size": 384}
    return NemotronHForCausalLM(NemotronHConfig(**sizes, layers_block_type=["attention", "moe"])).eval()


MODELS: dict[str, Callable[[], PreTrainedModel]] = {
    "mixtral": mixtral, "qwen": qwen, "gpt_oss": gpt_oss, "deepseek": deepseek, "nemotron": nemotron,
}  # fmt: skip
ONLY = {"*.experts.*": "int4", "*": "none"}


@pytest.fixture(autouse=True)
def _without_gradients() -> Any:
    torch.manual_seed(0)
    with torch.no_grad():
        yield


def stacks(model: nn.Module) -> list[tuple[Any, str]]:
    return [(each, name) for each in model.modules() for name in stack_names(each)]


def with_rounded_stacks(model: Any, format: str) -> Any:
    """A copy with the stacks as they are stored."""
    model = copy.deepcopy(model)
    for module, name in stacks(model):
        weight, turned = getattr(module, name), module.is_transposed
        rows = quantize_parameter(weight, format, transposed=turned).dequantize(weight.dtype)
        stored = rows.view(weight.shape[0], -1, rows.shape[1])
        weight.copy_(stored.mT if turned else stored)
    return model


@pytest.mark.parametrize("name", MODELS)
def test_is_the_model_with_the_rounded_stacks(name: str) -> None:
    """In eager mode and compiled; and so is the dense model that is quantized as it is compiled."""
    dense = MODELS[name]()
    wanted = with_rounded_stacks(dense, "int4")(ids()).logits
    model = fxopt.prepare(copy.deepcopy(dense), ONLY)
    assert len(stacks(model)) == 2
    assert all(isinstance(getattr(module, one), QuantizedStack) for module, one in stacks(model))
    assert not [one for one, each in model.named_parameters() if each.dim() == 3 and "experts" in one]
    assert distance(model(ids()).logits, wanted) < 1e-4
    assert distance(compile_fxopt(model)(ids()).logits, wanted) < 1e-4
    torch._dynamo.reset()
    with collect() as records:
        found = compile_fxopt(dense, quantize=ONLY)(ids()).logits
    assert distance(found, wanted) < 1e-4
    applied = [each for record in records for each in record.applied("substitute-expert-products")]
    assert len(applied) == 2, [record.evidence for record in records]


@pytest.mark.parametrize("implementation", ["batched_mm", "eager"])
def test_other_implementations_of_transformers(implementation: str) -> None:
    dense = mixtral(experts_implementation=implementation)
    wanted = with_rounded_stacks(dense, "int4")(ids()).logits
    if implementation == "batched_mm":
        with collect() as records:
            assert distance(compile_fxopt(dense, quantize=ONLY)(ids()).logits, wanted) < 1e-4
        assert len(records[0].applied("substitute-expert-products")) == 2
    assert distance(fxopt.prepare(dense, ONLY)(ids()).logits, wanted) < 1e-4


@pytest.mark.parametrize("scheme", ["int8", "int8-dynamic", "nf4", "fp8"])
def test_other_formats(scheme: str) -> None:
    dense = mixtral()
    wanted = dense(ids()).logits
    model = fxopt.prepare(dense, {"*.experts.*": scheme, "*": "none"})
    limit = {"int8": 2e-2, "int8-dynamic": 3e-2, "fp8": 5e-2, "nf4": 2e-1}[scheme]
    assert distance(model(ids()).logits, wanted) < limit
    assert distance(compile_fxopt(model)(ids()).logits, model(ids()).logits) < 1e-5


def test_autocast_and_dtypes() -> None:
    """Of the experts alone: in other dtypes, tokens are routed to others."""
    experts = fxopt.prepare(gpt_oss(), ONLY).model.layers[0].mlp.experts
    given = torch.randn(9, 384), torch.randint(4, (9, 2)), torch.rand(9, 2)
    wanted = experts(*given)
    with torch.autocast("cpu", torch.bfloat16):
        mixed = experts(*given)
    assert mixed.dtype is torch.float32 and distance(mixed, wanted) < 2e-2
    hidden, chosen, weights = given
    narrow = experts.bfloat16()(hidden.bfloat16(), chosen, weights.bfloat16())
    assert narrow.dtype is torch.bfloat16 and distance(narrow.float(), wanted) < 2e-2
    assert experts.down_proj.scales.dtype is torch.bfloat16 and experts.down_proj.codes.dtype is torch.uint8


def test_generate() -> None:
    model = fxopt.prepare(mixtral(), ONLY)
    kinds = {"max_new_tokens": 4, "do_sample": False, "pad_token_id": 0}
    wanted = model.generate(ids(), **kinds)
    compiled = copy.deepcopy(model)
    compiled.forward = compile_fxopt(compiled.forward)
    assert torch.equal(compiled.generate(ids(), **kinds), wanted)


def test_dense_stacks_are_freed() -> None:
    before = live_bytes()
    model = fxopt.prepare(mixtral(), "int4")
    model(ids())
    size = sum(each.numel() * each.element_size() for each in model.state_dict().values())
    assert live_bytes() - before <= 1.15 * size


def test_copies_and_pickles() -> None:
    model = fxopt.prepare(mixtral(), ONLY)
    wanted = model(ids()).logits
    experts = model.model.layers[0].mlp.experts
    for other in (copy.deepcopy(experts), pickle.loads(pickle.dumps(experts))):
        assert type(other) is type(experts) and isinstance(other, QuantizedExperts)
        model.model.layers[0].mlp.experts = other
        assert torch.equal(model(ids()).logits, wanted)


def test_gradients_flow_to_adapters() -> None:
    """With respect to what is in front of the experts, and to the router's weights."""
    dense = mixtral()
    stored, model = with_rounded_stacks(dense, "int4"), fxopt.prepare(copy.deepcopy(dense), ONLY)
    with torch.enable_grad():
        found = []
        for each in (stored, model, compile_fxopt(model)):
            stored.zero_grad()
            model.zero_grad()
            each(ids()).logits.square().sum().backward()
            own = stored if each is stored else model
            found.append([own.model.embed_tokens.weight.grad, own.model.layers[0].mlp.gate.weight.grad])
        for mine in found[1:]:
            assert all(distance(a, b) < 1e-3 for a, b in zip(mine, found[0], strict=True))


@pytest.mark.parametrize("name", MODELS)
def test_saved_and_loaded(name: str, tmp_path: Path) -> None:
    model = fxopt.prepare(MODELS[name](), "int8")
    wanted = model(ids()).logits
    model.save_pretrained(tmp_path / "one")
    loaded, report = AutoModelForCausalLM.from_pretrained(tmp_path / "one", output_loading_info=True)
    assert not any(report[each] for each in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    assert torch.equal(loaded(ids()).logits, wanted)
    loaded.save_pretrained(tmp_path / "two")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "two")
    assert torch.equal(again(ids()).logits, wanted)
    assert len([each for each in again.modules() if isinstance(each, QuantizedStack)]) == 2
    for state in (model.state_dict(), tmp_path / "one", tmp_path / "two"):
        assert torch.equal(fxopt.load_quantized(MODELS[name](), state)(ids()).logits, wanted)


def notes(model: Any) -> dict[str, Any]:
    return {note.name: note for note in model.fxopt_linears}


def test_notes() -> None:
    model = fxopt.prepare(mixtral(), "int4")
    note = notes(model)["model.layers.0.mlp.experts.gate_up_proj"]
    assert (note.source, note.route) == ("MixtralExperts", "fxopt::expert_linear")
    assert note.bytes_before == 4 * 4 * 768 * 384
    assert note.bytes_after == model.model.layers[0].mlp.experts.gate_up_proj.quantized.nbytes
    assert 18 < note.decibels < 24


def test_what_is_left_alone() -> None:
    """With reasons, and in bytes."""
    dense = mixtral()
    size = 4 * 4 * 384 * 384
    model = fxopt.prepare(copy.deepcopy(dense), "int4", skip="*.down_proj")
    assert torch.equal(
        model.model.layers[0].mlp.experts.down_proj, dense.model.layers[0].mlp.experts.down_proj
    )
    found = notes(model)
    down, up = (found[f"model.layers.0.mlp.experts.{name}"] for name in ("down_proj", "gate_up_proj"))
    assert (down.bytes_before, down.reason) == (size, "the options skip '*.down_proj'")
    assert up.reason == "down_proj is not: the options skip '*.down_proj'"
    other = copy.deepcopy(dense)
    other.model.layers[0].mlp.experts.down_proj[2, 3, 4] = float("inf")
    found = notes(fxopt.prepare(other, "int4"))
    assert found["model.layers.0.mlp.experts.gate_up_proj"].reason.startswith("down_proj: it has entries")
    assert torch.equal(
        other.model.layers[0].mlp.experts.gate_up_proj, dense.model.layers[0].mlp.experts.gate_up_proj
    )


class OwnExperts(nn.Module):
    """Stacks that transformers knows nothing of."""

    def __init__(self) -> None:
        super().__init__()
        self.stack = nn.Parameter(torch.randn(2, 384, 384))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.bmm(x, self.stack)


def test_other_stacks_are_reported() -> None:
    model = fxopt.prepare(nn.Sequential(OwnExperts(), nn.Linear(384, 384)), "int8")
    note = notes(model)["0.stack"]
    assert (note.bytes_before, note.reason) == (
        4 * 2 * 384 * 384,
        "no linear layer, and no module of experts, holds it",
    )
    assert isinstance(model[0].stack, nn.Parameter)
