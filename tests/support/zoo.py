"""The zoo: every architecture on which fxopt must give eager's answer."""

from __future__ import annotations

from typing import Any

import pytest

from support.architecture import BATCH, SEQ, VOCAB, Architecture
from support.zoo_media import MEDIA
from support.zoo_text import DECODERS, ENCODER_DECODERS, ENCODERS

__all__ = ["BATCH", "SEQ", "VOCAB", "ZOO", "Architecture", "cases"]

ZOO: dict[str, Architecture] = {
    entry.name: entry for entry in (*ENCODERS, *DECODERS, *ENCODER_DECODERS, *MEDIA)
}


def cases(turn: int) -> list[Any]:
    """(architecture, attention implementation), for `pytest.mark.parametrize`.

    Of each architecture one implementation is for every run, in turn, and the others are slow. Tests of
    inference and of training take opposite turns, so that each of two implementations is in one of them.
    """
    found = []
    for place, (name, architecture) in enumerate(ZOO.items()):
        usual = architecture.attentions[(place + turn) % len(architecture.attentions)]
        for attention in architecture.attentions:
            marks = () if attention == usual else (pytest.mark.slow,)
            found.append(pytest.param(name, attention, marks=marks, id=f"{name}-{attention}"))
    return found
