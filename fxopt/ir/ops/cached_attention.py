"""``fxopt::cached_attention``: a few queries over a cache, for a kernel that reads its live keys alone.

What the provider "cached" of ``fxopt::attention`` and of ``fxopt::quantized_attention`` is made of, where
kernels are emitted. The mask is its formula, which the kernel computes; where a cache begins and ends is on
the device.

    query, key, value       (B, Hq, Sq, D), (B, Hkv, Skv, D), (B, Hkv, Skv, Dv); Hq is a multiple of Hkv
    span                    (2,) int64 or longer: no key in front of the first number, or from the second on,
                            takes part; None where the formula of the mask says so itself
    key_scale, value_scale  of rows of 8 bits, (B, Hkv, Skv, 1) or broadcastable to it
    the others              as ``fxopt::attention`` has them; `score` has the bias in it

Float16's lowest number, as a mask, does not absorb scores in float32: such masks are left to others.
"""

from __future__ import annotations

from typing import Any

import sympy
import torch
from sympy.core.function import AppliedUndef
from torch import fx

from fxopt.ir.contract import Verdict
from fxopt.ir.facts import argument, val
from fxopt.ir.formula import AXES, K, Q, capture, numbered, real_capture
from fxopt.ir.graph_facts import Facts
from fxopt.ir.ops.attention_attributes import Attributes, computed_in, without_symbol
from fxopt.ir.ops.attention_providers import DECODE_ROWS, flash_has_it
from fxopt.ir.ops.decode_attention import ends_of, sequences_first
from fxopt.ir.ops.decomposed_attention import decomposed
from fxopt.ir.ops.masking import MEAN, NAN, NONE, ZERO
from fxopt.ir.ops.op import define_op, without_autocast
from fxopt.ir.program import MaskProgram, ScoreProgram
from fxopt.ir.tile_values import TileValues

SCHEMA = (
    "cached_attention(Tensor query, Tensor key, Tensor value, *, Tensor? span=None, Tensor? key_scale=None, "
    "Tensor? value_scale=None, Tensor? query_rest=None, Tensor? key_rest=None, Tensor? sinks=None, "
    "float scale, str dead_rows, str mask='True', str score='', Tensor[]? captures=None, "
    "SymInt[]? sizes=None) -> Tensor"
)
DTYPES = (torch.float32, torch.float16, torch.bfloat16)
# Of a row, in tiles of a kernel.
WIDEST = 512


