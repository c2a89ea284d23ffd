"""A decoder with multi-head latent attention, for the measurements of caches."""

from __future__ import annotations

from typing import Any

import torch


def latent_model(layers: int, dtype: torch.dtype) -> Any:
    """DeepSeek's attention with its widths, of 16 heads, between dense layers; random weights."""
    from transformers import DeepseekV3Config, DeepseekV3ForCausalLM

    config = DeepseekV3Config(
        vocab_size=1024, hidden_size=1024, intermediate_size=2816, num_hidden_layers=layers,
        first_k_dense_replace=layers, num_attention_heads=16, num_key_value_heads=16, q_lora_rank=512,
        max_position_embeddings=2**15,
    )  # fmt: skip
    torch.manual_seed(0)
    return DeepseekV3ForCausalLM(config).to(dtype).eval()


def cached_sizes(config: Any, length: int) -> tuple[tuple[int, int, int], tuple[int, int, int]]:
    """(heads, length, width) of what a layer's cache holds as keys, and as values."""
    if hasattr(config, "kv_lora_rank"):
        return (1, length, config.kv_lora_rank), (1, length, config.qk_rope_head_dim)
    size = (config.num_key_value_heads, length, config.head_dim)
    return size, size
