"""The architectures of the zoo that see or hear."""

from __future__ import annotations

from typing import Any

from support import zoo_inputs as make
from support.architecture import VOCAB, Architecture

ONE = ("eager",)

VISION: dict[str, Any] = {
    "hidden_size": 48,
    "intermediate_size": 80,
    "num_hidden_layers": 2,
    "num_attention_heads": 6,
    "image_size": 20,
    "patch_size": 4,
}
TOWERS: dict[str, dict[str, Any]] = {
    "text_config": {
        "vocab_size": VOCAB,
        "hidden_size": 48,
        "intermediate_size": 80,
        "num_hidden_layers": 2,
        "num_attention_heads": 6,
        "max_position_embeddings": 64,
        "pad_token_id": 1,
        "bos_token_id": 2,
        "eos_token_id": VOCAB - 1,
    },
    "vision_config": VISION,
}
SPEECH: dict[str, Any] = {
    "vocab_size": 29,
    "hidden_size": 48,
    "intermediate_size": 80,
    "num_hidden_layers": 2,
    "num_attention_heads": 6,
    "conv_dim": [20, 24],
    "conv_stride": [5, 2],
    "conv_kernel": [10, 3],
    "num_feat_extract_layers": 2,
    "num_conv_pos_embeddings": 6,
    "num_conv_pos_embedding_groups": 4,
    "mask_time_prob": 0.0,
    "ctc_loss_reduction": "mean",
}

MEDIA = [
    Architecture("vit", "ViTForImageClassification", VISION | {"num_labels": 3}, make.image, masks=()),
    Architecture(
        "dinov2",
        "Dinov2ForImageClassification",
        VISION | {"num_labels": 3, "mlp_ratio": 2},
        make.image,
        masks=(),
    ),
    Architecture(
        "swin",
        "SwinForImageClassification",
        {
            "image_size": 32,
            "patch_size": 2,
            "embed_dim": 24,
            "depths": [2, 2],
            "num_heads": [3, 6],
            "window_size": 4,
            "num_labels": 3,
        },
        make.image,
        masks=(),
    ),
    Architecture(
        "segformer",
        "SegformerForImageClassification",
        {
            "num_encoder_blocks": 2,
            "depths": [1, 1],
            "sr_ratios": [2, 1],
            "hidden_sizes": [24, 48],
            "patch_sizes": [7, 3],
            "strides": [4, 2],
            "num_attention_heads": [3, 6],
            "mlp_ratios": [2, 2],
            "num_labels": 3,
        },
        make.image_of_any_size,
        masks=(),
    ),
    Architecture("clip", "CLIPModel", {"projection_dim": 40}, make.image_and_text, parts=TOWERS),
    Architecture("siglip", "SiglipModel", {}, make.image_and_text, parts=TOWERS),
    Architecture("wav2vec2", "Wav2Vec2ForCTC", SPEECH, make.waveform, masks=()),
]
