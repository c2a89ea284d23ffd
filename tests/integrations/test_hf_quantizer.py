"""`from_pretrained` of prepared checkpoints, and of others with a `FxoptConfig`."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import (
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForSeq2SeqLM,
    BertConfig,
    BertModel,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaForCausalLM,
    MixtralConfig,
    MixtralForCausalLM,
    PreTrainedModel,
    T5Config,
    T5ForConditionalGeneration,
)

import fxopt
from fxopt.errors import OptionValueError
from fxopt.integrations import hf_quantizer
from fxopt.integrations.quantized_module import QuantizedLinear
from fxopt.ir.quantization_policy import SCHEMES
from support import quantizable
from support.compiled import compile_fxopt
from support.held import live_bytes
from support.quantizable import ids


@pytest.fixture(autouse=True)
def _without_gradients() -> Any:
    with torch.no_grad():
        yield


def llama(**more: Any) -> LlamaForCausalLM:
    """The same weights each time."""
    torch.manual_seed(0)
    return quantizable.llama(**more)


def quantized(model: nn.Module) -> dict[str, QuantizedLinear]:
    return {name: each for name, each in model.named_modules() if isinstance(each, QuantizedLinear)}


def same(a: nn.Module, b: nn.Module) -> None:
    """Equal states, bit for bit, of equal dtypes."""
    mine, theirs = a.state_dict(), b.state_dict()
    assert mine.keys() == theirs.keys()
    for name, tensor in mine.items():
        assert tensor.dtype == theirs[name].dtype, name
        assert torch.equal(tensor, theirs[name]), name


@pytest.mark.parametrize("scheme", SCHEMES)
def test_prepared_models_are_loaded(scheme: str, tmp_path: Path) -> None:
    model = fxopt.prepare(llama(attention_bias=True), scheme)
    wanted = model(ids()).logits
    model.save_pretrained(tmp_path)
    loaded, report = AutoModelForCausalLM.from_pretrained(tmp_path, output_loading_info=True)
    assert not any(report[name] for name in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    assert quantized(loaded).keys() == quantized(model).keys() and len(quantized(model)) == 14
    same(loaded, model)
    assert torch.equal(loaded(ids()).logits, wanted)
    assert torch.equal(compile_fxopt(loaded)(ids()).logits, compile_fxopt(model)(ids()).logits)


def test_saved_again_and_in_shards(tmp_path: Path) -> None:
    model = fxopt.prepare(llama(), {"*.mlp.*": "int8", "*": "nf4"}, skip="*.o_proj")
    model.save_pretrained(tmp_path / "one", max_shard_size="500KB")
    assert len(list((tmp_path / "one").glob("*.safetensors"))) > 2
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "one")
    loaded.save_pretrained(tmp_path / "two")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "two")
    same(again, model)
    assert type(again.model.layers[0].self_attn.o_proj) is nn.Linear
    assert again.config.quantization_config.layers == model.config.quantization_config.layers


def test_dtype_of_the_rest(tmp_path: Path) -> None:
    model = fxopt.prepare(llama(attention_bias=True), "int4").bfloat16()
    model.save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    same(loaded, model)
    wide = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32)
    same(wide, copy.deepcopy(model).float())
    assert wide.model.layers[0].mlp.up_proj.scales.dtype is torch.bfloat16


def encoder_decoder() -> PreTrainedModel:
    sizes = {"d_model": 384, "d_ff": 768, "d_kv": 64, "num_heads": 6, "num_layers": 1, "vocab_size": 640}
    return T5ForConditionalGeneration(T5Config(**sizes)).eval()


def gpt2() -> PreTrainedModel:
    sizes = {"n_embd": 384, "n_head": 6, "n_layer": 1, "vocab_size": 640}
    return GPT2LMHeadModel(GPT2Config(**sizes, bos_token_id=1, eos_token_id=1)).eval()


def bert() -> PreTrainedModel:
    sizes = {"hidden_size": 384, "intermediate_size": 768, "num_hidden_layers": 1, "num_attention_heads": 6}
    return BertModel(BertConfig(**sizes, vocab_size=640)).eval()


def mixtral() -> PreTrainedModel:
    """Its checkpoint has other names than its modules, and each expert of its own."""
    sizes = {"hidden_size": 384, "intermediate_size": 384, "vocab_size": 640, "num_hidden_layers": 1}
    heads = {"num_attention_heads": 6, "num_key_value_heads": 6, "num_local_experts": 2}
    return MixtralForCausalLM(MixtralConfig(**sizes, **heads)).eval()


MODELS = [
    (encoder_decoder, AutoModelForSeq2SeqLM),
    (gpt2, AutoModelForCausalLM),
    (bert, AutoModel),
    (mixtral, AutoModelForCausalLM),
    (lambda: llama(tie_word_embeddings=True), AutoModelForCausalLM),
]


@pytest.mark.parametrize(("make", "auto"), MODELS)
def test_quantized_while_loading(make: Any, auto: Any, tmp_path: Path) -> None:
    """What `prepare` makes of the loaded model, and it is saved and loaded as that is."""
    model = make()
    model.save_pretrained(tmp_path / "dense")
    found, report = auto.from_pretrained(
        tmp_path / "dense", quantization_config=fxopt.FxoptConfig("int4"), output_loading_info=True
    )
    assert not any(report[name] for name in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    wanted = fxopt.prepare(auto.from_pretrained(tmp_path / "dense"), "int4")
    assert quantized(wanted)
    same(found, wanted)
    assert {note.name: note.reason for note in found.fxopt_linears} == {
        note.name: note.reason for note in wanted.fxopt_linears
    }
    found.save_pretrained(tmp_path / "small")
    same(auto.from_pretrained(tmp_path / "small"), wanted)


def hidden(model: Any) -> torch.Tensor:
    out: torch.Tensor = model(ids()).last_hidden_state
    return out


@pytest.mark.parametrize("make", [llama, gpt2, mixtral, lambda: llama(tie_word_embeddings=True)])
def test_without_the_head_and_with_one(make: Any, tmp_path: Path) -> None:
    """A checkpoint names modules as the model that it is of does, which may be one inside of another."""
    whole = fxopt.prepare(make(), "int8")
    part = getattr(whole, whole.base_model_prefix)
    wanted = hidden(part)
    whole.save_pretrained(tmp_path / "whole")
    loaded, report = AutoModel.from_pretrained(tmp_path / "whole", output_loading_info=True)
    assert not report["missing_keys"] and set(report["unexpected_keys"]) <= {"lm_head.weight"}
    assert torch.equal(hidden(loaded), wanted)
    same(loaded, part)
    plain = type(part)(part.config)
    assert torch.equal(hidden(fxopt.load_quantized(plain.eval(), tmp_path / "whole")), wanted)
    loaded.save_pretrained(tmp_path / "part")
    again, report = AutoModelForCausalLM.from_pretrained(tmp_path / "part", output_loading_info=True)
    assert set(report["missing_keys"]) <= {"lm_head.weight"} and not report["unexpected_keys"]
    same(getattr(again, again.base_model_prefix), part)


def test_a_quantized_head_is_not_tied_again(tmp_path: Path) -> None:
    model = fxopt.prepare(llama(tie_word_embeddings=True), {"lm_head": "int8", "*": "int4"})
    wanted = model(ids()).logits
    assert isinstance(model.lm_head, QuantizedLinear)
    model.save_pretrained(tmp_path)
    loaded, report = AutoModelForCausalLM.from_pretrained(tmp_path, output_loading_info=True)
    assert not any(report[name] for name in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    assert torch.equal(loaded(ids()).logits, wanted)
    fresh = llama(tie_word_embeddings=True)
    assert torch.equal(fxopt.load_quantized(fresh, tmp_path)(ids()).logits, wanted)


def test_a_tied_head_is_not_quantized_while_loading(tmp_path: Path) -> None:
    """It is not read: the checkpoint has the embedding alone."""
    llama(tie_word_embeddings=True).save_pretrained(tmp_path)
    config = fxopt.FxoptConfig({"lm_head": "int8", "*": "int4"})
    model = AutoModelForCausalLM.from_pretrained(tmp_path, quantization_config=config)
    assert model.lm_head.weight is model.model.embed_tokens.weight
    (note,) = [each for each in model.fxopt_linears if each.name == "lm_head"]
    assert note.reason == "the checkpoint has it under another name: fxopt.prepare quantizes it"


def test_names_that_the_user_maps(tmp_path: Path) -> None:
    """As for any checkpoint: here of one whose layers are called blocks."""
    model = fxopt.prepare(llama(), "int4")
    model.save_pretrained(tmp_path)
    file = tmp_path / "model.safetensors"
    renamed = {name.replace(".layers.", ".blocks."): each for name, each in load_file(file).items()}
    save_file(renamed, file, metadata={"format": "pt"})
    mapping = {r"\.blocks\.": ".layers."}
    loaded, report = AutoModelForCausalLM.from_pretrained(
        tmp_path, key_mapping=mapping, output_loading_info=True
    )
    assert not any(report[name] for name in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    same(loaded, model)


def test_another_head_is_not_taken_for_part_of_the_model(tmp_path: Path) -> None:
    fxopt.prepare(llama(), "int8").save_pretrained(tmp_path)
    other = GPT2LMHeadModel(GPT2Config(n_embd=384, n_head=6, n_layer=1, vocab_size=640))
    with pytest.raises((RuntimeError, AttributeError)):
        fxopt.load_quantized(other, tmp_path)


def test_options_of_the_config(tmp_path: Path) -> None:
    llama().save_pretrained(tmp_path)
    config = fxopt.FxoptConfig({"*.down_proj": "int8", "*": "int4"}, group_size=64, skip=["*.o_proj"])
    model = AutoModelForCausalLM.from_pretrained(tmp_path, quantization_config=config, dtype=torch.bfloat16)
    layer = model.model.layers[0]
    assert (layer.mlp.down_proj.format, layer.mlp.up_proj.format) == ("int8", "int4")
    assert layer.mlp.up_proj.group_size == 64
    assert type(layer.self_attn.o_proj) is nn.Linear
    assert model(ids()).logits.dtype is torch.bfloat16
    with pytest.raises(OptionValueError):
        fxopt.FxoptConfig("int5")


def test_weights_that_are_not_finite(tmp_path: Path) -> None:
    model = llama()
    model.model.layers[0].mlp.up_proj.weight[0, 0] = float("nan")
    model.save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path, quantization_config=fxopt.FxoptConfig("int8"))
    kept = loaded.model.layers[0].mlp.up_proj
    assert type(kept) is nn.Linear and bool(kept.weight[0, 0].isnan())
    reasons = {note.name: note.reason for note in loaded.fxopt_linears}
    assert reasons["model.layers.0.mlp.up_proj"] == "it has entries that are not finite"
    assert len(quantized(loaded)) == 13


def test_the_dense_model_is_never_in_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Beside the quantized model there is one dense weight at a time."""
    llama().save_pretrained(tmp_path)
    before, layers, seen = live_bytes(), [], []
    one_layer = hf_quantizer.quantize_in_place

    def counted(model: Any, name: str, *others: Any) -> Any:
        note = one_layer(model, name, *others)
        layers.append(name)
        if len(layers) in (7, 14):  # it looks at all objects of the process
            seen.append(live_bytes() - before)
        return note

    monkeypatch.setattr(hf_quantizer, "quantize_in_place", counted)
    model = AutoModelForCausalLM.from_pretrained(tmp_path, quantization_config=fxopt.FxoptConfig("int4"))
    size = sum(each.numel() * each.element_size() for each in model.state_dict().values())
    assert len(layers) == 14
    assert max(seen) <= 1.15 * size + 4 * 768 * 384


def test_disk_is_refused(tmp_path: Path) -> None:
    llama().save_pretrained(tmp_path)
    places = {"model": "cpu", "lm_head": "disk"}
    config = fxopt.FxoptConfig("int8")
    with pytest.raises(ValueError, match="some of them on disk"):
        AutoModelForCausalLM.from_pretrained(tmp_path, quantization_config=config, device_map=places)


def test_models_without_quantized_layers_say_nothing() -> None:
    model = fxopt.prepare(llama(), "int8", skip="*")
    assert getattr(model.config, "quantization_config", None) is None
