"""Example inputs for a transformers model, found from its configuration and its forward's parameters."""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from typing import Any

import torch

from fxopt.measure.shrink import Scale

Inputs = dict[str, Any]
# Ids below are special tokens in most vocabularies: padding would change what is computed.
_FIRST_TOKEN = 10


def candidates(model: Any, scale: Scale) -> Iterator[Inputs]:
    """Inputs that the model may accept, the plainest first. Which one it does accept is found by trying."""
    main = model.main_input_name
    parameters = inspect.signature(model.forward).parameters
    plain: Inputs = {main: make(main, model.config, scale)}
    if model.config.is_encoder_decoder and "decoder_input_ids" in parameters:
        plain["decoder_input_ids"] = make("decoder_input_ids", model.config, scale)
    yield plain
    if "input_ids" in plain:
        yield plain | {"use_cache": False}
    others = [name for name in _MAKERS if name in parameters and name not in plain]
    for name in others:
        yield plain | {name: make(name, model.config, scale)}
    for other in _INSTEAD.get(main, ()):
        yield plain | {main: other(model.config, scale)}
    if "input_ids" in parameters and main != "input_ids":
        yield {"input_ids": make("input_ids", model.config, scale)}


def labels_for(model: Any, inputs: Inputs, scale: Scale) -> Inputs:
    """The arguments that make the model return a loss; none when it has no loss of its own."""
    parameters = inspect.signature(model.forward).parameters
    if "return_loss" in parameters:
        return {"return_loss": True}
    if "labels" not in parameters:
        return {}
    ids = inputs.get("decoder_input_ids", inputs.get("input_ids"))
    if ids is not None and not type(model).__name__.endswith("SequenceClassification"):
        return {"labels": ids.clone()}
    if type(model).__name__.endswith("CTC"):
        return {"labels": torch.randint(5, model.config.vocab_size, (scale.batch, 4))}
    return {"labels": torch.arange(scale.batch) % model.config.num_labels}


def make(name: str, config: Any, scale: Scale) -> torch.Tensor:
    """One input tensor, random.

    Raises:
        KeyError: no rule makes an input of that name.
    """
    return _MAKERS[name](config, scale)


def _find(config: Any, *names: str, default: Any = None) -> Any:
    """The first attribute of that name, in the configuration or in its parts."""
    parts = [getattr(config, part, None) for part in getattr(config, "sub_configs", {})]
    for holder in (config, *parts):
        for name in names:
            value = getattr(holder, name, None)
            if value is not None:
                return value
    return default


def _tokens(config: Any, scale: Scale) -> torch.Tensor:
    vocab = _find(config, "vocab_size", "text_vocab_size", default=scale.vocab)
    return torch.randint(_FIRST_TOKEN, max(vocab - 1, _FIRST_TOKEN + 1), (scale.batch, scale.seq))


def _target_tokens(config: Any, scale: Scale) -> torch.Tensor:
    return _tokens(config, scale)[:, : max(4, scale.seq * 3 // 4)]


def _pixels(config: Any, scale: Scale) -> torch.Tensor:
    size = _find(config, "image_size", "img_size", "input_size", default=scale.image)
    height, width = size if isinstance(size, list | tuple) else (size, size)
    channels = _find(config, "num_channels", "in_channels", "in_chans", default=3)
    frames = getattr(config, "num_frames", None)
    shape = (scale.batch, frames) if isinstance(frames, int) else (scale.batch,)
    return torch.randn(*shape, channels, height, width)


def _waveform(config: Any, scale: Scale) -> torch.Tensor:
    """About `seq` frames of raw audio; a spectrogram for a model that has no convolutions over samples."""
    strides = _find(config, "conv_stride", default=None)
    if not isinstance(strides, list | tuple):
        frames = _find(config, "max_length", default=scale.seq)
        bins = _find(config, "num_mel_bins", default=80)
        return torch.randn(scale.batch, frames, bins)
    step = 1
    for stride in strides:
        step *= stride
    return torch.randn(scale.batch, step * (scale.seq + 2))


def _features(config: Any, scale: Scale) -> torch.Tensor:
    """Log-mel features: [batch, bins, frames] for an encoder of fixed length, [batch, frames, bins] else."""
    bins = _find(config, "num_mel_bins", "input_feat_per_channel", "feature_projection_input_dim", default=80)
    positions = _find(config, "max_source_positions")
    if positions is not None and _find(config, "input_feat_per_channel") is None:
        return torch.randn(scale.batch, bins, 2 * positions)
    return torch.randn(scale.batch, 4 * scale.seq, bins)


def _samples(config: Any, scale: Scale) -> torch.Tensor:
    """Raw audio, for convolutions whose strides the configuration does not name."""
    return torch.randn(scale.batch, 512 * scale.seq)


def _frames(config: Any, scale: Scale) -> torch.Tensor:
    """Features frame by frame: [batch, frames, bins]."""
    bins = _find(config, "num_mel_bins", "input_feat_per_channel", "feature_projection_input_dim", default=80)
    return torch.randn(scale.batch, 4 * scale.seq, bins)


def _boxes(config: Any, scale: Scale) -> torch.Tensor:
    """Where each token stands on a page of 1000 x 1000: left, top, right, bottom."""
    corner = torch.randint(0, 500, (scale.batch, scale.seq, 2))
    return torch.cat([corner, corner + torch.randint(1, 500, corner.shape)], -1)


def _series(config: Any, scale: Scale) -> torch.Tensor:
    """[batch, time], with channels where the model has them."""
    length = _find(config, "context_length", default=scale.seq)
    channels = _find(config, "num_input_channels", default=None)
    shape = (scale.batch, length) if channels is None else (scale.batch, length, channels)
    return torch.randn(*shape)


_MAKERS = {
    "input_ids": _tokens,
    "decoder_input_ids": _target_tokens,
    "pixel_values": _pixels,
    "input_values": _waveform,
    "input_features": _features,
    "bbox": _boxes,
    "past_values": _series,
    "inputs": _tokens,
}
# What else a main input may be, where the first is not accepted.
_INSTEAD = {"input_values": (_samples,), "input_features": (_frames,)}
