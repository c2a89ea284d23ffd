"""What is pickled of a cache: its rows, not the room behind them.

A layer of a growing cache holds views of buffers with room for more rows (`fxopt.runtime.kv_state`), and
``torch.save`` writes all memory that a view is of. transformers' layers are therefore given a state in which
such views are copies of their rows, for ``pickle``, ``torch.save`` and ``copy.deepcopy``. Two layers that
share a tensor have one each afterwards.
"""

from __future__ import annotations

import sys
from types import ModuleType
from typing import Any

import torch

_OURS = "_fxopt_state"


def extend_cache_layers(module: ModuleType) -> str:
    """Give the layers of `transformers.cache_utils` that state; says what was done."""
    kind: Any = getattr(module, "CacheLayerMixin", None)
    if kind is None:
        return "not done: this transformers has other layers; saved caches are as large as their memory"
    if "__getstate__" in vars(kind) or "__copy__" in vars(kind):
        ours = hasattr(kind.__getstate__, _OURS)
        return "done" if ours else "not done: this transformers saves layers in its own way"
    kind.__getstate__, kind.__copy__ = _state, _copy
    return "done"


def _state(layer: Any) -> dict[str, Any]:
    kv_state = sys.modules.get("fxopt.runtime.kv_state")
    if kv_state is None:  # nothing has grown yet
        return dict(vars(layer))
    rows = kv_state.STATE.without_room
    return {name: rows(each) if type(each) is torch.Tensor else each for name, each in vars(layer).items()}


setattr(_state, _OURS, True)


def _copy(layer: Any) -> Any:
    """``copy.copy`` of a layer shares its tensors."""
    made: Any = object.__new__(type(layer))
    vars(made).update(vars(layer))
    return made
