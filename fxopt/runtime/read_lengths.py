"""Lengths of what a text is written from: Dynamo is told, before it compiles for one, that there are others.

Dynamo compiles for the sizes that it sees and, when it meets another one, for all sizes. The keys and values
of an encoder's output, its mask and the output itself are as long as what was read, in all steps of one text.
So with the second text all graphs of a decoder would be compiled once more.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

import torch

# Of the current call of generate; None outside of one.
_lengths: ContextVar[set[int] | None] = ContextVar("fxopt_read_lengths", default=None)
# The dimension of tokens in arguments of models: batches come first.
_TOKENS = 1
_MARK = "_dynamo_propagated_dynamic_indices"


@contextmanager
def reading() -> Iterator[None]:
    """One call of generate."""
    token = _lengths.set(set())
    try:
        yield
    finally:
        _lengths.reset(token)


def is_any_length(tensor: torch.Tensor, dim: int) -> None:
    """Have what Dynamo compiles for this tensor be for all its sizes along `dim`.

    Dynamo does not guard on this mark: what was compiled for tensors without it fits.
    """
    setattr(tensor, _MARK, {dim})


def has_been_read(rows: torch.Tensor, dim: int) -> None:
    """What a graph has made of all that was read: along `dim` it is as long as that."""
    lengths = _lengths.get()
    if lengths is not None:
        is_any_length(rows, dim)
        lengths.add(rows.shape[dim])


class OfAnyLength:
    """During one call of a model, its arguments that are as long as what was read are marked.

    A class: it is entered at every token, and a generator would take nearly twice as long.
    """

    def __init__(self, arguments: Mapping[str, Any]) -> None:
        lengths = _lengths.get()
        self._found = [
            each
            for each in _tensors(arguments.values() if lengths else ())
            if each.dim() > _TOKENS and each.shape[_TOKENS] in (lengths or ()) and not hasattr(each, _MARK)
        ]

    def __enter__(self) -> None:
        for each in self._found:
            is_any_length(each, _TOKENS)

    def __exit__(self, *error: object) -> None:
        for each in self._found:
            delattr(each, _MARK)


def _tensors(values: Iterable[Any]) -> Iterator[torch.Tensor]:
    """Those in arguments, and in outputs of models that are arguments."""
    for value in values:
        if isinstance(value, torch.Tensor):
            yield value
        elif isinstance(value, Mapping):
            yield from _tensors(value.values())
