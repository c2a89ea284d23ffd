"""What AOTAutograd makes of attention by formulas: no tensor with an entry for each query and key."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import fx

from fxopt.measure.models import build
from fxopt.measure.shrink import Scale
from support.aot_graphs import graphs_of

LENGTH = 804  # no other size of the models


def score_matrices(gm: fx.GraphModule) -> list[str]:
    found = []
    for node in gm.graph.nodes:
        value = node.meta.get("val")
        for each in value if isinstance(value, tuple | list) else (value,):
            if isinstance(each, torch.Tensor) and list(each.shape).count(LENGTH) > 1:
                found.append(node.format_node())
    return found


SITES = [
    ("llama", {}, "ones", False), ("llama", {}, "left", False), ("llama", {}, "right", True),
    ("llama", {}, None, True), ("mistral", {"sliding_window": 100}, "left", True),
    ("gemma2", {"sliding_window": 100}, "right", True), ("gpt_oss", {"sliding_window": 100}, "right", True),
    ("bert", {"max_position_embeddings": 1024}, "right", False),
    ("modernbert", {"local_attention": 100}, "right", False),
    ("gpt2", {"attn_pdrop": 0.1}, "right", True), ("bloom", {}, "right", False), ("mpt", {}, "right", False),
    ("llama4_text", {"attention_chunk_size": 100}, "right", False),
]  # fmt: skip


@pytest.fixture(autouse=True)
def _threads(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch, "get_num_threads", lambda: 2)


def compiled(
    name: str, overrides: dict[str, Any], padding: str | None, *, training: bool, checkpointing: bool = False
) -> list[fx.GraphModule]:
    scale = Scale(layers=1, hidden=32, heads=4, ffn=32, vocab=64, seq=LENGTH)
    subject = build(name, scale, attention="eager", training=training, overrides=overrides)
    kwargs = {key: value for key, value in subject.kwargs.items() if key != "labels"}
    kwargs.pop("attention_mask", None)
    if padding is not None:
        keep = torch.ones_like(kwargs["input_ids"])
        keep[0, slice(0, 50) if padding == "left" else slice(LENGTH - 50, None)] = int(padding == "ones")
        kwargs["attention_mask"] = keep
    model = subject.model.train() if training else subject.model.eval()
    if checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    with torch.set_grad_enabled(training):
        return graphs_of(model, {**kwargs, "use_cache": False, "return_dict": False}, training=training)


@pytest.mark.parametrize(("name", "overrides", "padding", "training"), SITES)
def test_no_matrix_of_scores(
    name: str, overrides: dict[str, Any], padding: str | None, training: bool
) -> None:
    graphs = compiled(name, overrides, padding, training=training)
    assert len(graphs) == 1 + training
    assert not [line for gm in graphs for line in score_matrices(gm)]


@pytest.mark.parametrize("name", ["llama", "mistral", "gemma2", "gpt_oss", "bert"])
def test_no_matrix_of_scores_under_checkpointing(name: str) -> None:
    overrides = {"max_position_embeddings": 1024, "sliding_window": 100}
    graphs = compiled(name, overrides, "left", training=True, checkpointing=True)
    assert len(graphs) == 2
    assert not [line for gm in graphs for line in score_matrices(gm)]
