"""Making a `DecodeStep` of a step that went the slow way."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from types import FunctionType
from typing import Any

import torch

from fxopt.runtime.decode_step import DecodeStep, Inputs, ambient, counts_are_exact, size_checks
from fxopt.runtime.frames import Frame
from fxopt.runtime.kv_calls import GrowingCall
from fxopt.runtime.relied import Unknown
from fxopt.runtime.step_loops import Loops
from fxopt.runtime.step_numbers import NAME, Numbers, numbers_of
from fxopt.runtime.watched import Site, Watched


@dataclass
class Graph:
    """What is the same for all steps that call one graph: see `DecodeStep`."""

    call: GrowingCall
    guards: Any
    tail: Callable[..., Any]
    loops: Loops
    relied: Callable[[], bool] | None = None


@dataclass
class Seen:
    """One step that went the slow way.

    Attributes:
        sites: where the caches are held. counts: likewise the integers that it changes, by their sources.
        content: of what is watched, without these.
    """

    call: GrowingCall
    watched: Watched
    sites: list[Site]
    counts: dict[str, Site]
    content: list[list[tuple[Any, int]]]


def scope_of(function: FunctionType, model: Any, kwargs: Mapping[str, Any]) -> dict[str, Any]:
    """`L` and `G`, the local and global variables of the frame, as Dynamo's sources call them."""
    bound = _signature(function).bind(model, **kwargs)
    bound.apply_defaults()
    closure = zip(function.__code__.co_freevars, function.__closure__ or (), strict=True)
    local = {**{name: cell.cell_contents for name, cell in closure}, **bound.arguments}
    return {"L": local, "G": function.__globals__}


def _signature(function: FunctionType) -> inspect.Signature:
    """That of the code itself, whatever decorators say about it."""
    bare = FunctionType(function.__code__, {}, "", function.__defaults__, function.__closure__)
    bare.__kwdefaults__ = function.__kwdefaults__
    return inspect.signature(bare)


def _variables(function: FunctionType) -> list[str]:
    """Parameters, and what the function has from around it."""
    return [*_signature(function).parameters, *function.__code__.co_freevars]


def step_of(
    model: Any, graph: Graph, seen: Seen, frame: Frame, inputs: Sequence[Any],
    kwargs: Mapping[str, Any], roots: dict[str, Any],
) -> DecodeStep:  # fmt: skip
    call, dim = seen.call, seen.call.appends[0].dim
    sources = {source: place for place, source in enumerate(frame.sources)}
    parameters = list(_signature(type(model).forward).parameters.values())
    rest = next((each.name for each in parameters if each.kind is each.VAR_KEYWORD), "")
    own: dict[str, str] = {}
    for name in kwargs:
        own |= {f"L['{name}']": name, f"L['{rest}']['{name}']": name}
    users = [
        (sources[source], name) for source, name in own.items() if source in sources and name not in roots
    ]
    if len(users) != len(kwargs) - len(roots):
        raise Unknown("an argument is no input of the graph")
    if len({(append.dim, append.new) for append in call.appends}) != 1 or not counts_are_exact():
        raise Unknown("caches that grow in different ways")
    numbers = numbers_of(call, frame, inputs, seen.counts)
    replaced = _replacements(frame, call, users, inputs) | numbers.texts()
    # Numbers among the arguments, which are compared at each step, can be inputs of the graph, too.
    replaced |= {source: str(roots[name]) for source, name in own.items() if type(roots.get(name)) is int}
    found = _inputs(call, users, frame, inputs, replaced, numbers)
    given = {*(name for _, name in users), rest}
    steady = ["G[", *(source for source, name in own.items() if name in roots)]
    steady += [f"L['{name}']" for name in _variables(type(model).forward) if name not in given]
    names = [NAME, *(f"_tensor{number}" for number in range(len(users)))]
    pasts = [held[name] for held, name in seen.sites]
    tensors = _checked(pasts, call, [kwargs[name] for _, name in users], users, frame, found.ids)
    if graph.relied is None:
        raise Unknown("what the guards look at")
    sizes = size_checks(
        graph.guards, replaced, names, steady, [frame.sources[place] for place in call.places]
    )
    loops = graph.loops
    forms = loops.forms(found.fixed, -1), loops.forms(pasts, dim)
    return DecodeStep(
        call=call, inputs=found, tail=graph.tail, model=model, same=roots,
        numbers=numbers, dicts=[held for held, _ in seen.sites], names=[name for _, name in seen.sites],
        watched=seen.watched, relied=graph.relied, ambient=ambient(), sizes=sizes, tensors=tensors,
        loops=loops, forms=forms,
    )  # fmt: skip


