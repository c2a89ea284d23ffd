"""fxopt costs no graph, graph break or recompile more than a backend that only runs what Dynamo captured."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from support.compile_stats import Counting, compile_stats
from support.compiled import all_handled
from support.runs import infer
from support.zoo import ZOO, Architecture

LENGTHS = (13, 17, 22)
# One of each way to make positions, masks and caches, on which guards depend; then others of these kinds.
NAMES = ("bert", "deberta_v2", "gpt2", "llama", "gemma3_text", "t5", "swin", "wav2vec2")
OTHERS = ("xlnet", "bloom", "mpt", "mistral", "mixtral", "gpt_oss", "whisper", "clip")


def _inference(architecture: Architecture, attention: str) -> Callable[[Callable[..., Any]], None]:
    def run(backend: Callable[..., Any]) -> None:
        compiled = torch.compile(architecture.make_model(attention), backend=backend)
        for seq in LENGTHS:
            infer(compiled, architecture.make_inputs(seq=seq, mask=_mask(architecture)))

    return run


def _mask(architecture: Architecture) -> str | None:
    return architecture.masks[0] if architecture.masks else None


@pytest.mark.parametrize("name", [*NAMES, *(pytest.param(name, marks=pytest.mark.slow) for name in OTHERS)])
def test_no_graph_more_in_inference_over_several_lengths(name: str) -> None:
    run = _inference(ZOO[name], "eager")
    plain = compile_stats(Counting("eager"), run)
    with all_handled():
        ours = compile_stats(Counting("fxopt", options={"host": "eager", "strict": True}), run)
    assert ours == plain
