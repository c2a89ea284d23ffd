"""A product of activations with a static weight: what is read of it before it is replaced."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import fx

from fxopt.ir.sources.found import Found


@dataclass(frozen=True)
class Site:
    """A product x @ w^T + bias, and what makes w.

    Attributes:
        root: the node that is replaced. x: (..., K). bias: (N,), or None.
        weights: static nodes that w is made of.
        convert: their values -> the weight.
        key: names `convert` and what else decides its result.
        rival: the library's own product, of the weights' values and x, where it may be the faster one.
        computed: what x is cast to; None for its own dtype.
        finish: adds to a graph, of fxopt's product, what gives the value of the root; None: it is that.
    """

    root: fx.Node
    x: fx.Node
    bias: fx.Node | None
    weights: tuple[fx.Node, ...]
    convert: Callable[[Sequence[torch.Tensor]], Found]
    key: object
    rival: Callable[[Sequence[torch.Tensor], torch.Tensor], torch.Tensor] | None = None
    computed: torch.dtype | None = None
    finish: Callable[[fx.Graph, fx.Node], fx.Node] | None = None
