"""The Python frame that a graph was captured from: calling the graph as the frame does, without its guards.

Dynamo's code for a frame fetches the inputs of the graph, calls it, and then does what is left: it stores
outputs into attributes and builds what the frame returns. `tail_of` makes a function of the second half.

Uses private torch APIs, listed in docs/torch_apis.md. What is not as expected has no tail.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from types import CodeType, FunctionType
from typing import Any

log = logging.getLogger("fxopt")

_COMPILED, _RESUME, _RESULT = "__compiled_fn", "__resume_at", "graph_out"
_STORE = "object_setattr_ignore_descriptor"
_PROLOGUE = {"COPY_FREE_VARS", "MAKE_CELL", "RESUME", "NOP", "PUSH_NULL"}


@dataclass(frozen=True)
class Frame:
    """Where the inputs of a graph come from.

    Attributes:
        code: of the frame, as the user wrote it.
        sources: of each input, the expression that Dynamo has for it.
        sizes, strides: of each input that is a tensor; None for those that are inputs themselves.
    """

    code: CodeType
    sources: Sequence[str]
    sizes: Sequence[Sequence[int | None] | None]
    strides: Sequence[Sequence[int | None] | None]


def entry_of(code: CodeType, function: FunctionType, is_wanted: Callable[[Any], bool]) -> Any:
    """The compiled version of `code` that calls a graph; None where it does more than that.

    Args:
        function: has the code. is_wanted: says of a callable whether it is that of the graph.
    """
    from torch._C._dynamo.eval_frame import _debug_get_cache_entry_list

    for entry in _debug_get_cache_entry_list(code):
        names = [name for name in entry.code.co_names if name.startswith(_COMPILED)]
        if len(names) == 1 and is_wanted(innermost(function.__globals__.get(names[0]))):
            resumes = any(name.startswith(_RESUME) for name in entry.code.co_names)
            return None if resumes else entry
    return None


def innermost(function: Any) -> Any:
    """What torch's wrappers around a callable call."""
    while hasattr(function, "_torchdynamo_orig_callable"):
        function = function._torchdynamo_orig_callable
    return function


def tail_of(
    code: CodeType, function: FunctionType, store: Callable[..., Any] | None = None
) -> Callable[..., Any] | None:
    """What the compiled `code` of `function` does behind the call of its graph.

    Args:
        store: to be called in place of Dynamo's own function that stores an attribute.

    Returns:
        A function of the outputs of the graph, and of the arguments of `function`.
    """
    try:
        return _tail_of(code, function, store)
    except Exception as error:
        log.debug("the end of a compiled frame is not known: %s: %s", type(error).__name__, error)
        return None


def _tail_of(
    code: CodeType, function: FunctionType, store: Callable[..., Any] | None
) -> Callable[..., Any] | None:
    from torch._dynamo.bytecode_transformation import (
        clean_and_assemble_instructions,
        cleaned_instructions,
        get_code_keys,
    )

    instructions = cleaned_instructions(code)
    split = _split(instructions)
    if split is None:
        return None
    start, stop = split
    result = instructions[stop - 1].argval
    head, rest = instructions[start:stop], instructions[stop:]
    stored = {each.argval for each in head if each.opname == "STORE_FAST"} - {result}
    if any(each.argval in stored for each in rest if each.opname.startswith("LOAD_FAST")):
        return None
    if any((each.target in head) != (each in head) for each in instructions if each.target is not None):
        return None  # a jump into what is left away, or out of it
    keys = get_code_keys()
    options = {key: getattr(code, key) for key in keys}
    options["co_varnames"] = (result, *(name for name in code.co_varnames if name != result))
    options["co_argcount"] += 1
    if store is not None:
        rest = [each for found in rest for each in _storing(found, store)]
    _, made = clean_and_assemble_instructions(instructions[:start] + rest, keys, options)
    tail = FunctionType(made, function.__globals__, code.co_name, function.__defaults__, function.__closure__)
    tail.__kwdefaults__ = function.__kwdefaults__
    return tail


def _storing(found: Any, store: Callable[..., Any]) -> list[Any]:
    """`found`, or what leaves `store` in place of Dynamo's own function."""
    from torch._dynamo.bytecode_transformation import create_instruction, create_load_const

    if found.opname != "LOAD_ATTR" or found.argval != _STORE:
        return [found]
    return [create_instruction("POP_TOP"), create_load_const(store, checked=False)]


def _split(instructions: Sequence[Any]) -> tuple[int, int] | None:
    """Where the call of the graph begins, and where its result has been stored."""
    start = next((i for i, each in enumerate(instructions) if each.opname not in _PROLOGUE), 0)
    if instructions[start - 1].opname == "PUSH_NULL":
        start -= 1
    first = next((each for each in instructions[start:] if each.opname != "PUSH_NULL"), None)
    if first is None or first.opname != "LOAD_GLOBAL" or not str(first.argval).startswith(_COMPILED):
        return None
    for place, each in enumerate(instructions[start:], start):
        if each.opname == "STORE_FAST" and str(each.argval).startswith(_RESULT):
            return start, place + 1
    return None
