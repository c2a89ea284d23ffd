"""Tokens of compiled models on a GPU are eager's."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from support.zoo import ZOO

MODELS = ("llama", "mistral", "gemma2", "qwen3", "gpt2", "gpt_oss", "deepseek_v3", "t5")


@pytest.mark.parametrize("mode", ["default", "reduce-overhead"])
@pytest.mark.parametrize("cache", ["growing", "static"])
@pytest.mark.parametrize("name", MODELS)
def test_tokens(name: str, cache: str, mode: str, device: str) -> None:
    if device == "cpu" and (mode, cache) != ("default", "growing"):
        pytest.skip("the same on a CPU")
    if (name, cache) == ("t5", "static"):
        pytest.skip("transformers compiles static caches of encoder-decoder models itself")
    model = ZOO[name].make_model("eager").to(device).eval()
    ids = torch.randint(1, 100, (2, 9), device=device)
    arguments: dict[str, Any] = {"max_new_tokens": 40, "do_sample": False, "min_new_tokens": 40}
    arguments |= {"cache_implementation": "static"} if cache == "static" else {}
    wanted = model.generate(ids, **arguments)
    eager = {"options": {"host": "eager", "disable": "emit-kernels"}}  # which takes no interpreter long
    options = {"mode": mode} if device == "cuda" else eager
    compiled = torch.compile(model, backend="fxopt", **options)
    for _ in range(2):
        assert torch.equal(compiled.generate(ids, **arguments), wanted)
