"""``fxopt::block_attention`` and its backward: attention under programs, computed tile by tile.

What the providers "blocks" and "triton" of ``fxopt::attention`` are made of. On the CPU the ops stay whole
until they run, as they look at the captured tensors of a mask to see which keys are live; where kernels run
they are put in the place of the ops. The backward is an op as well; it has no derivative of its own.

    query, key, value   (B, Hq, Sq, D), (B, Hkv, Skv, D), (B, Hkv, Skv, Dv); Hq is a multiple of Hkv
    sinks               (Hq,), or None
    seed                () int64: of the dropout, or None
    captures, sizes     the tensors ``c0, ...`` and the integers ``n0, ...`` of the programs
    mask, score         the texts of a `MaskProgram` and of a `ScoreProgram`
    dead_rows, stops    what rows without a live key give, and whether their scores get no gradient
    stopped             the places of captures that get no gradient from them
    by_kernel           a kernel is to take the place of the op; what its forward saves is for its backward
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from fxopt.ir.formula import numbered
from fxopt.ir.ops.attention_attributes import Attributes, computed_in, without_symbol
from fxopt.ir.ops.op import NAMESPACE, define_op, without_autocast
from fxopt.ir.ops.tile_attention import Rows, forward
from fxopt.ir.ops.tile_gradients import backward, empty_like_heads_last
from fxopt.ir.ops.tiles import Problem
from fxopt.ir.program import MaskProgram, ScoreProgram

_OPERANDS = (
    "Tensor query, Tensor key, Tensor value, Tensor? sinks, Tensor? seed, Tensor[] captures, SymInt[] sizes"
)
_ATTRIBUTES = (
    "str mask, str score, float scale, str dead_rows, bool stops, int[] stopped, bool wide_scores, "
    "float dropout_p, bool by_kernel=False"
)
FORWARD = f"block_attention({_OPERANDS}, *, {_ATTRIBUTES}) -> (Tensor, Tensor)"
BACKWARD = (
    f"block_attention_backward(Tensor grad, Tensor out, Tensor sums, {_OPERANDS}, *, {_ATTRIBUTES}, "
    "int[] learned) -> (Tensor, Tensor, Tensor, Tensor, Tensor[])"
)


def block_arguments(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attn_mask: torch.Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    **attributes: Any,
) -> tuple[list[Any], dict[str, Any]]:
    """The operands of ``fxopt::block_attention``, without a seed, and its attributes, for a call of
    ``fxopt::attention``. Reads no `attn_mask`."""
    given = Attributes(**attributes)
    query, scale = without_symbol(query, given.factor(query))
    score, bias = ScoreProgram.parse(given.score), ScoreProgram.parse(given.bias or "0")
    replaced = given.mask_replaces if given.bias_replaced is None else given.bias_replaced
    stopped = {*(score.captures if given.mask_replaces else ()), *(bias.captures if replaced else ())}
    operands = [query, key, value, given.sinks, None, list(given.captures or ()), list(given.sizes or ())]
    return operands, {
        "mask": given.mask or ("k <= q" if is_causal else "True"),
        "score": str(ScoreProgram(score.result + bias.result)),
        "scale": float(scale),
        "dead_rows": given.dead_rows,
        "stops": given.mask_replaces,
        "stopped": [place for place in range(len(given.captures or ())) if f"c{place}" in stopped],
        "wide_scores": given.wide_scores,
        "dropout_p": float(dropout_p),
    }


def in_blocks(*arguments: Any, by_kernel: bool = False, **attributes: Any) -> torch.Tensor:
    """`fxopt::attention` by its programs: reads no `attn_mask`. The arguments are those of the op."""
    operands, attributes = block_arguments(*arguments, **attributes)
    attributes |= {"by_kernel": by_kernel}
    if attributes["dropout_p"] > 0.0:
        operands[4] = torch.randint(2**31, (), dtype=torch.int64, device=operands[0].device)
    out, _ = torch.ops.fxopt.block_attention(*operands, **attributes)
    result: torch.Tensor = out
    return result


def kernel_arguments(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attn_mask: torch.Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    **attributes: Any,
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """The arguments of a call of ``fxopt::attention`` whose mask is a program for sure: one without a formula
    is a captured tensor of which every score reads its entry. Numbers within a row stand side by side."""
    query, key, value = (each if each.stride(-1) == 1 else each.contiguous() for each in (query, key, value))
    if attn_mask is not None and not attributes.get("mask") and not is_causal:
        captures = [*(attributes.get("captures") or ())]
        mask = attn_mask[(None,) * (4 - attn_mask.dim())]
        indices = (axis if size != 1 else "0" for axis, size in zip("bhqk", mask.shape, strict=True))
        entry = f"c{len(captures)}[{', '.join(indices)}]"
        name = "mask" if mask.dtype is torch.bool else "bias"
        attributes |= {name: entry, "captures": [*captures, mask]}
    return (query, key, value, None, dropout_p, is_causal), attributes


def in_kernel(*arguments: Any, **attributes: Any) -> torch.Tensor:
    """`fxopt::attention` for a kernel. The arguments are those of the op."""
    given, attributes = kernel_arguments(*arguments, **attributes)
    return in_blocks(*given, by_kernel=True, **attributes)


def _problem(
    tensors: Sequence[torch.Tensor],
    captures: Sequence[torch.Tensor],
    sizes: Sequence[int],
    attributes: dict[str, Any],
) -> Problem:
    query, key, value = tensors
    return Problem(
        query, key, value, numbered("c", captures), numbered("n", map(int, sizes)),
        MaskProgram.parse(attributes["mask"]), ScoreProgram.parse(attributes["score"]),
        attributes["scale"], attributes["wide_scores"],
    )  # fmt: skip


def _rows(sinks: torch.Tensor | None, seed: torch.Tensor | None, attributes: dict[str, Any]) -> Rows:
    stopped = frozenset(f"c{place}" for place in attributes["stopped"])
    return Rows(attributes["dead_rows"], attributes["stops"], stopped, sinks, attributes["dropout_p"], seed)


@without_autocast
def block_attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    sinks: torch.Tensor | None,
    seed: torch.Tensor | None,
    captures: Sequence[torch.Tensor],
    sizes: Sequence[int],
    **attributes: Any,
) -> tuple[torch.Tensor, torch.Tensor]:
    """The result (B, Hq, Sq, Dv), sequences before heads in memory, and two numbers of each row, from which
    the backward finds its weights: (2, B, Hq, Sq). Here they are its log-sum-exp, and 1; a kernel's are its
    largest score in the kernel's own unit, and the sum of all weights relative to that one's."""
    problem = _problem((query, key, value), captures, sizes, attributes)
    out, lse = forward(problem, _rows(sinks, seed, attributes))
    return out, torch.stack([lse, torch.ones_like(lse)])


@without_autocast
def block_attention_backward(
    grad: torch.Tensor,
    out: torch.Tensor,
    sums: torch.Tensor,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    sinks: torch.Tensor | None,
    seed: torch.Tensor | None,
    captures: Sequence[torch.Tensor],
    sizes: Sequence[int],
    **attributes: Any,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, list[torch.Tensor]]:
    """The gradients of query, key, value, sinks (empty without any), and of the captures `learned`."""
    learned = [f"c{place}" for place in attributes.pop("learned")]
    problem = _problem((query, key, value), captures, sizes, attributes)
    return backward(problem, _rows(sinks, seed, attributes), grad, out, sums[0], learned)


def _fake(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, *_: Any, **__: Any) -> Any:
    batch, heads, rows, width = *query.shape[:3], value.shape[-1]
    out = query.new_empty(batch, rows, heads, width).transpose(1, 2)
    return out, query.new_empty(2, batch, heads, rows, dtype=computed_in(query.dtype))


def _fake_backward(
    grad: torch.Tensor,
    out: torch.Tensor,
    sums: torch.Tensor,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    sinks: torch.Tensor | None,
    seed: torch.Tensor | None,
    captures: Sequence[torch.Tensor],
    sizes: Sequence[int],
    *,
    learned: Sequence[int],
    **_: Any,
) -> Any:
    given = [empty_like_heads_last(each) for each in (query, key, value)]
    of_sinks = sums.new_empty(0) if sinks is None else torch.empty_like(sinks)
    return *given, of_sinks, [torch.empty_like(captures[place]) for place in learned]


def _save(ctx: Any, inputs: tuple[Any, ...], keyword_only_inputs: dict[str, Any], output: Any) -> None:
    query, key, value, sinks, seed, captures, sizes = inputs
    ctx.learned = [place for place, each in enumerate(captures) if each.requires_grad]
    ctx.count, ctx.sizes, ctx.attributes = len(captures), sizes, dict(keyword_only_inputs)
    ctx.given = (sinks is not None, seed is not None)
    optional = [each for each in (sinks, seed) if each is not None]
    ctx.save_for_backward(*output, query, key, value, *captures, *optional)
    ctx.mark_non_differentiable(output[1])


def _gradients(ctx: Any, grad: torch.Tensor, _: Any) -> tuple[Any, ...]:
    out, sums, query, key, value, *others = ctx.saved_tensors
    captures, optional = others[: ctx.count], iter(others[ctx.count :])
    sinks, seed = (next(optional) if given else None for given in ctx.given)
    found = torch.ops.fxopt.block_attention_backward(
        grad, out, sums, query, key, value, sinks, seed, captures, ctx.sizes,
        **ctx.attributes, learned=ctx.learned,
    )  # fmt: skip
    of_captures: list[torch.Tensor | None] = [None] * ctx.count
    for place, each in zip(ctx.learned, found[4], strict=True):
        of_captures[place] = each
    of_sinks = found[3] if ctx.given[0] else None
    # Torch takes an empty list for one of tensors.
    of_sizes: list[None] | None = None if ctx.sizes else []
    return *found[:3], of_sinks, None, of_captures, of_sizes


def register(library: torch.library.Library) -> None:
    """Make the two ops known to torch's dispatcher."""
    for schema, body, fake in (
        (FORWARD, block_attention, _fake),
        (BACKWARD, block_attention_backward, _fake_backward),
    ):
        define_op(library, schema, body, fake)
    torch.library.register_autograd(
        f"{NAMESPACE}::block_attention", _gradients, setup_context=_save, lib=library
    )
