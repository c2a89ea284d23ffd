"""The suite: which architectures are measured, and how one of them is run."""

from __future__ import annotations

import gc
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from fxopt.measure.compare import compare, stage_seconds
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
# The quick size does not train what compiles for half a minute and more, nor what has the blocks of another.
_LONG_TO_TRAIN = frozenset({"deberta-v2", "mamba", "t5", "bart", "whisper", "swin", "wav2vec2"})
UNTRAINED = _LONG_TO_TRAIN | {"roberta", "distilbert", "mistral", "qwen2", "clip"}

# At the size that is quick, what compiles for minutes else: two stages of the pyramid, three convolutions,
# one layer of what is unrolled over time, one on each side of what encodes and decodes.
_ONE_ON_EACH_SIDE = {"encoder_layers": 1, "decoder_layers": 1}
_THIN: dict[str, dict[str, Any]] = {
    "mamba": {"num_hidden_layers": 1},
    "t5": {"num_layers": 1, "num_decoder_layers": 1},
    "bart": _ONE_ON_EACH_SIDE,
    "m2m_100": _ONE_ON_EACH_SIDE,
    "whisper": _ONE_ON_EACH_SIDE,
    "swin": {"depths": [2], "num_heads": [3], "num_layers": 1, "hidden_size": 96, "image_size": 56},
    "wav2vec2": {
        "conv_dim": [64] * 3,
        "conv_stride": [5, 2, 2],
        "conv_kernel": [10, 3, 3],
        "num_feat_extract_layers": 3,
    },
}


def _dashboard(model: str, name: str, **more: Any) -> tuple[str, dict[str, Any]]:
    """A class of PyTorch's dashboard list that differs from the first head of its model type."""
    return model, {"architectures": [name], **more}


# What is not the first class of its model type, or whose small configuration needs more: name -> model type
# and attributes. The names are those of PyTorch's performance dashboard (benchmarks/dynamo of PyTorch).
NAMED: dict[str, tuple[str, dict[str, Any]]] = {
    "BartForCausalLM": _dashboard("bart", "BartForCausalLM"),
    "BertForQuestionAnswering": _dashboard("bert", "BertForQuestionAnswering"),
    "BlenderbotForCausalLM": _dashboard("blenderbot", "BlenderbotForCausalLM"),
    "BlenderbotSmallForCausalLM": _dashboard("blenderbot-small", "BlenderbotSmallForCausalLM"),
    "ElectraForCausalLM": _dashboard("electra", "ElectraForCausalLM"),
    "GPT2ForSequenceClassification": _dashboard("gpt2", "GPT2ForSequenceClassification", pad_token_id=0),
    "MBartForCausalLM": _dashboard("mbart", "MBartForCausalLM"),
    "MegatronBertForCausalLM": _dashboard("megatron-bert", "MegatronBertForCausalLM"),
    "PegasusForCausalLM": _dashboard("pegasus", "PegasusForCausalLM"),
    "PLBartForCausalLM": _dashboard("plbart", "PLBartForCausalLM"),
    "RobertaForCausalLM": _dashboard("roberta", "RobertaForCausalLM"),
    "TrOCRForCausalLM": _dashboard("trocr", "TrOCRForCausalLM"),
    "XGLMForCausalLM": _dashboard("xglm", "XGLMForCausalLM"),
}
# More model types of the dashboard's list, and decoders that are newer than it.
MORE: tuple[str, ...] = (
    "convbert", "fnet", "gpt_neo", "gptj", "m2m_100", "mobilebert", "xlnet", "gemma3_text", "gpt_oss",
    "modernbert", "deepseek_v3", "granite", "olmo2", "smollm3", "glm4", "starcoder2",
)  # fmt: skip
# Names that stand for many models. What the dashboard has and transformers no longer builds is not in it.
GROUPS: dict[str, tuple[str, ...]] = {
    "dashboard": (
        *NAMED, "albert", "bart", "bert", "camembert", "convbert", "deberta-v2", "distilbert", "fnet", "gpt2",
        "gpt_neo", "gptj", "layoutlm", "longformer", "m2m_100", "mobilebert", "mt5", "opt", "roberta", "t5",
        "whisper", "xlnet", "llama", "mistral", "qwen3", "gemma2", "gemma3_text", "gpt_oss",
    ),
}  # fmt: skip


def suite_of(size: str) -> tuple[str, ...]:
    """What is measured without a choice: all architectures at the quick size, those of `SUITE` else."""
    return (*SUITE, *MORE) if size == "tiny" else tuple(SUITE)


def expanded(names: Sequence[str]) -> tuple[str, ...]:
    """The models that are named, those of groups among them; each once."""
    return tuple(dict.fromkeys(each for name in names for each in GROUPS.get(name, (name,))))


@dataclass(frozen=True)
class Case:
    """One line of the table. `target`: what is built; `model` is its name in the table."""

    model: str
    training: bool
    overrides: Mapping[str, Any] = field(default_factory=dict)

    @property
    def target(self) -> str:
        return NAMED[self.model][0] if self.model in NAMED else self.model

    @property
    def phase(self) -> str:
        return "train" if self.training else "infer"

    def subject(self, scale: Scale, attention: str | None, dtype: torch.dtype, device: str) -> Subject:
        """The model and its inputs, on the device."""
        return build(
            self.target,
            scale,
            attention=attention,
            dtype=dtype,
            training=self.training,
            overrides=dict(self.overrides),
        ).to(device)


def cases(
    models: Sequence[str], *, infer: bool = True, train: bool = True, size: str = "small"
) -> Iterator[Case]:
    """Inference and training of each model; those of the suite with the suite's configuration."""
    thin = _THIN if size == "tiny" else {}
    for model in models:
        own = NAMED[model][1] if model in NAMED else {**SUITE.get(model, {}), **thin.get(model, {})}
        for training in [False] * infer + [True] * train:
            yield Case(model, training, own)


def measure(case: Case, subject: Subject, options: Mapping[str, Any] | None, **how: Any) -> dict[str, Any]:
    """One row, as plain values. Dropout is computed and drops nothing, so that gradients can be compared.

    Args:
        how: arguments of `fxopt.measure.compare.compare`.
    """
    given = {"eager": True, "memory": True, "cold": True, **how}
    found = compare(subject.without_chance(), options=options, **given)
    compiled = found.compiled.items()
    row = {
        "model": case.model,
        "phase": case.phase,
        "parameters": sum(parameter.numel() for parameter in _parameters(subject)),
        **found.row(),
        "first_call": {name: round(one.seconds, 3) for name, one in compiled},
        "warm": {name: round(seconds, 3) for name, seconds in found.warm.items()},
        "dynamo": {name: one.counts for name, one in compiled},
        "stages": {name: round(seconds, 4) for name, seconds in stage_seconds(found.records).items()},
        "graphs": len(found.records),
    }
    release()
    return row


def _parameters(subject: Subject) -> list[torch.Tensor]:
    return list(subject.model.parameters()) if isinstance(subject.model, torch.nn.Module) else []


def release() -> None:
    """Give back what the compiler keeps of the last model."""
    torch._dynamo.reset()
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