@without_autocast
def cached_attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    *,
    span: torch.Tensor | None = None,
    key_scale: torch.Tensor | None = None,
    value_scale: torch.Tensor | None = None,
    scale: float,
    dead_rows: str,
    mask: str = "True",
    **others: Any,
) -> torch.Tensor:
    """The result (B, Hq, Sq, Dv), sequences before heads in memory."""
    if key_scale is not None and value_scale is not None:
        key = (key.to(key_scale.dtype) * key_scale).to(query.dtype)
        value = (value.to(value_scale.dtype) * value_scale).to(query.dtype)
    ranges = tuple((0, size) for size in (*query.shape[:3], key.shape[2]))
    named, numbers = numbered("c", others.get("captures")), numbered("n", others.get("sizes"))
    values = TileValues(ranges, named, numbers, query.device)
    live = values.condition(MaskProgram.parse(mask).live)
    if span is not None:
        k = values.axis(3)
        live = live & (k >= span[0]) & (k < span[1])
    operands = (query, key, value, live)
    weights = ZERO if dead_rows == ZERO else NAN
    out = decomposed(*operands, scale=scale, dead_rows=weights, enable_gqa=True, **others)
    if others.get("sinks") is None and dead_rows in (MEAN, NONE):
        alive = live.expand(-1, -1, -1, key.shape[2]).any(-1, keepdim=True)
        mean = value.mean(2, keepdim=True, dtype=computed_in(value.dtype)).to(query.dtype)
        out = torch.where(alive, out, mean.repeat_interleave(query.shape[1] // value.shape[1], 1))
    return out.transpose(1, 2).contiguous().transpose(1, 2)


def cached_pays(node: fx.Node, facts: Facts) -> Verdict:
    """Whether a kernel over the live keys of a cache is to compute an attention `node`."""
    query, key, value = (val(arg) for arg in node.args[:3])
    return _pays(node, facts, query, key, value)


def cached_rows_pay(node: fx.Node, facts: Facts) -> Verdict:
    """The same, for ``fxopt::quantized_attention``."""
    if facts.kernels is None:
        return Verdict.no("")
    query, key, key_scale, value, value_scale = (val(arg) for arg in node.args[:5])
    for rows, scale in ((key, key_scale), (value, value_scale)):
        if scale.dim() != 4 or not isinstance(scale.shape[3], int) or scale.shape[3] != 1:
            return Verdict.no("wanted a scale for each row")
        if any(s != r and s != 1 for s, r in zip(scale.shape[:3], rows.shape[:3], strict=True)):
            return Verdict.no("wanted a scale for each row")
    return _pays(node, facts, query, key, value)


def _pays(
    node: fx.Node, facts: Facts, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor
) -> Verdict:
    if facts.kernels is None or query.device.type not in facts.kernels.devices:
        return Verdict.no("")
    rows = query.shape[2]
    if not isinstance(rows, int) or rows > DECODE_ROWS:
        return Verdict.no(f"{rows} queries, it is for {DECODE_ROWS} at most")
    if facts.differentiates(node):
        return Verdict.no("it has no gradient")
    if _given(node, "dropout_p"):
        return Verdict.no("it has no dropout")
    refusal = _form(node, query, key, value) or _mask_refusal(node, query)
    if refusal:
        return Verdict.no(refusal)
    masked = argument(node, "attn_mask") is not None or (argument(node, "is_causal") and rows > 1)
    flash = not masked and key.dtype == query.dtype and flash_has_it(node)
    if flash and query.device.type == "cuda" and query.dtype is not torch.float32 and query.shape[3] <= 256:
        return Verdict.no("without a mask the fused kernels of torch have it")
    able = Verdict.yes(f"{rows} queries read the live keys of a cache once for each head of K and V")
    return facts.kernels.judged(node, facts, able)


def _form(node: fx.Node, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> str:
    """What of the operands a kernel cannot take; empty where it takes all."""
    if query.dtype not in DTYPES:
        return f"wanted queries of 16 or 32 bits, saw {query.dtype}"
    if not all(
        isinstance(size, int) for each in (query, key, value) for size in (each.shape[1], each.shape[3])
    ):
        return "wanted heads and widths that are known"
    if query.shape[1] % key.shape[1]:
        return f"wanted heads of queries in groups, saw {query.shape[1]} and {key.shape[1]}"
    operands = [query, key, value]
    rest = argument(node, "key_rest")
    if rest is not None:
        operands += [val(argument(node, "query_rest")), val(rest)]
        if operands[-1].shape[1] != key.shape[1]:
            return "wanted as many heads in the rest of the keys"
    if any(_stride(each, 3) != 1 for each in operands):
        return "wanted rows whose numbers are neighbours in memory"
    if any(each.shape[3] > WIDEST for each in operands):
        return f"wanted rows of at most {WIDEST} numbers"
    return ""


def _stride(tensor: torch.Tensor, dim: int) -> Any:
    return 1 if tensor.shape[dim] == 1 else tensor.stride(dim)


def _mask_refusal(node: fx.Node, query: torch.Tensor) -> str:
    mask = val(argument(node, "attn_mask"))
    floating = mask is not None and mask.dtype.is_floating_point
    by_number = floating and not (argument(node, "mask") and not argument(node, "bias"))
    if by_number and query.dtype is torch.float16 and argument(node, "dead_rows") in (MEAN, NONE):
        return "float16's lowest number, as a mask, absorbs scores of float16 alone"
    return ""


def _given(node: fx.Node, name: str) -> bool:
    found = argument(node, name)
    return isinstance(found, fx.Node) or bool(found)


def in_cache(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attn_mask: torch.Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    **attributes: Any,
) -> torch.Tensor:
    """`fxopt::attention` over a cache; the arguments are those of the op."""
    return _call(query, key, value, attn_mask, is_causal, Attributes(**attributes))


def rows_in_cache(
    query: torch.Tensor,
    key: torch.Tensor,
    key_scale: torch.Tensor,
    value: torch.Tensor,
    value_scale: torch.Tensor,
    attn_mask: torch.Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    **attributes: Any,
) -> torch.Tensor:
    """`fxopt::quantized_attention` over a cache; the arguments are those of the op."""
    scales = {"key_scale": key_scale, "value_scale": value_scale}
    return _call(query, key, value, attn_mask, is_causal, Attributes(**attributes), **scales)


def _call(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attn_mask: torch.Tensor | None,
    is_causal: bool,
    given: Attributes,
    **scales: Any,
) -> torch.Tensor:
    rest = given.query_rest
    if rest is not None:
        rest, _ = without_symbol(rest, given.factor(query))
    query, others = kernel_operands(query, key, attn_mask, is_causal, given)
    scales |= {} if rest is None else {"query_rest": rest, "key_rest": given.key_rest}
    out: torch.Tensor = torch.ops.fxopt.cached_attention(query, key, value, **scales, **others)
    return out


def kernel_operands(
    query: torch.Tensor, key: torch.Tensor, attn_mask: torch.Tensor | None, is_causal: bool, given: Attributes
) -> tuple[torch.Tensor, dict[str, Any]]:
    """The queries, and what a kernel takes besides operands: numbers, formulas and their tensors."""
    query, scale = without_symbol(query, given.factor(query))
    live, score, captures = _formulas(given, attn_mask, is_causal)
    return query, {
        "span": _span(query, key, attn_mask, given, live, score),
        "sinks": given.sinks,
        "scale": float(scale),
        "dead_rows": given.dead_rows,
        "mask": str(MaskProgram(live)),
        "score": "" if ScoreProgram(score).is_identity else str(ScoreProgram(score)),
        "captures": captures,
        "sizes": list(given.sizes or ()),
    }


def _formulas(
    given: Attributes, attn_mask: torch.Tensor | None, is_causal: bool
) -> tuple[Any, Any, list[torch.Tensor]]:
    """The mask and the score as formulas, and their tensors: a mask without a formula is one of them."""
    captures = list(given.captures or ())
    live: Any = MaskProgram.parse(given.mask or "True").live
    score = ScoreProgram.parse(given.score).result
    if given.bias:
        score += ScoreProgram.parse(given.bias).result
    if attn_mask is not None and not given.mask:
        whole = attn_mask[(None,) * (4 - attn_mask.dim())]
        places = [
            axis if size != 1 else sympy.Integer(0) for axis, size in zip(AXES, whole.shape, strict=True)
        ]
        name = f"c{len(captures)}"
        captures.append(whole)
        if whole.dtype is torch.bool:
            live = sympy.Ne(capture(name)(*places), 0)
        else:
            score += real_capture(name)(*places)
    if is_causal:
        live = sympy.And(live, K <= Q)
    return live, score, captures


def _span(
    query: torch.Tensor,
    key: torch.Tensor,
    attn_mask: torch.Tensor | None,
    given: Attributes,
    live: Any,
    score: Any,
) -> torch.Tensor | None:
    """Where the keys begin and end that a query sees, of a cache that has room for others.

    None where the formula of the mask knows it, and for a cache that grows, which is full.
    """
    by_key = [
        each for each in (live.atoms(AppliedUndef) | score.atoms(AppliedUndef)) if K in each.free_symbols
    ]
    if attn_mask is None or not by_key or not isinstance(key.shape[2], int):
        return None
    if attn_mask.is_floating_point() and given.mask and not given.bias:
        ranges = tuple((0, size) for size in (*query.shape[:3], key.shape[2]))
        named, numbers = numbered("c", given.captures), numbered("n", given.sizes)
        mask = TileValues(ranges, named, numbers, query.device).condition(live)
    else:
        mask = attn_mask[(None,) * (4 - attn_mask.dim())]
    mask = mask.expand(*mask.shape[:3], key.shape[2])
    return ends_of(mask, mask.is_floating_point())


def _fake(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, **_: Any) -> torch.Tensor:
    return sequences_first(query, value)


def register(library: torch.library.Library) -> None:
    """Make the op known to torch's dispatcher."""
    define_op(library, SCHEMA, cached_attention, _fake)