def _checked(
    pasts: Sequence[torch.Tensor], call: GrowingCall, given: Sequence[torch.Tensor],
    users: Sequence[tuple[int, str]], frame: Frame, fixed: frozenset[int],
) -> Any:  # fmt: skip
    """Guards of the arguments that are tensors, if these and the caches are as the graph was compiled for."""
    current, places = [*pasts, *given], [place for place, _ in users]
    holds = _tensor_guards(current, frame, [*call.places, *places]).check(*current)
    if not holds or not fixed.isdisjoint(map(id, current)):
        raise Unknown("tensors that share objects")
    return _tensor_guards(given, frame, places)


def _tensor_guards(tensors: Sequence[torch.Tensor], frame: Frame, places: Sequence[int]) -> Any:
    """Checks sizes, strides, dtype and device of tensors that are inputs at `places`."""
    from torch._C._dynamo.guards import TensorGuards

    sizes: Any = [list(frame.sizes[place] or ()) for place in places]
    strides: Any = [list(frame.strides[place] or ()) for place in places]
    return TensorGuards(*tensors, dynamic_dims_sizes=sizes, dynamic_dims_strides=strides)


def _replacements(
    frame: Frame, call: GrowingCall, users: Sequence[tuple[int, str]], inputs: Sequence[Any]
) -> dict[str, str]:
    """How sources are written in `size_checks` that do not change, and those of arguments."""
    found: dict[str, str] = {}
    for place, append in zip(call.places, call.appends, strict=True):
        source, tensor = frame.sources[place], inputs[place]
        for dim in range(tensor.dim()):
            if dim != append.dim:
                found[f"{source}.size()[{dim}]"] = str(tensor.shape[dim])
            found[f"{source}.stride()[{dim}]"] = str(tensor.stride(dim))
        found[f"{source}.storage_offset()"] = str(tensor.storage_offset())
    for number, (place, _) in enumerate(users):
        found[frame.sources[place]] = f"_tensor{number}"
    changing = {*call.places, *(place for place, _ in users)}
    for place, (sizes, tensor) in enumerate(zip(frame.sizes, inputs, strict=False)):
        # What was read, such as an encoder's output: as long as the text lasts, these are the same numbers.
        if place not in changing and isinstance(tensor, torch.Tensor) and None in (sizes or ()):
            for dim, size in enumerate(tensor.shape):
                found[f"{frame.sources[place]}.size()[{dim}]"] = str(size)
                found[f"{frame.sources[place]}.stride()[{dim}]"] = str(tensor.stride(dim))
    return found


def _inputs(
    call: GrowingCall, users: Sequence[tuple[int, str]], frame: Frame, inputs: Sequence[Any],
    replaced: Mapping[str, str], numbers: Numbers,
) -> Inputs:  # fmt: skip
    template: list[Any] = list(inputs)
    dynamic = {*call.places, *(place for place, _ in users)}
    lengths, sizes = [], []
    for place, value in enumerate(inputs):
        source = frame.sources[place]
        if place in dynamic or isinstance(value, torch.Tensor):
            continue
        if not isinstance(value, int) or not source:
            raise Unknown(f"an input {source}")
        if source in numbers.places:
            lengths.append((place, numbers.places[source]))
        elif source not in replaced:
            sizes.append((place, *_size_of(source, users, frame)))
    for place in dynamic:
        template[place] = None
    fixed = [value for value in template if isinstance(value, torch.Tensor)]
    return Inputs(template, fixed, list(users), lengths, sizes, frozenset(map(id, fixed)))


def _size_of(source: str, users: Sequence[tuple[int, str]], frame: Frame) -> tuple[int, int]:
    """Which argument `source` is a size of, and in which dimension."""
    base, _, dim = source.partition(".size()[")
    for number, (place, _) in enumerate(users):
        if frame.sources[place] == base and dim[:-1].isdigit():
            return number, int(dim[:-1])
    raise Unknown(f"an input {source}")
