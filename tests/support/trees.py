"""Outputs of models as flat lists: every tensor and constant of a nested result, named by the path to it."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch

Constant = bool | int | float | complex | str | None


def leaves(tree: object, path: str = "out") -> Iterator[tuple[str, torch.Tensor | Constant]]:
    """Yield (path, leaf) for tensors and plain constants in dicts, sequences, model outputs, caches and
    objects.

    The order is the order of the containers, so two results of one computation give the same paths.
    """
    yield from _walk(tree, path, frozenset())


def _walk(tree: object, path: str, seen: frozenset[int]) -> Iterator[tuple[str, torch.Tensor | Constant]]:
    if isinstance(tree, torch.Tensor) or tree is None or isinstance(tree, bool | int | float | complex | str):
        yield path, tree
        return
    if id(tree) in seen or isinstance(tree, torch.dtype | torch.device | type) or callable(tree):
        return
    seen |= {id(tree)}
    for step, child in _children(tree):
        yield from _walk(child, path + step, seen)


def _children(tree: object) -> list[tuple[str, object]]:
    if isinstance(tree, Mapping):
        return [
            (f".{key}" if str(key).isidentifier() else f"[{key!r}]", value) for key, value in tree.items()
        ]
    if isinstance(tree, list | tuple):
        return [(f"[{index}]", value) for index, value in enumerate(tree)]
    if dataclasses.is_dataclass(tree):
        return [(f".{field.name}", getattr(tree, field.name)) for field in dataclasses.fields(tree)]
    # A cache is a plain object: its tensors are attributes of it and of its layers.
    return [(f".{name}", value) for name, value in vars(tree).items()] if hasattr(tree, "__dict__") else []


def skeleton(tree: object) -> list[tuple[str, str]]:
    """Each leaf's path and each container's type, to compare the structure of two results."""
    kinds = [
        (path, "tensor" if isinstance(leaf, torch.Tensor) else type(leaf).__name__)
        for path, leaf in leaves(tree)
    ]
    return kinds + sorted(_containers(tree, "out", frozenset()))


def _containers(tree: object, path: str, seen: frozenset[int]) -> Iterator[tuple[str, str]]:
    if isinstance(tree, Mapping | list | tuple) and id(tree) not in seen:
        yield path, type(tree).__name__
        for step, child in _children(tree):
            yield from _containers(child, path + step, seen | {id(tree)})


def map_tensors(function: Callable[[torch.Tensor], torch.Tensor], tree: Any) -> Any:
    """A copy of a nest of dicts, lists and tuples with `function` applied to each tensor; others are kept."""
    if isinstance(tree, torch.Tensor):
        return function(tree)
    if isinstance(tree, dict):
        return {key: map_tensors(function, value) for key, value in tree.items()}
    if isinstance(tree, tuple) and hasattr(tree, "_fields"):
        return type(tree)(*(map_tensors(function, value) for value in tree))
    if isinstance(tree, list | tuple):
        return type(tree)(map_tensors(function, value) for value in tree)
    return tree


def aliases(tree: object) -> set[frozenset[str]]:
    """Groups of paths whose tensors share a storage."""
    groups: dict[int, set[str]] = {}
    for path, leaf in leaves(tree):
        if isinstance(leaf, torch.Tensor) and leaf.layout is torch.strided and leaf.numel() > 0:
            groups.setdefault(leaf.untyped_storage().data_ptr(), set()).add(path)
    return {frozenset(paths) for paths in groups.values() if len(paths) > 1}
