"""A model with layers that are large enough to be quantized."""

from __future__ import annotations

from typing import Any

import torch
from transformers import LlamaConfig, LlamaForCausalLM


def llama(**more: Any) -> LlamaForCausalLM:
    """Two layers of random weights. `more` goes to the configuration."""
    sizes = {"hidden_size": 384, "intermediate_size": 768, "vocab_size": 640, "num_hidden_layers": 2}
    heads = {"num_attention_heads": 6, "num_key_value_heads": 6}
    return LlamaForCausalLM(LlamaConfig(**sizes, **heads, **more)).eval()


def ids() -> torch.Tensor:
    """Two texts of seven tokens."""
    return torch.arange(14).view(2, 7) * 37 % 640


def distance(found: torch.Tensor, wanted: torch.Tensor) -> float:
    """The relative error in the 2-norm."""
    return float((found - wanted).norm() / wanted.norm())
