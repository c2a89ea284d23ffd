"""A language model that is trained here, on text that comes with Python: the docstrings of its library.

Characters of ASCII are tokens. It is a Llama of four layers, which learns words and the form of docstrings in
a few hundred steps; what it has learned is enough for its perplexity to show errors in its weights.
"""

from __future__ import annotations

import ast
import functools
import math
import sysconfig
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from transformers import LlamaConfig, LlamaForCausalLM

LENGTH, BATCH, VOCABULARY = 128, 16, 128
# Of docstrings, one in this many is held out.
_HELD_OUT = 10
_SHORTEST = 60
# Sequences that are compared.
_COMPARED = 128


@functools.cache
def documentation() -> tuple[torch.Tensor, torch.Tensor]:
    """The text to learn, and the text that is held out: codes of characters."""
    root = Path(sysconfig.get_paths()["stdlib"])
    texts = list(dict.fromkeys(text for path in sorted(root.glob("*.py")) for text in _docstrings(path)))
    held_out = texts[_HELD_OUT - 1 :: _HELD_OUT]
    learned = [text for place, text in enumerate(texts, 1) if place % _HELD_OUT]
    return _characters(learned), _characters(held_out)


def _docstrings(path: Path) -> Iterator[str]:
    kinds = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
    for node in ast.walk(ast.parse(path.read_bytes())):
        text = ast.get_docstring(node) if isinstance(node, kinds) else None
        if text is not None and len(text) >= _SHORTEST:
            yield text


def _characters(texts: list[str]) -> torch.Tensor:
    return torch.tensor(list("\n\n".join(texts).encode("ascii", "ignore")))


def trained(steps: int) -> LlamaForCausalLM:
    """The model after some steps: the same in each run on one machine."""
    text, _ = documentation()
    torch.manual_seed(0)
    sizes = {"hidden_size": 128, "intermediate_size": 320, "num_hidden_layers": 4, "vocab_size": VOCABULARY}
    model = LlamaForCausalLM(LlamaConfig(**sizes, num_attention_heads=4, num_key_value_heads=4))
    optimizer = torch.optim.AdamW(model.parameters(), weight_decay=0.1, betas=(0.9, 0.95))
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 4e-3, total_steps=steps, pct_start=0.1)
    for _ in range(steps):
        with torch.autocast("cpu", torch.bfloat16):
            loss = _loss(model, samples(text))
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
    return model.eval()


def samples(text: torch.Tensor) -> torch.Tensor:
    """A batch of sequences from anywhere."""
    starts = torch.randint(text.numel() - LENGTH, (BATCH, 1))
    return text[starts + torch.arange(LENGTH)]


def _loss(model: Any, tokens: torch.Tensor) -> torch.Tensor:
    return model(tokens, labels=tokens).loss  # type: ignore[no-any-return]


@torch.no_grad()
def perplexity(model: Any) -> float:
    """Of a character of the text that is held out."""
    _, text = documentation()
    batches = text[: _COMPARED * LENGTH].view(-1, BATCH, LENGTH)
    return math.exp(sum(_loss(model, batch).item() for batch in batches) / len(batches))
