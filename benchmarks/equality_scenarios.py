"""The ways of generating of the table of equal tokens.

Each is a function of what is called, the model or the compiled one, and gives all tokens that it wrote.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import torch

from benchmarks.equality_models import Writer

Tokens = list[torch.Tensor]
Scenario = Callable[[Any, Writer, int], Tokens]


def greedy(called: Any, writer: Writer, new: int) -> Tokens:
    return [write(called, writer.prompt(), new)]


def sampling(called: Any, writer: Writer, new: int) -> Tokens:
    return [write(called, writer.prompt(2), new, do_sample=True, temperature=0.9, top_k=20)]


def padded(called: Any, writer: Writer, new: int) -> Tokens:
    return [write(called, writer.prompt(3, padded=True), new)]


def beam(called: Any, writer: Writer, new: int) -> Tokens:
    return [write(called, writer.prompt(2, padded=True), new, num_beams=3)]


def assisted(called: Any, writer: Writer, new: int) -> Tokens:
    return [write(called, writer.prompt(), new, assistant_model=writer.draft)]


def lookup(called: Any, writer: Writer, new: int) -> Tokens:
    return [write(called, writer.prompt(), new, prompt_lookup_num_tokens=3)]


def crop(called: Any, writer: Writer, new: int) -> Tokens:
    """The last tokens are taken back, and others written instead."""
    turns = Turns(called, writer)
    turns.cache.activate_past_recording()
    turns.write(new // 2)
    turns.cache.crop(-(new // 8))
    turns.text = torch.cat([turns.text[:, : -(new // 8)], _words(3)], 1)
    return [turns.write(new // 2)]


def proceed(called: Any, writer: Writer, new: int) -> Tokens:
    """A conversation: words of the other side are put behind what was written, and the cache is used on."""
    turns = Turns(called, writer)
    for turn in range(3):
        turns.write(new // 3 + 1)
        turns.text = torch.cat([turns.text, _words(turn)], 1)
    return [turns.text]


def deepcopied(called: Any, writer: Writer, new: int) -> Tokens:
    """A prompt is read once; each text goes on with a copy of its cache."""
    prompt = Turns(called, writer)
    prompt.write(2)
    texts = []
    for seed in range(2):
        text = copy.copy(prompt)
        text.cache = copy.deepcopy(prompt.cache)
        text.text = torch.cat([text.text, _words(seed)], 1)
        texts.append(text.write(new // 2))
    return [*texts, prompt.write(2)]


def shared(called: Any, writer: Writer, new: int) -> Tokens:
    """Two texts that go on by turns, from caches that begin with the same tensors."""
    first = Turns(called, writer)
    first.write(10)
    second = copy.copy(first)
    second.cache = _sharing(first.cache)
    second.text = torch.cat([second.text, _words(1)], 1)
    for _ in range(2):
        for text in (first, second):
            text.write(new // 4)
    return [first.text, second.text]


SCENARIOS: dict[str, Scenario] = {
    "greedy": greedy,
    "sampling": sampling,
    "padded": padded,
    "beam": beam,
    "assisted": assisted,
    "lookup": lookup,
    "crop": crop,
    "deepcopy": deepcopied,
    "shared": shared,
    "continue": proceed,
}


def write(called: Any, prompt: dict[str, Any], new: int, **how: Any) -> torch.Tensor:
    """The tokens of one call of `generate`; chance is the same in every call."""
    torch.manual_seed(11)
    how = {"do_sample": False, "max_new_tokens": new, "min_new_tokens": new} | how
    tokens: torch.Tensor = called.generate(**prompt, **how)
    return tokens


class Turns:
    """A text that is written in several calls of `generate`, over one cache.

    Attributes:
        text: so far, (1, S). cache: of all of it but the newest tokens.
    """

    def __init__(self, called: Any, writer: Writer) -> None:
        self.called, self.writer = called, writer
        self.text = writer.prompt()["input_ids"] if not writer.encodes else _words(0)
        self.cache = writer.cache()

    def write(self, new: int) -> torch.Tensor:
        if self.writer.frames:
            return self._write_by_hand(new)
        if self.writer.encodes:
            prompt = self.writer.prompt() | {"decoder_input_ids": self.text}
        else:
            prompt = {"input_ids": self.text, "attention_mask": torch.ones_like(self.text)}
        self.text = write(self.called, prompt | {"past_key_values": self.cache}, new)
        return self.text

    def _write_by_hand(self, new: int) -> torch.Tensor:
        """`generate` of Whisper makes the beginning of the text itself."""
        sound = self.writer.model.get_encoder()(**self.writer.prompt())
        for _ in range(new):
            unread = self.text[:, self.cache.get_seq_length() :]
            how = {"encoder_outputs": sound, "decoder_input_ids": unread, "past_key_values": self.cache}
            logits = self.called(**how).logits
            self.text = torch.cat([self.text, logits[:, -1:].argmax(-1)], 1)
        return self.text


def _words(seed: int) -> torch.Tensor:
    return torch.randint(5, 97, (1, 4), generator=torch.Generator().manual_seed(100 + seed))


def _sharing(cache: Any) -> Any:
    """Another cache of the same tensors."""
    made = copy.copy(cache)
    for name in ("self_attention_cache", "cross_attention_cache"):
        if hasattr(cache, name):
            setattr(made, name, _sharing(getattr(cache, name)))
    if hasattr(cache, "is_updated"):
        made.is_updated = dict(cache.is_updated)
    if "layers" in vars(cache):
        made.layers = [copy.copy(layer) for layer in cache.layers]
    return made
