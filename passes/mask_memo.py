"""What was found out about a mask, kept with it: layers share their mask, and passes ask several times."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

from torch import fx

from fxopt.ir.facts import val
from fxopt.ir.linear import Unsupported

T = TypeVar("T")


def kept_outcome(name: str, mask: fx.Node, attention: fx.Node, find: Callable[[], T]) -> T:
    """What `find` returns for this mask over Q and K of these shapes; or the Unsupported that it raised."""
    # A copy of a node copies what is kept with it, hence the node itself in the key.
    key = (mask, *(str(val(arg).shape) for arg in attention.args[:2]))
    kept = mask.meta.get(name)
    if kept is None or kept[0] != key or _is_stale(kept[1]):
        kept = mask.meta[name] = (key, _outcome(find))
    if isinstance(kept[1], Unsupported):
        raise kept[1]
    outcome: T = kept[1]
    return outcome


def _is_stale(outcome: object) -> bool:
    """A mask of activations is made of an attention of the layer before, which a pass may have replaced."""
    return any(node._erased for node in getattr(outcome, "made_by", ()))


def _outcome(find: Callable[[], T]) -> T | Unsupported:
    try:
        return find()
    except Unsupported as refusal:
        return refusal
