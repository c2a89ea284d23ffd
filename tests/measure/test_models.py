"""Small models of any architecture."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any
from unittest import mock

import pytest
import torch
import transformers

from fxopt.measure.compare import exact_result
from fxopt.measure.models import CannotBuild, Subject, build, loss_of
from fxopt.measure.shrink import SCALES, Scale, shrink
from fxopt.measure.suite import GROUPS, SUITE, cases, expanded, suite_of

TINY = SCALES["tiny"]


@pytest.mark.parametrize("name", expanded([*suite_of("tiny"), "dashboard"]))
def test_every_model_of_the_suite_is_small_and_runs(name: str) -> None:
    for case in cases([name]):
        subject = case.subject(TINY, None, torch.float32, "cpu")
        assert sum(parameter.numel() for parameter in subject.model.parameters()) < 6_000_000
        assert subject.model.training is case.training
        subject.step(subject.model)()
        has_gradient = any(parameter.grad is not None for parameter in subject.model.parameters())
        assert has_gradient is case.training


def test_suite_has_the_architectures_that_it_promises() -> None:
    assert len(SUITE) >= 25
    assert len(set(suite_of("tiny"))) == len(suite_of("tiny")) >= 40
    assert expanded(["t5", "dashboard", "t5"]) == ("t5", *(n for n in GROUPS["dashboard"] if n != "t5"))


def test_a_class_of_the_dashboard_is_the_class_that_is_built() -> None:
    for name in ("BartForCausalLM", "GPT2ForSequenceClassification"):
        (case,) = cases([name], train=False)
        assert type(case.subject(TINY, None, torch.float32, "cpu").model).__name__ == name


def test_a_training_step_without_chance_gives_the_same_gradients() -> None:
    subject = build("bert", TINY, training=True)
    step = subject.answering(subject.step(subject.model))
    assert any(not torch.equal(a, b) for a, b in zip(step(), _other_seed(step), strict=True))
    subject.without_chance()
    first, second = step(), _other_seed(step)
    assert len(first) > 20
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


def _other_seed(step: Callable[[], Any]) -> Any:
    """`answering` sets the seed; here it is another one."""
    with mock.patch("torch.manual_seed", lambda seed: torch.default_generator.manual_seed(seed + 1)):
        return step()


def test_training_has_a_loss_of_the_model() -> None:
    for name in ("bert", "llama", "t5", "vit", "wav2vec2", "clip"):
        subject = build(name, TINY, training=True)
        output = subject.model(**subject.kwargs)
        assert loss_of(output) is output.loss


def test_grouped_attention_stays_grouped() -> None:
    config = shrink(transformers.MistralConfig(), TINY)
    assert (config.num_attention_heads, config.num_key_value_heads) == (4, 2)
    full = shrink(transformers.LlamaConfig(), TINY)
    assert full.num_key_value_heads == full.num_attention_heads == 4


def test_every_kind_of_layer_is_kept() -> None:
    config = shrink(transformers.Gemma2Config(), TINY)
    assert set(config.layer_types) == {"sliding_attention", "full_attention"}
    assert len(config.layer_types) == config.num_hidden_layers == 2


def test_parts_are_shrunk() -> None:
    config = shrink(transformers.CLIPConfig(), TINY)
    assert config.text_config.hidden_size == config.vision_config.hidden_size == TINY.hidden


@pytest.mark.parametrize(
    ("name", "inputs"),
    [
        ("qwen2_5_vl", ["input_ids"]),  # angles in sections that the model names, not its configuration
        ("hunyuan_v1_dense", ["input_ids"]),  # heads whose width is left to checkpoints
        ("esm", ["input_ids"]),  # special tokens likewise
        ("mamba2", ["input_ids"]),  # heads as many as an expanded width has
        ("moonshine", ["input_values", "decoder_input_ids"]),  # samples, by strides that are not named
        ("wav2vec2-bert", ["input_features"]),  # features frame by frame
        ("bros", ["input_ids", "bbox"]),
        ("patchtst", ["past_values"]),
        ("perceiver", ["inputs"]),
        ("videomae", ["pixel_values"]),
        ("sam", ["pixel_values"]),  # an encoder of pictures and a decoder of masks, of one width
    ],
)
def test_what_a_class_leaves_open_is_chosen(name: str, inputs: list[str]) -> None:
    subject = build(name, TINY)
    assert list(subject.kwargs) == inputs
    assert sum(parameter.numel() for parameter in subject.model.parameters()) < 6_000_000
    subject.step(subject.model)()


def test_sections_of_angles_add_up_to_half_a_head() -> None:
    for config in (transformers.Qwen2_5_VLConfig(), transformers.Qwen3VLConfig()):
        text = shrink(config, TINY).text_config
        assert sum(text.rope_parameters["mrope_section"]) == TINY.head_dim // 2
    assert "mrope_section" not in shrink(transformers.LlamaConfig(), TINY).rope_parameters


def test_a_size_that_is_already_smaller_is_kept() -> None:
    config = shrink(transformers.BertConfig(), Scale(layers=50, vocab=100_000))
    assert (config.num_hidden_layers, config.vocab_size) == (12, 30522)


def test_special_tokens_lie_in_the_vocabulary() -> None:
    config = shrink(transformers.GPT2Config(), TINY)
    assert config.eos_token_id < config.vocab_size == TINY.vocab


def test_same_seed_same_model() -> None:
    first, second = build("bert", TINY), build("bert", TINY)
    assert torch.equal(first.kwargs["input_ids"], second.kwargs["input_ids"])
    for one, other in zip(first.model.parameters(), second.model.parameters(), strict=True):
        assert torch.equal(one, other)


def test_batch_and_length() -> None:
    subject = build("gpt2", Scale(batch=3, seq=9))
    assert subject.kwargs["input_ids"].shape == (3, 9)


@pytest.mark.parametrize("name", ["rag", "speech-encoder-decoder"])
def test_what_cannot_be_built_says_why(name: str) -> None:
    with pytest.raises(CannotBuild, match=f"no model of type '{name}'.*module:function"):
        build(name, TINY)


def test_exact_result_is_float64_inside() -> None:
    subject = build("llama", TINY)
    exact = exact_result(subject).logits
    eager = subject.step(subject.model)().logits
    assert exact.dtype == torch.float64
    assert 0 < float((exact - eager).abs().max()) < 1e-5
    assert next(subject.model.parameters()).dtype == torch.float32


def test_a_function_is_a_subject() -> None:
    def double(x: torch.Tensor) -> Any:
        return x * 2

    subject = Subject("f", double, (torch.ones(2),))
    assert subject.step(double)().tolist() == [2.0, 2.0]
    assert exact_result(subject).dtype == torch.float64
