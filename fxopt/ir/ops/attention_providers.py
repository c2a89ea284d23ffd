"""Which way to compute ``fxopt::attention`` is the right one, and the fastest, for a call."""

from __future__ import annotations

import sympy
import torch
from sympy.core.function import AppliedUndef
from torch import fx

from fxopt.ir.cone import cone
from fxopt.ir.contract import Verdict
from fxopt.ir.cost import hint
from fxopt.ir.facts import argument, is_floating, same_size, val
from fxopt.ir.formula import K, Q
from fxopt.ir.graph_facts import Facts
from fxopt.ir.linear import Unsupported
from fxopt.ir.ops.masking import MEAN, NAN, NONE, ZERO
from fxopt.ir.ops.tile_attention import FLASH_SCORES
from fxopt.ir.ops.tile_plan import Block, of_data, plan, seconds, seconds_of
from fxopt.ir.program import MaskProgram, ScoreProgram

# Below these numbers of scores per head (Sq * Skv) the host's own fusion of product, softmax and product
# beats the CPU flash kernel, whose forward has a fixed cost and whose backward recomputes the scores.
# Measured on one core, float32, D = 16..64, H = 4..8: forward 0.84x at 16^2, 1.0x at 64^2, 1.2x at 128^2;
# with backward 0.87x at 128^2, 1.04x at 512^2.
FLASH_FORWARD_SCORES = 64 * 64
FLASH_BACKWARD_SCORES = 256 * 256
# Measured on one core, float32, D = 64. Tiles of the flash kernel against one call of it: 0.95x to 1.1x at an
# estimated 0.85 of the time, 2x at half of it. A padding mask whose sequences fill it: 1.0x at 512^2, 0.93x
# at 256^2; filled to the half 1.8x. Tiles with a soft cap against the host's code for all scores, under a
# causal mask: 1.0x at 512^2, 1.5x at 1024^2, with backward 0.93x and 1.35x; without a cap, with backward,
# 1.08x at 768^2, 1.2x at 1024^2, 1.6x at 2048^2, but with every score live 0.7x to 0.94x; of D = 32 1.25x.
# Dropout, nothing masked: 1.15x from 512^2. With the gradient of a learned bias: 0.6x at half of the scores.
LARGEST_TIME = 0.85
PADDED_SCORES = DROPOUT_SCORES = 512 * 512
DENSE_SCORES = 768 * 768
# A mask that is a tensor of Sq x Skv, half of it live: 0.88x at 1024^2, 2.7x at 2048^2.
OPAQUE_SCORES = 1536 * 1536
DENSE_SHARE, LEARNED_SHARE = 0.7, 0.35
NARROW = 32


# Measured on one core, float32: a call costs some 80 microseconds besides its scores. Against the kernel over
# all keys, with this many numbers in K for all query heads: 0.8x when every key is live, 1.7x when one in
# eight is; with twice as many 1.3x and 2.9x, with eight times as many 1.0x to 1.4x and 10x to 30x.
# Scores that are capped, or have sinks, against the host's code for all of them: with 2**20 numbers 0.9x when
# every key is live, 1.15x when half of them are; with four times as many 1.2x and 1.6x, with eight times as
# many 1.25x, and 6x when one in 16 is.
DECODE_ROWS = 16
DECODE_NUMBERS = 2**19
DENSE_NUMBERS = 2**20
# Of a cache that grows, the length to choose for, and the numbers in K from which no shorter one loses much.
GROWN = 1024
GROWN_NUMBERS = 2**21


def only_broadcasts(node: fx.Node, facts: Facts) -> Verdict:
    """Whether Q, K and V have to be repeated for each other, beyond groups of heads."""
    shapes = [val(arg).shape[:2] for arg in node.args[:3]]
    for place, name in enumerate(("batches", "heads")):
        ones = [same_size(shape[place], 1) for shape in shapes]
        group = place == 1 and ones[1:] == [True, True]
        if any(ones) and not all(ones) and not group:
            sizes = ", ".join(str(shape[place]) for shape in shapes)
            return Verdict.yes(f"Q, K and V of {sizes} {name} broadcast, which kernels do not")
    return Verdict.no("")


