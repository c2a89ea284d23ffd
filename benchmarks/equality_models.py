"""The models of the table of equal tokens: tiny, of random weights, each with a smaller one that drafts.

Weights are larger than a model is initialised with, or it would write the same token again and again.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass
from typing import Any

import torch
from transformers import DynamicCache, EncoderDecoderCache

from fxopt.measure.models import Subject, build
from fxopt.measure.shrink import Scale

Inputs = dict[str, Any]
SCALE = Scale(layers=2, hidden=32, heads=4, ffn=48, vocab=97)
POSITIONS = 2200
WINDOW = 24
_LIVELY: dict[str, Any] = {
    "initializer_range": 0.5, "init_std": 0.3, "initializer_factor": 3.0, "tie_word_embeddings": False,
    "max_position_embeddings": POSITIONS, "n_positions": POSITIONS, "max_target_positions": POSITIONS,
}  # fmt: skip
_SLIDING = {"sliding_window": WINDOW}
_MIXED = _SLIDING | {"layer_types": ["sliding_attention", "full_attention"]}

# Model type of transformers -> configuration attributes that differ from those of the small configuration.
MODELS: dict[str, dict[str, Any]] = {
    "llama": {},
    "qwen2": {},
    "qwen3": {},
    "mistral": _SLIDING,
    "mixtral": {},
    "gemma2": _MIXED,
    "gemma3_text": _MIXED,
    "phi3": {},
    "gpt2": {},
    "opt": {},
    "gpt_oss": _MIXED,
    "deepseek_v3": {},
    "bart": {},
    "t5": {},
    "whisper": {"max_source_positions": 50},
}


@dataclass(frozen=True)
class Writer:
    """A model that generates.

    Attributes:
        draft: the model without its last layer, for assisted decoding.
        frames: of the sound that it takes instead of text; 0 for text.
    """

    subject: Subject
    draft: Any
    frames: int = 0

    @property
    def model(self) -> Any:
        return self.subject.model

    @property
    def encodes(self) -> bool:
        """What is written is not a continuation of what is read."""
        return bool(self.model.config.is_encoder_decoder)

    def prompt(self, rows: int = 1, length: int = 9, *, padded: bool = False) -> Inputs:
        """What `generate` is given; if `padded`, every row has another length."""
        chance = torch.Generator().manual_seed(length)
        if self.frames:
            bands = self.model.config.num_mel_bins
            return {"input_features": torch.randn(rows, bands, self.frames, generator=chance)}
        ids = torch.randint(5, SCALE.vocab, (rows, length), generator=chance)
        mask = torch.ones_like(ids)
        for row in range(rows if padded else 0):
            mask[row, : 2 * row] = 0
        return {"input_ids": ids * mask, "attention_mask": mask}

    def cache(self) -> Any:
        """An empty cache of the kind that `generate` makes."""
        config = self.model.config.get_text_config(decoder=True)
        if not self.encodes:
            return DynamicCache(config=config)
        return EncoderDecoderCache(DynamicCache(config=config), DynamicCache(config=config))


def writer(name: str) -> Writer:
    """The model of this name. Both models write on for ever: no token ends a text."""
    subject = build(name, SCALE, overrides=_LIVELY | MODELS[name])
    frames = 2 * getattr(subject.model.config, "max_source_positions", 0)
    for each in (subject.model, draft := _draft(subject.model)):
        given = each.generation_config
        given.eos_token_id, given.pad_token_id, given.bos_token_id = None, 0, 1
        given.decoder_start_token_id = 1 if each.config.is_encoder_decoder else None
        given.begin_suppress_tokens = given.suppress_tokens = None
    draft.generation_config.num_assistant_tokens = 4
    return Writer(subject, draft, frames)


def _draft(model: Any) -> Any:
    made = copy.deepcopy(model)
    for module in made.modules():
        for name in ("layers", "h", "block"):
            layers = getattr(module, name, None)
            if isinstance(layers, torch.nn.ModuleList) and len(layers) == SCALE.layers:
                setattr(module, name, layers[:-1])
    for name in ("num_hidden_layers", "encoder_layers", "decoder_layers", "num_layers", "num_decoder_layers"):
        if isinstance(getattr(made.config, name, None), int):
            setattr(made.config, name, SCALE.layers - 1)
    return made
