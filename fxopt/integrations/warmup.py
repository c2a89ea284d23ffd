"""Compile what `generate` needs before the first request comes."""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import torch
from torch._dynamo.eval_frame import OptimizedModule

from fxopt.errors import CannotGenerate, OptionValueError
from fxopt.integrations.generate import options_of
from fxopt.report.record import collect

# Tokens to generate: the step behind the prompt is compiled for its length, the next one for all lengths.
_NEW = 4


def warmup(
    model: Any,
    *,
    batch_sizes: Iterable[int] | int = (1,),
    max_length: int = 512,
    padded: bool = True,
    **how: Any,
) -> int:
    """Run `generate` on made-up prompts, so that requests of these kinds find everything compiled.

    Sizes become symbols when they change for the first time: two lengths of prompts stand for all others. A
    batch of one sequence is a kind of its own, and so is every other size until a second one has been seen.
    Prompts that are shorter than a model's window, and fill it while they are answered, are of another kind
    than longer ones. All come with an `attention_mask`, as tokenizers give it; models with an encoder need
    other graphs without one.

    Args:
        model: with a `generate`, and compiled with fxopt: ``torch.compile(model, backend="fxopt")``, or
            behind ``model.compile(backend="fxopt")``.
        batch_sizes: numbers of sequences to prepare for, or one.
        max_length: tokens of the longest sequence, prompt and answer.
        padded: prepare for prompts of different lengths in a batch too, which need a mask.
        how: further arguments of `generate`, as requests will have them.

    Returns:
        The number of graphs that were compiled. It is 0, with a warning, for a model that is not compiled
        with fxopt.

    Raises:
        CannotGenerate: `model` has no `generate`.
        OptionValueError: a batch size below 1, or a `max_length` without room for a prompt.
    """
    from rich.progress import track

    if not callable(getattr(model, "generate", None)):
        raise CannotGenerate(kind=type(model).__name__)
    sizes = _checked(batch_sizes, max_length)
    cases = list(_cases(sizes, max_length, _window(model), padded))
    with collect(private=True) as records:
        for size, length, pad in track(cases, "warming up", transient=True):
            _generate(model, size, length, pad, how)
    if not records and not _may_be_compiled(model, how):
        warnings.warn(_NOT_COMPILED.format(name=type(model).__name__), stacklevel=2)
    return len(records)


_NOT_COMPILED = (
    "fxopt.warmup: {name} is not compiled with fxopt, so nothing was prepared. Give it "
    'torch.compile(model, backend="fxopt"), or call model.compile(backend="fxopt") first.'
)


def _may_be_compiled(model: Any, how: dict[str, Any]) -> bool:
    """False where no call of the model can reach fxopt."""
    if isinstance(model, OptimizedModule):
        return options_of(getattr(model.dynamo_ctx, "callback", None)) is not None
    config = how.get("generation_config") or getattr(model, "generation_config", None)
    if how.get("compile_config") or getattr(config, "compile_config", None):
        return True
    return not isinstance(model, torch.nn.Module) or any(
        isinstance(module, OptimizedModule) or module._compiled_call_impl or "forward" in vars(module)
        for module in model.modules()
    )


def _cases(sizes: Sequence[int], longest: int, window: int, padded: bool) -> Iterator[tuple[int, int, bool]]:
    """The size of the batch, the length of the prompt, and whether it is padded, of each request."""
    lengths = [longest // 2 - _NEW, longest - _NEW]
    if _NEW < window < longest:
        lengths.append(window - _NEW // 2)
    for size in sizes:
        for pad in (False, True) if padded and size > 1 else (False,):
            yield from ((size, length, pad) for length in lengths)


def _window(model: Any) -> int:
    """How many tokens its layers with windows see; 0 without such layers."""
    config: Any = getattr(model, "config", None)
    if hasattr(config, "get_text_config"):
        config = config.get_text_config(decoder=True)
    kinds = getattr(config, "layer_types", None)
    if kinds is not None and "sliding_attention" not in kinds:
        return 0
    return getattr(config, "sliding_window", None) or 0


def _checked(batch_sizes: Iterable[int] | int, max_length: int) -> Sequence[int]:
    sizes = list(batch_sizes) if isinstance(batch_sizes, Iterable) else [batch_sizes]
    if not sizes or any(not isinstance(size, int) or size < 1 for size in sizes):
        raise OptionValueError(
            name="batch_sizes", value=sizes, nearest="", valid="one or more integers from 1 on"
        )
    if max_length < 4 * _NEW:
        raise OptionValueError(
            name="max_length", value=max_length, nearest="", valid=f"integers from {4 * _NEW} on"
        )
    return sizes


def _generate(model: Any, size: int, length: int, pad: bool, how: dict[str, Any]) -> None:
    ids = torch.ones(size, length, dtype=torch.int64, device=model.device)
    mask = torch.ones_like(ids)
    if pad:
        mask[0, : length // 2] = 0
    limits = {"max_new_tokens": _NEW, "min_new_tokens": _NEW}
    model.generate(input_ids=ids, attention_mask=mask, **({"do_sample": False} | how | limits))