def kernel_serves(node: fx.Node, facts: Facts) -> Verdict:
    """Whether a Triton kernel computes the call: for whatever the fused kernels of torch have no code for."""
    return Verdict.no("") if facts.kernels is None else facts.kernels(node, facts)


def decode_pays(node: fx.Node, facts: Facts) -> Verdict:
    """Whether reading only the keys that are live beats a kernel over all, for a few queries."""
    query, key = val(node.args[0]), val(node.args[1])
    rows, columns = query.shape[-2], key.shape[-2]
    if not isinstance(rows, int) or rows > DECODE_ROWS:
        return Verdict.no("")
    if query.device.type != "cpu":
        return Verdict.no(f"on {query.device.type} fused kernels read the mask")
    if facts.differentiates(node):
        return Verdict.no("it has no gradient")
    if argument(node, "attn_mask") is None:
        return Verdict.no("")
    if _given(node, "dropout_p"):
        return Verdict.no("it has no dropout")
    if ScoreProgram.parse(argument(node, "score")).result.has(K):
        return Verdict.no("it needs scores that change alike for every key")
    numbers = hint(query.shape[0]) * hint(query.shape[1]) * hint(query.shape[-1])
    if not isinstance(columns, int):
        # A cache that grows: nearly all of it is live, and it will be longer than now.
        if not flash_has_it(node):
            return Verdict.no("of a growing cache, with scores that are not only scaled")
        if query.shape[1] == key.shape[1] or numbers * GROWN < GROWN_NUMBERS:
            return Verdict.no("nearly every key of a growing cache is live")
        return Verdict.yes(f"{rows} queries of grouped heads share each key that is read")
    numbers *= columns
    least = DECODE_NUMBERS if flash_has_it(node) else DENSE_NUMBERS
    if numbers < least:
        return Verdict.no(f"{numbers} numbers in the keys of all heads, pays from {least}")
    return Verdict.yes(f"of {columns} keys those are read that one of {rows} queries sees")


def grouped_pays(node: fx.Node, facts: Facts) -> Verdict:
    """Whether heads that share keys should stand as queries of one head, for a few queries of all keys."""
    query, key = val(node.args[0]), val(node.args[1])
    rows, columns = query.shape[-2], key.shape[-2]
    if not isinstance(rows, int) or rows > DECODE_ROWS or query.shape[1] == key.shape[1]:
        return Verdict.no("")
    if query.device.type != "cpu":
        return Verdict.no(f"on {query.device.type} kernels know groups of heads")
    if facts.differentiates(node):
        return Verdict.no("it has no gradient")
    masked = argument(node, "attn_mask") is not None or (argument(node, "is_causal") and rows > 1)
    if masked or not flash_has_it(node):
        return Verdict.no("it needs scores that are only scaled")
    if argument(node, "dead_rows") != ZERO:  # it was not written as a kernel's call
        numbers = hint(query.shape[0]) * hint(query.shape[1]) * hint(query.shape[-1])
        if numbers * (columns if isinstance(columns, int) else GROWN) < GROWN_NUMBERS:
            return Verdict.no("too few keys for a kernel")
    return Verdict.yes(f"{rows} queries of grouped heads share each key that is read")


