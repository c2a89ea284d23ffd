"""The models of the attention coverage table: one or more for every class of attention that transformers has.

All are made small by the rule of `fxopt.measure.shrink`; an entry changes what would hide its class: a
window as long as the text, or two layers none of which attends.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch

from fxopt.measure.models import Subject, build, from_config
from fxopt.measure.shrink import Scale
from fxopt.measure.suite import SUITE

SCALE = Scale()
WINDOW = 6  # less than the length of the text


@dataclass(frozen=True)
class Entry:
    """One architecture.

    Attributes:
        kind: the class of its attention.
        overrides: configuration attributes that differ from those of the small configuration.
        config: makes the whole configuration instead, where shrinking by names is not enough.
        extra: input ids -> inputs that only this architecture has.
        padding: the argument that masks padding; empty where none is taken.
    """

    name: str
    kind: str
    overrides: dict[str, Any] = field(default_factory=dict)
    config: Callable[[], Any] | None = None
    extra: Callable[[torch.Tensor], dict[str, torch.Tensor]] | None = None
    padding: str = "attention_mask"

    def subject(self, attention: str, dtype: torch.dtype, *, training: bool, padded: bool) -> Subject:
        """The model with its inputs.

        Raises:
            CannotBuild: with the reason; a model without this implementation of attention is one.
        """
        given: dict[str, Any] = {"attention": attention, "dtype": dtype, "training": training}
        if self.config is None:
            found = build(self.name, SCALE, overrides=SUITE.get(self.name, {}) | self.overrides, **given)
        else:
            found = from_config(self.config(), SCALE, **given)
        if self.extra is not None:
            found.kwargs |= self.extra(found.kwargs["input_ids"])
        if padded:
            found.kwargs[self.padding] = self._padding(found)
        return found

    def _padding(self, subject: Subject) -> torch.Tensor:
        """Ones, but for the last third of the last row."""
        decoder = self.padding.startswith("decoder")
        text = subject.kwargs["decoder_input_ids"] if decoder else _main(subject)
        keep = torch.ones(text.shape[:2], dtype=torch.int64)
        keep[-1, -(text.shape[1] // 3) :] = 0
        return keep


def _main(subject: Subject) -> torch.Tensor:
    """Text or sound: what padding is a part of."""
    names = ("input_ids", "input_values")
    found: torch.Tensor = next(subject.kwargs[name] for name in names if name in subject.kwargs)
    return found


def _image_tokens(ids: torch.Tensor) -> dict[str, torch.Tensor]:
    """Two images of three tokens, at other places in every row."""
    kinds = torch.zeros_like(ids)
    for row in range(ids.shape[0]):
        kinds[row, row + 1 : row + 4] = 1
        kinds[row, row + 8 : row + 11] = 1
    return {"token_type_ids": kinds}


def _detr() -> Any:
    """Deformable DETR with a small ResNet that needs no further package."""
    import transformers

    backbone = transformers.ResNetConfig(
        embedding_size=16,
        hidden_sizes=[16, 24, 32, 40],
        depths=[1, 1, 1, 1],
        layer_type="basic",
        out_features=["stage2", "stage3", "stage4"],
    )
    return transformers.DeformableDetrConfig(
        backbone_config=backbone,
        d_model=64,
        encoder_layers=2,
        decoder_layers=2,
        encoder_attention_heads=4,
        decoder_attention_heads=4,
        encoder_ffn_dim=64,
        decoder_ffn_dim=64,
        num_queries=10,
        num_labels=3,
    )


_MODERN = {"local_attention": 8, "layer_types": ["full_attention", "sliding_attention"]}
_MIXED = {"sliding_window": WINDOW, "layer_types": ["sliding_attention", "full_attention"]}

SUITE_KINDS: dict[str, Entry] = {
    entry.name: entry
    for entry in (
        Entry("bert", "encoder, padding"),
        Entry("roberta", "encoder, padding"),
        Entry("distilbert", "encoder, padding"),
        Entry("albert", "encoder, padding"),
        Entry("deberta-v2", "disentangled"),
        Entry("gpt2", "causal"),
        Entry("opt", "causal"),
        Entry("gpt_neox", "causal"),
        Entry("bloom", "ALiBi"),
        Entry("falcon", "causal, multi-query"),
        Entry("llama", "causal, grouped"),
        Entry("mistral", "sliding window", {"sliding_window": WINDOW}),
        Entry("mixtral", "causal, grouped"),
        Entry("qwen2", "causal, grouped"),
        Entry("qwen3", "causal, grouped"),
        Entry("gemma2", "softcap, sliding window", _MIXED),
        Entry("phi3", "sliding window", {"sliding_window": WINDOW}),
        Entry("mamba", "no attention"),
        Entry("t5", "bucketed bias"),
        Entry("bart", "encoder-decoder"),
        Entry("whisper", "encoder-decoder", padding="decoder_attention_mask"),
        Entry("vit", "no mask", padding=""),
        Entry("clip", "causal, and no mask", {"architectures": ["CLIPModel"]}),
        Entry("swin", "2-D table, window mask", padding=""),
        Entry("wav2vec2", "encoder, padding"),
    )
}

MORE: dict[str, Entry] = {
    entry.name: entry
    for entry in (
        Entry("modernbert", "bidirectional window", _MODERN),
        Entry("gpt_oss", "sinks, sliding window", _MIXED),
        Entry("granite_swa", "sinks by sigmoid", {"sliding_window": WINDOW}),
        Entry("llama4_text", "chunked", {"attention_chunk_size": WINDOW}),
        Entry("gemma3", "blocks of image tokens", extra=_image_tokens),
        Entry("deepseek_v3", "MLA"),
        Entry("deepseek_v32", "top-k indexed"),
        Entry("sam_vision_model", "decomposed relative positions", padding=""),
        Entry("xlnet", "relative shift"),
        Entry("longformer", "banded, with global tokens", {"attention_window": [4, 4]}),
        Entry("deformable_detr", "deformable, and no mask", config=_detr, padding=""),
        Entry("diffllama", "differential"),
        Entry("jamba", "hybrid", {"attn_layer_period": 2, "attn_layer_offset": 1}),
        Entry("mpt", "ALiBi"),
        Entry("mpnet", "bucketed bias"),
        Entry("swinv2", "2-D table, cosine", padding=""),
        Entry("beit", "2-D table", {"use_relative_position_bias": True}, padding=""),
    )
}

ENTRIES: dict[str, Entry] = {name: SUITE_KINDS[name] for name in SUITE} | MORE
