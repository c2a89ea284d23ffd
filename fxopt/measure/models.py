"""A model with inputs for it, from the name of an architecture or from a configuration: random weights."""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any

import torch
from torch.utils import _pytree as pytree

from fxopt.errors import UserError
from fxopt.measure.inputs import Inputs, candidates, labels_for
from fxopt.measure.shrink import Scale, shrink

# The heads that a model is built with, the first that it has.
_HEADS = (
    "SEQ_TO_SEQ_CAUSAL_LM",
    "SPEECH_SEQ_2_SEQ",
    "MASKED_LM",
    "IMAGE_TEXT_TO_TEXT",
    "CAUSAL_LM",
    "CTC",
    "IMAGE_CLASSIFICATION",
    "AUDIO_CLASSIFICATION",
    "VIDEO_CLASSIFICATION",
    "PRETRAINING",
)
_SPECIAL_TOKENS = ("cls_token_id", "pad_token_id", "eos_token_id", "bos_token_id", "mask_token_id")
# Those of what has no model without a head.
_OTHER_HEADS = (
    "DEPTH_ESTIMATION", "OBJECT_DETECTION", "SEMANTIC_SEGMENTATION", "UNIVERSAL_SEGMENTATION",
    "TIME_SERIES_PREDICTION", "TEXT_TO_WAVEFORM", "IMAGE_TO_IMAGE", "KEYPOINT_DETECTION",
)  # fmt: skip


class CannotBuild(UserError):
    """transformers knows the architecture, but no small model of it could be made and run."""

    message = (
        "no model of type {name!r} could be built and run with generated inputs: {reason}. "
        "Pass module:function, a function that returns (model, args, kwargs), instead."
    )


@dataclass
class Subject:
    """A model and what to call it with.

    Attributes:
        model: a module, or any function of tensors.
        training: the model is in training mode and a call is followed by a backward pass.
    """

    name: str
    model: Any
    args: tuple[Any, ...] = ()
    kwargs: Inputs = field(default_factory=dict)
    training: bool = False

    def step(self, call: Callable[..., Any]) -> Callable[[], Any]:
        """`call` on the inputs, without arguments: one inference, or one forward and backward."""
        return self._train(call) if self.training else self._infer(call)

    def _infer(self, call: Callable[..., Any]) -> Callable[[], Any]:
        def infer() -> Any:
            with torch.no_grad():
                return call(*self.args, **self.kwargs)

        return infer

    def _train(self, call: Callable[..., Any]) -> Callable[[], Any]:
        def train() -> Any:
            if isinstance(self.model, torch.nn.Module):
                self.model.zero_grad(set_to_none=True)
            output = call(*self.args, **self.kwargs)
            loss_of(output).backward()
            return output

        return train

    def answering(self, step: Callable[[], Any]) -> Callable[[], Any]:
        """`step`, with all that its result means: of a training step the loss and the gradients, in order."""
        if not self.training or not isinstance(self.model, torch.nn.Module):
            return step
        parameters = list(self.model.parameters())

        def answer() -> list[torch.Tensor]:
            torch.manual_seed(0)  # for dropout that drops nothing, but draws
            loss = loss_of(step()).detach()
            return [loss, *(one.grad.clone() for one in parameters if one.grad is not None)]

        return answer

    def without_chance(self) -> Subject:
        """The same model with dropout that is computed, and drops nothing.

        As PyTorch's dashboard does it: probabilities of 1e-30, so that the gradients of two runs can be
        compared while the cost of dropout stays. The model is changed.
        """
        if isinstance(self.model, torch.nn.Module):
            for module in self.model.modules():
                for holder in (module, getattr(module, "config", None)):
                    _keep_all(holder)
        return self

    def double(self) -> Subject:
        """A copy in float64. Run it under `fxopt.measure.accuracy.float64_everywhere`."""
        args, kwargs = pytree.tree_map(_to_double, (self.args, self.kwargs))
        if not isinstance(self.model, torch.nn.Module):
            return dataclasses.replace(self, args=args, kwargs=kwargs)
        model = copy.deepcopy(self.model).double()
        _use_plain_experts(model)
        return dataclasses.replace(self, model=model, args=args, kwargs=kwargs)

    def to(self, device: str) -> Subject:
        """On another device; the model itself is moved."""
        args, kwargs = pytree.tree_map_only(torch.Tensor, lambda t: t.to(device), (self.args, self.kwargs))
        model = self.model.to(device) if isinstance(self.model, torch.nn.Module) else self.model
        return dataclasses.replace(self, model=model, args=args, kwargs=kwargs)


def build(
    model_type: str,
    scale: Scale,
    *,
    attention: str | None = None,
    dtype: torch.dtype = torch.float32,
    training: bool = False,
    overrides: dict[str, Any] | None = None,
    seed: int = 0,
) -> Subject:
    """A random model of a type that transformers knows (`llama`, `bert`, `deberta-v2`), made as small as
    `scale`.

    Args:
        attention: `attn_implementation`; None is transformers' default.
        overrides: configuration attributes that replace those of the small configuration.

    Raises:
        CannotBuild: with the reason.
    """
    import transformers

    try:
        default = transformers.AutoConfig.for_model(model_type)
        config = shrink(default, scale)
        for name, value in (overrides or {}).items():
            setattr(config, name, value)
    except Exception as error:
        raise CannotBuild(name=model_type, reason=_short(error)) from error
    how: dict[str, Any] = {"attention": attention, "dtype": dtype, "training": training, "seed": seed}
    try:
        return from_config(config, scale, **how)
    except CannotBuild:
        if not _set_tokens(config):
            raise
        with suppress(CannotBuild):
            return from_config(config, scale, **how)
        raise


