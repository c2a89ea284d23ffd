"""The suite: which architectures are measured, and how one of them is run."""

from __future__ import annotations

import gc
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from fxopt.measure.compare import BASELINE, CANDIDATE, compare, stage_seconds
from fxopt.measure.models import Subject, build
from fxopt.measure.shrink import Scale

# Chance that differs between two calls would make two models of one.
_NO_SKIPPED_LAYERS = {"layerdrop": 0.0, "mask_time_prob": 0.0, "mask_feature_prob": 0.0}
# What every published checkpoint of it has and the bare configuration class has not.
_DISENTANGLED = {
    "relative_attention": True,
    "position_buckets": 32,
    "pos_att_type": ["p2c", "c2p"],
    "share_att_key": True,
    "norm_rel_ebd": "layer_norm",
    "position_biased_input": False,
}

# Model type of transformers -> configuration attributes that differ from the class's own.
SUITE: dict[str, dict[str, Any]] = {
    "bert": {},
    "roberta": {},
    "distilbert": {},
    "albert": {},
    "deberta-v2": _DISENTANGLED,
    "gpt2": {},
    "opt": {},
    "gpt_neox": {},
    "bloom": {},
    "falcon": {},
    "llama": {},
    "mistral": {},
    "mixtral": {},
    "qwen2": {},
    "qwen3": {},
    "gemma2": {},
    "phi3": {},
    "mamba": {},
    "t5": {},
    "bart": {},
    "whisper": {},
    "vit": {},
    "clip": {},
    "swin": {},
    "wav2vec2": _NO_SKIPPED_LAYERS,
}


@dataclass(frozen=True)
class Case:
    """One line of the table."""

    model: str
    training: bool
    overrides: Mapping[str, Any] = field(default_factory=dict)

    @property
    def phase(self) -> str:
        return "train" if self.training else "infer"

    def subject(self, scale: Scale, attention: str | None, dtype: torch.dtype, device: str) -> Subject:
        """The model and its inputs, on the device."""
        return build(
            self.model,
            scale,
            attention=attention,
            dtype=dtype,
            training=self.training,
            overrides=dict(self.overrides),
        ).to(device)


def cases(models: Sequence[str], *, infer: bool = True, train: bool = True) -> Iterator[Case]:
    """Inference and training of each model; those of the suite with the suite's configuration."""
    for model in models:
        for training in [False] * infer + [True] * train:
            yield Case(model, training, SUITE.get(model, {}))


def measure(case: Case, subject: Subject, options: Mapping[str, Any] | None, **timing: Any) -> dict[str, Any]:
    """One row, as plain values.

    A training step draws dropout masks, of which every backend draws its own, so only inference is compared
    with float64.
    """
    found = compare(subject, options=options, check=not case.training, **timing)
    row = {
        "model": case.model,
        "phase": case.phase,
        "parameters": sum(parameter.numel() for parameter in subject.model.parameters()),
        "ratio": found.speed.as_dict(),
        "noise": found.noise.as_dict(),
        "seconds": {name: found.timings.median(name) for name in (BASELINE, CANDIDATE)},
        "rounds": len(found.timings.seconds[CANDIDATE]),
        "first_call": {name: round(seconds, 3) for name, seconds in found.first_call.items()},
        "stages": {name: round(seconds, 4) for name, seconds in stage_seconds(found.records).items()},
        "graphs": len(found.records),
        "sites": found.sites,
        "errors": found.errors,
        "accepted": found.accepted,
        "faults": found.faults,
    }
    release()
    return row


def release() -> None:
    """Give back what the compiler keeps of the last model."""
    torch._dynamo.reset()
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
