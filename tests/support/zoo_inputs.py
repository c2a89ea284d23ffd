"""Inputs for each kind of model of the zoo, labels included."""

from __future__ import annotations

from typing import Any

import torch

Inputs = dict[str, Any]


def tokens(config: Any, batch: int, seq: int) -> torch.Tensor:
    """Token ids without the special ones: those at the low end, which mean padding or the end of the text."""
    return torch.randint(10, config.vocab_size, (batch, seq))


def text(config: Any, batch: int, seq: int) -> Inputs:
    """For causal and masked language models: a label at every position but the first two."""
    ids = tokens(config, batch, seq)
    labels = ids.clone()
    labels[:, :2] = -100
    return {"input_ids": ids, "labels": labels}


def text_without_loss(config: Any, batch: int, seq: int) -> Inputs:
    return {"input_ids": tokens(config, batch, seq)}


def text_pair(config: Any, batch: int, seq: int) -> Inputs:
    """For encoder-decoders; the two lengths differ, so that self and cross attention cannot be confused."""
    target = tokens(config, batch, seq - 4)
    return {
        "input_ids": tokens(config, batch, seq),
        "decoder_input_ids": target,
        "labels": target.roll(-1, 1),
    }


def spectrogram(config: Any, batch: int, seq: int) -> Inputs:
    """For Whisper: log-mel features of the full fixed length, and a transcript."""
    target = tokens(config, batch, seq)
    features = torch.randn(batch, config.num_mel_bins, 2 * config.max_source_positions)
    return {"input_features": features, "decoder_input_ids": target, "labels": target.roll(-1, 1)}


def waveform(config: Any, batch: int, seq: int) -> Inputs:
    """For wav2vec2 and its kin: about `seq` frames of audio, and a transcript shorter than that."""
    stride = 1
    for step in config.conv_stride:
        stride *= step
    return {
        "input_values": torch.randn(batch, stride * (seq + 2)),
        "labels": torch.randint(5, config.vocab_size, (batch, seq // 3)),
    }


def image(config: Any, batch: int, seq: int) -> Inputs:
    del seq
    return {
        "pixel_values": torch.randn(batch, config.num_channels, config.image_size, config.image_size),
        "labels": torch.arange(batch) % config.num_labels,
    }


def image_of_any_size(config: Any, batch: int, seq: int) -> Inputs:
    return {
        "pixel_values": torch.randn(batch, config.num_channels, 32, 4 * seq),
        "labels": torch.arange(batch) % config.num_labels,
    }


def image_and_text(config: Any, batch: int, seq: int) -> Inputs:
    """For CLIP and its kin: the last token is the largest id, which marks the end of the text."""
    vision = config.vision_config
    ids = tokens(config.text_config, batch, seq)
    ids[:, -1] = config.text_config.vocab_size - 1
    return {
        "input_ids": ids,
        "pixel_values": torch.randn(batch, vision.num_channels, vision.image_size, vision.image_size),
        "return_loss": True,
    }
