"""Which way to compute ``fxopt::attention`` is the right one, and the fastest, for a call."""

from __future__ import annotations

import functools

import torch
from torch import fx

from fxopt.ir.bounds import read_share
from fxopt.ir.contract import Verdict
from fxopt.ir.cost import hint
from fxopt.ir.facts import Facts, argument, val
from fxopt.ir.ops.masking import NAN, NONE, ZERO, row_blocks
from fxopt.ir.ops.tiles import with_sizes
from fxopt.ir.program import MaskProgram

# Below these numbers of scores per head (Sq * Skv) the host's own fusion of product, softmax and product
# beats the CPU flash kernel, whose forward has a fixed cost and whose backward recomputes the scores.
# Measured on one core, float32, D = 16..64, H = 4..8: forward 0.84x at 16^2, 1.0x at 64^2, 1.2x at 128^2;
# with backward 0.87x at 128^2, 1.04x at 512^2.
FLASH_FORWARD_SCORES = 64 * 64
FLASH_BACKWARD_SCORES = 256 * 256
# Measured on one core: below, calls of the kernel cost more than the keys that they skip.
LEAST_SCORES = 96 * 96
LARGEST_SHARE = 0.8


def blocks_pay(node: fx.Node, facts: Facts) -> Verdict:
    """Whether tiles, which skip keys that no query sees, beat whatever computes all scores."""
    query, key = val(node.args[0]), val(node.args[1])
    if query.device.type != "cpu":
        return Verdict.no(f"on {query.device.type} fused kernels read the mask")
    if not argument(node, "mask") and argument(node, "attn_mask") is not None:
        return Verdict.no("no formula of the mask is known")
    flash = flash_has_it(node)
    if flash and not argument(node, "mask"):
        return Verdict.no("the CPU's kernel knows this mask")
    rows, columns = hint(query.shape[-2]), hint(key.shape[-2])
    if rows * columns < LEAST_SCORES:
        return Verdict.no(f"{rows} x {columns} scores per head, blocks pay from {LEAST_SCORES}")
    tasks, threads = hint(query.shape[0]) * hint(query.shape[1]), torch.get_num_threads()
    if tasks < threads:
        return Verdict.no(f"{tasks} heads keep no more than {tasks} of {threads} threads busy")
    share = share_read(node, rows, columns)
    if share > LARGEST_SHARE:
        return Verdict.no(f"blocks would read {share:.0%} of the scores, pay below {LARGEST_SHARE:.0%}")
    return Verdict.yes(f"blocks read {share:.0%} of {rows} x {columns} scores per head")


def flash_has_it(node: fx.Node) -> bool:
    """Scores that are scaled and masked, and nothing else."""
    same_width = val(node.args[0]).shape[-1] == val(node.args[2]).shape[-1]
    others = ("score", "sinks", "dropout_p", "wide_scores")
    return same_width and not any(_given(node, name) for name in others)


def _given(node: fx.Node, name: str) -> bool:
    found = argument(node, name)
    return isinstance(found, fx.Node) or bool(found)


def share_read(node: fx.Node, rows: int, columns: int) -> float:
    """The part of all scores that blocks compute, from the formula of the mask and the sizes seen so far."""
    text = argument(node, "mask") or ("k <= q" if argument(node, "is_causal") else "True")
    sizes = tuple(hint(val(each)) for each in argument(node, "sizes") or ())
    return _share(text, sizes, rows, columns)


@functools.lru_cache(maxsize=64)
def _share(text: str, sizes: tuple[int, ...], rows: int, columns: int) -> float:
    return read_share(with_sizes(MaskProgram.parse(text), sizes), row_blocks(rows), columns)


def decomposed_wins(node: fx.Node, facts: Facts) -> Verdict:
    """Where the decomposed form is the faster one, or the only one with the right answer."""
    query, key, mask = val(node.args[0]), val(node.args[1]), val(argument(node, "attn_mask"))
    if argument(node, "dead_rows") == NAN:
        return Verdict.yes("a row of -inf gives NaN, as softmax does; kernels give 0")
    if argument(node, "mask_replaces") and facts.differentiates(node):
        return Verdict.yes("filled scores get no gradient; kernels give them one in rows of nothing else")
    if query.dtype is torch.float16 and mask is not None and argument(node, "dead_rows") == NONE:
        return Verdict.yes(
            "kernels add masks in float32, where float16's lowest number does not absorb a score"
        )
    if argument(node, "dead_rows") == ZERO:
        return Verdict.no("written as scaled_dot_product_attention, whose rounding is kept")
    if query.device.type != "cpu":
        return Verdict.no(f"device {query.device.type} has fused kernels")
    if argument(node, "dropout_p"):
        return Verdict.yes("the CPU has no fused kernel with dropout")
    scores = hint(query.shape[-2]) * hint(key.shape[-2])
    limit = FLASH_BACKWARD_SCORES if facts.differentiates(node) else FLASH_FORWARD_SCORES
    if scores < limit:
        return Verdict.yes(f"{scores} scores per head, flash pays from {limit}")
    return Verdict.no(f"{scores} scores per head, decomposed pays below {limit}")
