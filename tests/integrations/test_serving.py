"""A model in the server of transformers, behind its HTTP layer: loaded from a folder, asked on its thread."""

from __future__ import annotations

import asyncio
import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from generation.test_compiled_generate import tokenizer
from generation.test_generate import llama

import fxopt
from fxopt.runtime.kv_state import STATE
from support.compiled import all_handled

serving = pytest.importorskip("transformers.cli.serving.model_manager", reason="no server in this version")
HOW: dict[str, Any] = {"host": "eager", "strict": True}


@pytest.fixture
def served(tmp_path: Path) -> tuple[Any, Any]:
    """A model and its tokenizer, as the server loads them."""
    torch.compiler.reset()
    model: Any = llama()
    model.save_pretrained(tmp_path)
    tokenizer().save_pretrained(tmp_path)
    manager = serving.ModelManager(device="cpu", dtype="float32")
    loaded = manager.load_model_and_processor(manager.process_model_name(str(tmp_path)))
    yield loaded
    manager.shutdown()


def answer(served: tuple[Any, Any], **given: Any) -> str:
    """As a handler asks: the model's configuration, changed by the request, on the thread of the model."""
    from transformers.cli.serving.utils import GenerateManager

    model, words = served
    inputs = words("w3 w4 w5 w6", return_tensors="pt")
    config = copy.deepcopy(model.generation_config)
    config.update(max_new_tokens=30, do_sample=False, **given)
    text, _, _ = asyncio.run(
        GenerateManager().generate_non_streaming(model, words, dict(inputs), config, "1")
    )
    return text


def test_a_compiled_model_is_served(served: tuple[Any, Any]) -> None:
    wanted = answer(served)
    assert len(set(wanted.split())) > 5
    served[0].compile(backend="fxopt", options=HOW)
    before = STATE.in_place
    with all_handled():
        assert answer(served) == wanted
    assert STATE.in_place - before > 80, "rows are appended in place on the thread of the server"


def test_static_caches_of_the_server_are_compiled_with_fxopt(served: tuple[Any, Any]) -> None:
    """`transformers serve --compile` asks for a static cache; the backend is the model's own choice."""
    static = {"cache_implementation": "static"}
    wanted = answer(served, **static, disable_compile=True)
    served[0].generation_config.compile_config = fxopt.compile_config(options=HOW)
    with all_handled():
        assert answer(served, **static) == wanted
