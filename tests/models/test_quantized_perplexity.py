"""How much the perplexity of a language model rises when its linear layers are quantized."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch

import fxopt
from fxopt.integrations.quantized_module import QuantizedLinear
from support.small_language_model import documentation, perplexity, samples, trained

# Training takes two minutes on one core that nobody else uses.
pytestmark = pytest.mark.slow

STEPS, LAYERS = 400, 28
# By scheme, group size, and whether rounding is calibrated: the most that perplexity may rise, as a share.
GATES = {
    ("int8", None, False): 0.003,
    ("int8-dynamic", None, False): 0.01,
    ("fp8", None, False): 0.01,
    ("int4", 64, False): 0.03,
    ("int4", 64, True): 0.03,
    ("nf4", None, False): 0.03,
    ("nf4", None, True): 0.03,
}


@dataclass
class Trained:
    model: Any
    calibration: Any
    perplexity: float

    def rise(self, scheme: str, group: int | None, calibrated: bool, change: Callable[..., None]) -> float:
        """Of the perplexity when all projections are quantized, and their weights then changed."""
        # Most projections are smaller than what is quantized by default; a rule for them is meant.
        model = fxopt.prepare(
            copy.deepcopy(self.model),
            {"*_proj": scheme},
            group_size=group,
            calibration=self.calibration if calibrated else None,
        )
        layers = [each for each in model.modules() if isinstance(each, QuantizedLinear)]
        assert len(layers) == LAYERS
        for each in layers:
            change(each)
        return perplexity(model) / self.perplexity - 1


@pytest.fixture(scope="module")
def language() -> Trained:
    model = trained(STEPS)
    before = perplexity(model)
    # Below what the frequencies of characters give, by far: it has learned what the text is.
    assert before < 7
    text, _ = documentation()
    torch.manual_seed(1)
    return Trained(model, fxopt.calibrate(model, [samples(text) for _ in range(16)]), before)


def unchanged(layer: QuantizedLinear) -> None:
    """A weight as it was made."""


@pytest.mark.parametrize(("scheme", "group", "calibrated"), GATES)
def test_perplexity(language: Trained, scheme: str, group: int | None, calibrated: bool) -> None:
    rise = language.rise(scheme, group, calibrated, unchanged)
    print(f"{scheme} {group} {calibrated}: {language.perplexity:.3f} {100 * rise:+.3f} %")
    assert rise <= GATES[scheme, group, calibrated]


@pytest.mark.parametrize(("scheme", "group"), [("int4", 64), ("nf4", None)])
def test_calibration_is_better(language: Trained, scheme: str, group: int | None) -> None:
    calibrated, rounded = (language.rise(scheme, group, each, unchanged) for each in (True, False))
    assert calibrated < rounded


def of_six_bits(layer: QuantizedLinear) -> None:
    layer.codes.copy_((layer.codes.float() / 4).round() * 4)


def of_the_next_group(layer: QuantizedLinear) -> None:
    layer.scales.copy_(layer.scales.roll(1, 1))
    layer.offsets.copy_(layer.offsets.roll(1, 1))


@pytest.mark.parametrize(
    ("scheme", "group", "fault"), [("int8", None, of_six_bits), ("int4", 64, of_the_next_group)]
)
def test_gates_reject_wrong_weights(
    language: Trained, scheme: str, group: int | None, fault: Callable[..., None]
) -> None:
    assert language.rise(scheme, group, group is not None, fault) > GATES[scheme, group, False]
