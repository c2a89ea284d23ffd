"""Configurations of published models, by name: random weights, no download.

The numbers are those of the `config.json` that each model is published with.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True)
class FullModel:
    """A model of its published size.

    Attributes:
        kind: transformers' model type. config: arguments of its configuration class.
        batch, seq: of the inputs, for one GPU.
        decoder: `generate` writes text with it.
        trained: a training step fits on one GPU.
    """

    kind: str
    config: dict[str, Any] = field(default_factory=dict)
    batch: int = 1
    seq: int = 2048
    decoder: bool = True
    trained: bool = True


def _decoder(hidden: int, inner: int, layers: int, heads: int, groups: int, vocab: int) -> dict[str, Any]:
    return {
        "hidden_size": hidden, "intermediate_size": inner, "num_hidden_layers": layers,
        "num_attention_heads": heads, "num_key_value_heads": groups, "vocab_size": vocab,
    }  # fmt: skip


_LLAMA3 = {"max_position_embeddings": 131072, "rope_parameters": {"rope_type": "default", "rope_theta": 5e5}}
_QWEN = {"max_position_embeddings": 32768, "rope_parameters": {"rope_type": "default", "rope_theta": 1e6}}
_GEMMA = {"head_dim": 256, "query_pre_attn_scalar": 256, "sliding_window": 4096}
_TOWER = {
    "hidden_size": 1024,
    "intermediate_size": 4096,
    "num_hidden_layers": 24,
    "num_attention_heads": 16,
}
_T5 = {
    "d_model": 1024, "d_ff": 4096, "d_kv": 64, "num_layers": 24, "num_decoder_layers": 24, "num_heads": 16,
    "decoder_start_token_id": 0,
}  # fmt: skip
_WHISPER = {
    "d_model": 1280, "encoder_layers": 32, "decoder_layers": 32, "encoder_attention_heads": 20,
    "decoder_attention_heads": 20, "encoder_ffn_dim": 5120, "decoder_ffn_dim": 5120, "num_mel_bins": 128,
    "vocab_size": 51866,
}  # fmt: skip

FULL: dict[str, FullModel] = {
    "llama-3.2-1b": FullModel(
        "llama", _decoder(2048, 8192, 16, 32, 8, 128256) | _LLAMA3 | {"tie_word_embeddings": True}
    ),
    "llama-3.1-8b": FullModel("llama", _decoder(4096, 14336, 32, 32, 8, 128256) | _LLAMA3, trained=False),
    "qwen2.5-7b": FullModel("qwen2", _decoder(3584, 18944, 28, 28, 4, 152064) | _QWEN, trained=False),
    "gemma-2-9b": FullModel("gemma2", _decoder(3584, 14336, 42, 16, 8, 256000) | _GEMMA, trained=False),
    "bert-large": FullModel("bert", _TOWER, batch=16, seq=512, decoder=False),
    "t5-large": FullModel("t5", _T5, batch=8, seq=512, decoder=False),
    "vit-large": FullModel("vit", _TOWER, batch=64, decoder=False),
    "whisper-large": FullModel("whisper", _WHISPER, batch=4, seq=256, decoder=False),
}