def _set_tokens(config: Any) -> bool:
    """Give special tokens to a class that leaves them to its checkpoints (ESM). False: it has all of them."""
    unset = [name for name in _SPECIAL_TOKENS if getattr(config, name, 0) is None]
    for name in unset:
        setattr(config, name, _SPECIAL_TOKENS.index(name))
    return bool(unset)


def from_config(
    config: Any,
    scale: Scale,
    *,
    attention: str | None = None,
    dtype: torch.dtype = torch.float32,
    training: bool = False,
    device: str = "cpu",
    seed: int = 0,
) -> Subject:
    """A random model of exactly this configuration, made on the device and in the dtype that it is to have.

    Raises:
        CannotBuild: with the reason.
    """
    torch.manual_seed(seed)
    extra: dict[str, Any] = {} if attention is None else {"attn_implementation": attention}
    extra |= {} if device == "cpu" else {"dtype": dtype}
    try:
        with torch.device(device):
            model = model_class(config)._from_config(config, **extra)
    except Exception as error:
        raise CannotBuild(name=config.model_type, reason=_short(error)) from error
    return with_inputs(model.to(dtype), scale, training=training, device=device, seed=seed)


def with_inputs(
    model: Any, scale: Scale, *, training: bool = False, device: str = "cpu", seed: int = 0
) -> Subject:
    """Inputs for a transformers model, found by trying on the model itself, which is on `device`.

    Raises:
        CannotBuild: no generated inputs are accepted; the reason is that for the plainest ones.
    """
    torch.manual_seed(seed)
    name = model.config.model_type
    reasons: list[str] = []
    dtype = next((p.dtype for p in model.parameters() if p.is_floating_point()), torch.float32)
    try:
        for inputs in candidates(model.eval(), scale):
            inputs = {key: _cast(value, dtype).to(device) if isinstance(value, torch.Tensor) else value
                      for key, value in inputs.items()}  # fmt: skip
            reason = _refusal(model, inputs)
            if reason is None:
                extra = labels_for(model, inputs, scale) if training else {}
                extra = pytree.tree_map_only(torch.Tensor, lambda t: t.to(device), extra)
                return Subject(name, model.train(training), (), inputs | extra, training)
            reasons.append(reason)
    except KeyError as missing:
        reasons.append(f"no rule makes its input {missing}")
    raise CannotBuild(name=name, reason=reasons[0])


def model_class(config: Any) -> Any:
    """The class that the configuration names, else the first of `_HEADS` that this type of model has."""
    import transformers
    from transformers.models.auto import modeling_auto

    named = (config.architectures or [None])[0]
    if named is not None and hasattr(transformers, named):
        return getattr(transformers, named)
    first, last = (
        [getattr(modeling_auto, f"MODEL_FOR_{head}_MAPPING_NAMES", {}) for head in heads]
        for heads in (_HEADS, _OTHER_HEADS)
    )
    for table in (*first, modeling_auto.MODEL_MAPPING_NAMES, *last):
        found = table.get(config.model_type)
        if found is not None:
            return getattr(transformers, found if isinstance(found, str) else found[0])
    raise CannotBuild(
        name=config.model_type, reason="transformers has a configuration but no model of this type"
    )


def loss_of(output: Any) -> torch.Tensor:
    """The model's own loss, or the mean square of its first floating tensor."""
    loss = getattr(output, "loss", None)
    if isinstance(loss, torch.Tensor):
        return loss
    tensors = pytree.tree_leaves(output)
    floating = [leaf for leaf in tensors if isinstance(leaf, torch.Tensor) and leaf.is_floating_point()]
    return floating[0].square().mean()


def _refusal(model: Any, inputs: Inputs) -> str | None:
    try:
        with torch.no_grad():
            model(**inputs)
    except Exception as error:
        return _short(error)
    return None


def _keep_all(holder: Any) -> None:
    """Every probability of dropping something becomes 1e-30."""
    for name, value in list(vars(holder).items()) if holder is not None else []:
        probability = "drop" in name or (name == "p" and isinstance(holder, torch.nn.Dropout))
        if probability and isinstance(value, float) and value > 0:
            setattr(holder, name, 1e-30)


def _short(error: BaseException) -> str:
    if isinstance(error, CannotBuild):
        return str(error.fields["reason"])
    lines = str(error).strip().splitlines() or [""]
    return f"{type(error).__name__}: {lines[0][:200]}"


def _cast(value: Any, dtype: torch.dtype) -> Any:
    return value.to(dtype) if isinstance(value, torch.Tensor) and value.is_floating_point() else value


def _to_double(value: Any) -> Any:
    return _cast(value, torch.float64)


def _use_plain_experts(model: torch.nn.Module) -> None:
    """The grouped matmul knows no float64; the batched one is the same sum over experts."""
    for module in model.modules():
        config = getattr(module, "config", None)
        if getattr(config, "_experts_implementation", None) == "grouped_mm":
            config._experts_implementation = "batched_mm"  # type: ignore[union-attr]
