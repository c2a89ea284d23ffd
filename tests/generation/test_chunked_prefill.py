"""`generate(prefill_chunk_size=...)`: a long prompt is read in parts, compiled, and other lengths of prompts
compile nothing."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from generation.test_generate import llama

import fxopt
from support.compiled import all_handled, compile_fxopt

# Whole chunks of 8 and a rest: 2 and 5, 3 and 3, 4 and 6.
LENGTHS = (21, 27, 38)
HOW: dict[str, Any] = {"do_sample": False, "prefill_chunk_size": 8, "max_new_tokens": 6, "min_new_tokens": 6}


def prompt(length: int) -> torch.Tensor:
    return torch.randint(2, 61, (1, length), generator=torch.Generator().manual_seed(length))


@pytest.fixture(autouse=True)
def _afresh() -> None:
    torch.compiler.reset()


def test_over_a_growing_cache() -> None:
    model = llama()
    compiled: Any = compile_fxopt(model)
    graphs = []
    with all_handled() as records:
        for length in LENGTHS:
            ids = prompt(length)
            whole = model.generate(ids, **{**HOW, "prefill_chunk_size": None})  # type: ignore[operator]
            assert torch.equal(compiled.generate(ids, **HOW), whole)
            graphs.append(len(records))
    assert graphs[1] == graphs[2], f"graphs after each prompt: {graphs}"


def test_over_a_static_cache() -> None:
    model: Any = llama()
    how = HOW | {"cache_implementation": "static", "max_cache_len": 64}
    config = fxopt.compile_config(options={"host": "eager"})
    graphs = []
    with all_handled() as records:
        for length in LENGTHS:
            ids = prompt(length)
            eager = model.generate(ids, **how, disable_compile=True)
            assert torch.equal(model.generate(ids, **how, compile_config=config), eager)
            graphs.append(len(records))
    assert graphs[1] == graphs[2], f"graphs after each prompt: {graphs}"
