"""What of libraries may be faster than fxopt's product: measured once per process, on a processor."""

from __future__ import annotations

import time
from collections.abc import Callable

import torch

from fxopt.ir.sources.found import Found

# Numbers of tokens at which both are timed: a step of decoding, and one of several sequences.
TOKENS = (1, 16)
_RUNS = 4
_measured: dict[tuple[str, str, torch.dtype], tuple[float, float]] = {}

Product = Callable[[torch.Tensor], torch.Tensor]


def faster_rival(name: str, rival: Product, found: Found, dtype: torch.dtype) -> str | None:
    """Why the library's op stays: it took less time in sum than fxopt's product did; None where it did not.

    Args:
        name: of the op, or of the class of the module. rival: it, as a function of x (M, K). dtype: of x.
    """
    weight = found.weight
    if weight.device.type != "cpu":
        return None
    key = (name, weight.format.name, dtype)
    if key not in _measured:
        _measured[key] = _sum(rival, weight.in_features, dtype), _sum(_own(found), weight.in_features, dtype)
    theirs, own = _measured[key]
    return None if own <= theirs else f"{name} took {theirs / own:.2f}x the time of fxopt's product"


def _own(found: Found) -> Product:
    weight = found.weight
    parts = (weight.codes, weight.scales, weight.offsets, weight.columns)
    kinds = {"format": weight.format.name, "group_size": weight.group_size, "activation": found.activation}
    return lambda x: torch.ops.fxopt.packed_linear(x, *parts, None, **kinds)


def _sum(product: Product, features: int, dtype: torch.dtype) -> float:
    """Seconds for all `TOKENS`, the best of a few runs each."""
    total = 0.0
    for count in TOKENS:
        x = torch.ones(count, features, dtype=dtype)
        taken = []
        for _ in range(_RUNS):
            start = time.perf_counter()
            product(x)
            taken.append(time.perf_counter() - start)
        total += min(taken)
    return total