def blocks_pay(node: fx.Node, facts: Facts) -> Verdict:
    """Whether tiles, which skip keys that no query sees, beat whatever computes all scores."""
    query, key = val(node.args[0]), val(node.args[1])
    if query.device.type != "cpu":
        return Verdict.no(f"on {query.device.type} fused kernels read the mask")
    if _given(node, "query_rest"):
        return Verdict.no("tiles take Q and K in one part")
    if not argument(node, "mask") and argument(node, "attn_mask") is not None:
        return Verdict.no("no formula of the mask is known")
    flash = flash_has_it(node) and not _beyond_flash(node, facts)
    if flash and not argument(node, "mask"):
        return Verdict.no("the CPU's kernel knows this mask")
    tasks, threads = hint(query.shape[0]) * hint(query.shape[1]), torch.get_num_threads()
    if tasks < threads:
        return Verdict.no(f"{tasks} heads keep no more than {tasks} of {threads} threads busy")
    scores = hint(query.shape[-2]) * hint(key.shape[-2])
    blocks = _blocks(node)
    share = sum(block.scores for block in blocks) / max(1, scores)
    learned = _learned(node, facts)
    if flash and not learned:
        return _flash_pays(node, scores, share, blocks)
    pays = _dense_pays(node, facts, scores, share)
    unknown = argument(node, "bias") and argument(node, "bias_replaced") is None
    if pays and learned and unknown and argument(node, "dead_rows") == MEAN and not _rows_live(node):
        return Verdict.no("a learned bias is replaced in some rows that may be masked whole, in others not")
    return pays


def _beyond_flash(node: fx.Node, facts: Facts) -> bool:
    """Its gradients in float32 err more than those of the softmax that the model has.

    Up to a fifth of the tensors of random cases were more than twice as far from float64 as eager's, by their
    largest entry; of eager's own with the numbers of each head in another order, one in fifty.
    """
    spelled = argument(node, "dead_rows") != ZERO
    return spelled and val(node.args[0]).dtype is torch.float32 and facts.differentiates(node)


def _flash_pays(node: fx.Node, scores: int, share: float, blocks: tuple[Block, ...]) -> Verdict:
    least = OPAQUE_SCORES if _reads_matrices(node) else PADDED_SCORES
    if scores >= least and MaskProgram.parse(argument(node, "mask")).captures:
        return Verdict.yes(f"blocks read at most {share:.0%} of {scores} scores per head, fewer where padded")
    heads, depth = hint(val(node.args[0]).shape[1]), hint(val(node.args[0]).shape[-1])
    heads *= hint(val(node.args[0]).shape[0])
    time = seconds(blocks, heads, depth) / seconds_of(scores * heads, depth)
    if time > LARGEST_TIME:
        return Verdict.no(f"blocks would take {time:.0%} of the time, pay below {LARGEST_TIME:.0%}")
    return Verdict.yes(f"blocks read {share:.0%} of {scores} scores per head")


def _reads_matrices(node: fx.Node) -> bool:
    """The mask's formula reads a tensor with an entry for each query and key."""
    captured = MaskProgram.parse(argument(node, "mask")).live.atoms(AppliedUndef)
    return any({Q, K} <= each.free_symbols for each in captured)


def _dense_pays(node: fx.Node, facts: Facts, scores: int, share: float) -> Verdict:
    dropout = bool(argument(node, "dropout_p"))
    least = DROPOUT_SCORES if dropout else DENSE_SCORES
    narrow = flash_has_it(node) and hint(val(node.args[0]).shape[-1]) <= NARROW
    most = LEARNED_SHARE if _learned(node, facts) else (1.0 if dropout or narrow else DENSE_SHARE)
    if scores < least:
        return Verdict.no(f"{scores} scores per head, blocks pay from {least}")
    if share > most:
        return Verdict.no(f"blocks would read {share:.0%} of the scores, pay below {most:.0%}")
    return Verdict.yes(f"blocks read {share:.0%} of {scores} scores per head")


def _learned(node: fx.Node, facts: Facts) -> bool:
    """What is added to the scores gets a gradient."""
    return facts.differentiates(node) and any(map(reaches_grad, argument(node, "captures") or ()))


def reaches_grad(capture: fx.Node) -> bool:
    """Autograd may want a gradient of what it is made of."""
    if not is_floating(capture):
        return False
    try:
        return any(source.meta.get("fxopt_needs_grad") for source in cone(capture))
    except Unsupported:
        return True


