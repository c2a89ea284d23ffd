"""The loss of rows of logits, and its gradients, a few rows at a time: no logits of all rows are made.

    z = cap * tanh(scale * (h W^T + b) / cap), or scale * (h W^T + b)
    loss = (1 - s) * (log(sum(exp(z))) - z[target]) + s * (log(sum(exp(z))) - mean(z))
    dloss/dz = softmax(z) - (1 - s) * onehot(target) - s / V

    hidden    (N, H)
    weight    (V, H), and bias (V,) or None
    target    (N,) int64; rows whose target is `ignore_index` have no loss and no gradient
    factor    (N,): gradients are those of sum(factor * loss); None is 1 for all

Plain torch, on any device. Source of the label smoothing s: Szegedy et al., "Rethinking the Inception
Architecture for Computer Vision", 2016, section 7.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch

aten = torch.ops.aten

Rows = slice | torch.Tensor
Result = tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]

# Measured on one core, float32, hidden sizes 256 and 768, vocabulary 32000: with 128 rows the products take
# 1.07 times as long as with 256, with 32 rows 1.4 times. More than 256 gain nothing.
CHUNK_BYTES, FEWEST_ROWS = 2**25, 128
# Each chunk adds to the gradient of the weight: on a CPU it may take a quarter of that gradient's memory.
# With a hidden size of 2048, 512 rows take 0.94 times as long as 256.
SHARE_OF_WEIGHT = 4
# Shares of most words are too small for float16; the largest is 1.
LIFT = 2.0**10


@dataclass(frozen=True)
class Loss:
    """What is computed of a row.

    Attributes:
        scale: of the logits. softcap: 0 is none. dtype: of logits and loss, float32 or float64.
    """

    ignore_index: int
    label_smoothing: float
    scale: float
    softcap: float
    dtype: torch.dtype


@dataclass(frozen=True)
class Operands:
    """See the top of the file."""

    hidden: torch.Tensor
    weight: torch.Tensor
    bias: torch.Tensor | None
    target: torch.Tensor


@dataclass(frozen=True)
class Wanted:
    """Whose gradients are to be computed."""

    hidden: bool = False
    weight: bool = False
    bias: bool = False

    def __bool__(self) -> bool:
        return self.hidden or self.weight or self.bias


def in_chunks(given: Operands, loss: Loss, wanted: Wanted, factor: torch.Tensor | None = None) -> Result:
    """(losses, gradients of hidden, weight and bias), all of `loss.dtype`; empty is what is not wanted.

    Raises:
        RuntimeError: a target is no index of the vocabulary.
    """
    chunks = _Chunks(given, loss, wanted)
    for rows in _live_rows(given.target, loss.ignore_index, chunks.size):
        chunks.add(rows, None if factor is None else factor[rows].to(loss.dtype))
    return chunks.losses, chunks.of_hidden, chunks.of_weight, chunks.of_bias


def product_dtype(hidden: torch.Tensor, loss: Loss) -> torch.dtype:
    """What matrices are multiplied in.

    A CPU that emulates bfloat16 takes 5 to 100 times as long as for float32 (torch 2.13, AVX2).
    """
    native = hidden.dtype is torch.bfloat16 and _multiplies_bfloat16()
    return hidden.dtype if hidden.device.type != "cpu" or native else loss.dtype


@functools.cache
def _multiplies_bfloat16() -> bool:
    capabilities: dict[str, Any] = getattr(torch.cpu, "get_capabilities", dict)()
    return any(capabilities.get(name) for name in ("avx512_bf16", "amx_bf16"))


def _live_rows(target: torch.Tensor, ignore_index: int, size: int) -> Iterator[Rows]:
    """Chunks of the rows that count; of all rows on an accelerator, as counting would wait for it."""
    count = target.shape[0]
    if target.device.type == "cpu":
        live = (target != ignore_index).nonzero().squeeze(1)
        if live.shape[0] < count:
            yield from live.split(size) if live.shape[0] else ()
            return
    for first in range(0, count, size):
        yield slice(first, min(first + size, count))


class _Chunks:
    """The results so far, and memory for one chunk of logits and their softmax."""

    def __init__(self, given: Operands, loss: Loss, wanted: Wanted) -> None:
        self.given, self.loss, self.wanted = given, loss, wanted
        count, vocabulary = given.hidden.shape[0], given.weight.shape[0]
        fitting = CHUNK_BYTES // max(1, vocabulary * loss.dtype.itemsize)
        beside = given.hidden.shape[1] // SHARE_OF_WEIGHT if given.hidden.device.type == "cpu" else 0
        self.size = max(1, min(count, max(FEWEST_ROWS, fitting, beside)))
        self.product = product_dtype(given.hidden, loss)
        self.weight = given.weight.to(self.product)
        buffers = given.hidden.new_empty(2, self.size, vocabulary, dtype=loss.dtype)
        self.logits, self.share = buffers[0], buffers[1]
        self.losses = given.hidden.new_zeros(count, dtype=loss.dtype)
        self.of_hidden = self._zeros(given.hidden, asked=wanted.hidden)
        self.of_weight = self._zeros(given.weight, asked=wanted.weight)
        self.of_bias = self._zeros(given.bias, asked=wanted.bias)

    def _zeros(self, like: torch.Tensor | None, *, asked: bool) -> torch.Tensor:
        if like is None or not asked:
            return self.losses.new_empty(0)
        return torch.zeros_like(like, dtype=self.loss.dtype)

    def add(self, rows: Rows, factor: torch.Tensor | None) -> None:
        """Take one chunk of rows. Args: factor: theirs."""
        hidden, target = self.given.hidden[rows].to(self.product), self.given.target[rows].unsqueeze(1)
        live = target != self.loss.ignore_index
        target = target.where(live, 0)
        logits = self._logits(hidden)
        share = aten._softmax.out(logits, -1, False, out=self.share[: len(logits)])
        self.losses[rows] = _losses(logits, share, target, self.loss).where(live, 0.0).squeeze(1)
        if self.wanted:
            weighed = live.to(share.dtype) if factor is None else live * factor.unsqueeze(1)
            _to_gradient(share, logits, target, weighed, self.loss)
            self._add_gradients(rows, share, hidden, lift=factor is None)

    def _logits(self, hidden: torch.Tensor) -> torch.Tensor:
        loss = self.loss
        logits = self.logits[: len(hidden)]
        if self.product is logits.dtype:
            torch.mm(hidden, self.weight.mT, out=logits)
        else:
            logits.copy_(_product(hidden, self.weight.mT, logits.dtype))
        if self.given.bias is not None:
            logits.add_(self.given.bias)
        if loss.softcap:
            return logits.mul_(loss.scale / loss.softcap).tanh_().mul_(loss.softcap)
        return logits if loss.scale == 1.0 else logits.mul_(loss.scale)

    def _add_gradients(self, rows: Rows, share: torch.Tensor, hidden: torch.Tensor, *, lift: bool) -> None:
        """Args: share: the gradient of the logits. lift: it is small enough to be multiplied by `LIFT`."""
        if self.wanted.bias:
            self.of_bias.add_(share.sum(0))
        factor = LIFT if lift and self.product is torch.float16 else 1.0
        narrow = (share if factor == 1.0 else share.mul_(factor)).to(self.product)
        if self.wanted.hidden:
            self.of_hidden[rows] = _product(narrow, self.weight, share.dtype).to(share.dtype).div_(factor)
        if not self.wanted.weight:
            return
        if self.product is share.dtype:
            self.of_weight.addmm_(narrow.mT, hidden)
        else:
            self.of_weight.add_(_product(narrow.mT, hidden, share.dtype), alpha=1.0 / factor)


def _product(a: torch.Tensor, b: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """The matrix product, in `dtype` where that costs nothing."""
    direct = a.dtype is dtype or a.device.type != "cuda"
    found: torch.Tensor = torch.mm(a, b) if direct else torch.mm(a, b, out_dtype=dtype)
    return found


def _losses(logits: torch.Tensor, share: torch.Tensor, target: torch.Tensor, loss: Loss) -> torch.Tensor:
    """(rows, 1). The largest logit is subtracted first: the loss of a sure row is far smaller than that."""
    largest = logits.amax(1, keepdim=True)
    below = largest - logits.gather(1, target)
    if loss.label_smoothing:
        smooth = loss.label_smoothing
        below = (1.0 - smooth) * below + smooth * (largest - logits.mean(1, keepdim=True))
    # The largest share is 1 / sum(exp(z - largest)).
    return below - share.amax(1, keepdim=True).log()


def _to_gradient(
    share: torch.Tensor, logits: torch.Tensor, target: torch.Tensor, factor: torch.Tensor, loss: Loss
) -> None:
    """Make of the softmax `share` the gradient before softcap and scale. `logits` is spent.

    Args:
        factor: (rows, 1), of the losses; 0 for those that are ignored.
    """
    smooth = loss.label_smoothing
    share.scatter_(1, target, share.gather(1, target) - (1.0 - smooth))
    if smooth:
        share.sub_(smooth / share.shape[1])
    if loss.softcap:
        share.mul_(logits.div_(loss.softcap).square_().neg_().add_(1.0))
    share.mul_(factor if loss.scale == 1.0 else factor * loss.scale)
