"""The zoo: every architecture on which fxopt must give eager's answer."""

from __future__ import annotations

from support.architecture import BATCH, SEQ, VOCAB, Architecture
from support.zoo_media import MEDIA
from support.zoo_text import DECODERS, ENCODER_DECODERS, ENCODERS

__all__ = ["BATCH", "SEQ", "VOCAB", "ZOO", "Architecture", "cases"]

ZOO: dict[str, Architecture] = {
    entry.name: entry for entry in (*ENCODERS, *DECODERS, *ENCODER_DECODERS, *MEDIA)
}


def cases(names: tuple[str, ...] = tuple(ZOO)) -> list[tuple[str, str]]:
    """(architecture, attention implementation), for `pytest.mark.parametrize`."""
    return [(name, attention) for name in names for attention in ZOO[name].attentions]