def flash_has_it(node: fx.Node) -> bool:
    """Scores that are scaled and masked, and nothing else."""
    same_width = val(node.args[0]).shape[-1] == val(node.args[2]).shape[-1]
    others = ("score", "sinks", "dropout_p", "wide_scores", "query_rest")
    return same_width and not any(_given(node, name) for name in others)


def _given(node: fx.Node, name: str) -> bool:
    found = argument(node, name)
    return isinstance(found, fx.Node) or bool(found)


def _blocks(node: fx.Node) -> tuple[Block, ...]:
    """The blocks by the formula of the mask and the sizes seen so far."""
    text = argument(node, "mask") or ("k <= q" if argument(node, "is_causal") else "True")
    sizes = tuple(hint(val(each)) for each in argument(node, "sizes") or ())
    batch, heads, rows, depth = map(hint, val(node.args[0]).shape)
    columns = hint(val(node.args[1]).shape[-2])
    return plan(MaskProgram.parse(text), sizes, rows, columns, batch * heads, depth, FLASH_SCORES)


def _rows_live(node: fx.Node) -> bool:
    """By the formulas, every row has a key to whose score no number is added that could exclude it."""
    mask = argument(node, "mask")
    if not mask or ScoreProgram.parse(argument(node, "bias") or "0").captures:
        return False
    return of_data(MaskProgram.parse(mask).live) == sympy.true and all(each.known for each in _blocks(node))


def _computed_in_full(node: fx.Node, facts: Facts) -> bool:
    """Torch has no fused kernel for what was written: one head of keys for several of queries, in float32."""
    query, key = val(node.args[0]), val(node.args[1])
    broadcasts = same_size(key.shape[1], 1) and not same_size(query.shape[1], 1)
    return broadcasts and query.dtype is torch.float32 and not facts.differentiates(node)


def decomposed_wins(node: fx.Node, facts: Facts) -> Verdict:
    """Where the decomposed form is the faster one, or the only one with the right answer."""
    query, key, mask = val(node.args[0]), val(node.args[1]), val(argument(node, "attn_mask"))
    if _given(node, "score") or _given(node, "sinks"):
        return Verdict.yes("no kernel changes scores")
    if _given(node, "query_rest"):
        return Verdict.yes("kernels take Q and K in one part")
    if argument(node, "dead_rows") == NAN:
        return Verdict.yes("a row of -inf gives NaN, as softmax does; kernels give 0")
    if argument(node, "mask_replaces") and facts.differentiates(node):
        return Verdict.yes("filled scores get no gradient; kernels give them one in rows of nothing else")
    if query.dtype is torch.float16 and mask is not None and argument(node, "dead_rows") == NONE:
        return Verdict.yes(
            "kernels add masks in float32, where float16's lowest number does not absorb a score"
        )
    if argument(node, "dead_rows") == ZERO and not _computed_in_full(node, facts):
        return Verdict.no("written as scaled_dot_product_attention, whose rounding is kept")
    if query.device.type != "cpu":
        return Verdict.no(f"device {query.device.type} has fused kernels")
    learned = mask is not None and facts.differentiates(node) and reaches_grad(argument(node, "attn_mask"))
    if learned:
        return Verdict.yes("the CPU's kernel gives a mask no gradient")
    if argument(node, "dropout_p"):
        return Verdict.yes("the CPU has no fused kernel with dropout")
    if mask is not None and facts.differentiates(node) and not _rows_live(node):
        return Verdict.yes("the CPU's kernel has a wrong gradient in rows that a number masks whole")
    if _beyond_flash(node, facts):
        return Verdict.yes("the CPU's kernel has gradients less exact than those of softmax in float32")
    scores = hint(query.shape[-2]) * hint(key.shape[-2])
    limit = FLASH_BACKWARD_SCORES if facts.differentiates(node) else FLASH_FORWARD_SCORES
    if scores < limit:
        return Verdict.yes(f"{scores} scores per head, flash pays from {limit}")
    return Verdict.no(f"{scores} scores per head, decomposed pays below {limit}")
