"""A tiny Llama on disk, quantized by a library as it is loaded, and what its logits are exactly."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import nn

from fxopt.frontend.adopt import NAME
from fxopt.ir.contract import Status
from fxopt.report.record import collect
from support.compiled import compile_fxopt

IDS = torch.arange(24).view(2, 12) % 256


def save(folder: Path, dtype: torch.dtype = torch.float32) -> str:
    """Write it to `folder`: 2 layers, 14 projections and a head."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=256, hidden_size=128, intermediate_size=256, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=64,
    )  # fmt: skip
    LlamaForCausalLM(config).to(dtype).save_pretrained(folder)
    return str(folder)


def load(folder: str, dtype: torch.dtype = torch.float32, config: Any = None) -> Any:
    from transformers import AutoModelForCausalLM

    given = {} if config is None else {"quantization_config": config}
    return AutoModelForCausalLM.from_pretrained(folder, dtype=dtype, device_map="cpu", **given).eval()


def exact_logits(
    folder: str, quantized: nn.Module, dense_of: Callable[[Any], torch.Tensor | None]
) -> torch.Tensor:
    """The logits in float64 with the weights as their library widens them.

    Args:
        dense_of: the weight (N, K) of a module of the library, or None for any other module.
    """
    plain = load(folder).double()
    with torch.no_grad():
        for name, module in quantized.named_modules():
            dense = dense_of(module)
            if dense is not None:
                plain.get_submodule(name).weight.copy_(dense.double())
        found: torch.Tensor = plain(IDS, use_cache=False).logits
    return found


def relative(found: torch.Tensor, exact: torch.Tensor) -> float:
    return float((found.double() - exact).norm() / exact.norm())


class Outcome:
    """Logits of a compiled model, and what became of its graphs."""

    def __init__(self, model: nn.Module) -> None:
        torch._dynamo.utils.counters.clear()
        with torch.no_grad(), collect() as records:
            self.logits = compile_fxopt(model)(IDS, use_cache=False).logits
        self.graphs = len(records)
        self.breaks = sum(torch._dynamo.utils.counters["graph_break"].values())
        notes = [each for record in records for each in record.evidence if each.rewrite == NAME]
        self.adopted = sum(each.status is Status.APPLIED for each in notes)
        self.left = [each.reason for each in notes if each.status is not Status.APPLIED]
        self.products = sum(op == "qlinear" for record in records for op, *_ in record.providers)


def prepared(model: nn.Module) -> nn.Module:
    """A prepared copy."""
    import fxopt

    return fxopt.prepare(copy.deepcopy(model))
