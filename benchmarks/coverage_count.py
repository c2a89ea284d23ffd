"""Counts the attention sites of a model's graphs: all, those that become one op, and with what mask.

A site is a call of scaled_dot_product_attention, or a softmax whose result, dropped out, converted, sliced or
reshaped as it may be, is an operand of a matrix product. They are counted before any pass has run.
"""

from __future__ import annotations

import copy
import operator
import re
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import fx

from fxopt.frontend.lower import lower
from fxopt.frontend.normalize import normalize
from fxopt.ir.contract import Evidence, Status
from fxopt.ir.facts import argument, is_call, is_float_cast, shape
from fxopt.ir.linear import Unsupported
from fxopt.ir.ops import register_ops
from fxopt.ir.ops.attention import ATTENTION
from fxopt.options import Options
from fxopt.passes.mask_program import recover
from fxopt.pipeline import rewrite
from fxopt.report.record import recorded

aten = torch.ops.aten
SDPA = aten.scaled_dot_product_attention.default
SOFTMAXES = (aten.softmax.int, aten._softmax.default)
PRODUCTS = (aten.matmul.default, aten.bmm.default, aten.mm.default, aten.baddbmm.default, aten.einsum.default)
# What leaves the weights of attention what they are: the others end a site.
_CARRIERS = {
    "view", "reshape", "_unsafe_view", "permute", "transpose", "unsqueeze", "squeeze", "expand",
    "contiguous", "clone", "slice", "narrow", "dropout", "native_dropout", "to", "_to_copy",
    "type_as", "alias", "masked_fill", "masked_fill_", "where", "mul", "mul_", "pad",
    "constant_pad_nd", "as_strided", "flatten", "unflatten", "mT", "split", "chunk",
}  # fmt: skip


@dataclass
class Counts:
    """What was found in the graphs of one model, for one way to call it.

    Attributes:
        sites: attention sites. recovered: those that became ``fxopt::attention``.
        inductor: of them, those that Inductor's `fuse_attention` patterns replaced.
        masks: mask of a recovered site -> how many have it.
        refused: (reason, the user's line) -> how many sites were left for it.
        faults: what went wrong in fxopt or in Inductor.
    """

    sites: int = 0
    recovered: int = 0
    inductor: int = 0
    graphs: int = 0
    masks: Counter[str] = field(default_factory=Counter)
    refused: Counter[tuple[str, str]] = field(default_factory=Counter)
    faults: list[str] = field(default_factory=list)

    def as_dict(self) -> dict[str, Any]:
        refused = [
            {"reason": reason, "line": line, "sites": number}
            for (reason, line), number in self.refused.most_common()
        ]
        plain = {name: getattr(self, name) for name in ("sites", "recovered", "inductor", "graphs", "faults")}
        return plain | {"masks": dict(self.masks), "refused": refused}


def count(model: Callable[..., Any], kwargs: dict[str, Any], *, inductor: bool = True) -> Counts:
    """Compile `model` for one call with `kwargs`, and count; without `inductor`, not what Inductor finds."""
    found = Counts()
    torch._dynamo.reset()

    def backend(gm: fx.GraphModule, example_inputs: Sequence[Any]) -> Callable[..., Any]:
        found.graphs += 1
        _count_fxopt(gm, example_inputs, found)
        if inductor:
            _count_inductor(gm, example_inputs, found)
        return gm.forward

    torch.compile(model, backend=backend)(**kwargs)
    return found


def _count_fxopt(gm: fx.GraphModule, example_inputs: Sequence[Any], found: Counts) -> None:
    """The stages of `fxopt.pipeline`, with the graph looked at between them."""
    register_ops()
    with recorded(gm) as record:
        try:
            normal = normalize(gm, example_inputs)
        except Exception as error:
            lost = sum(_is_call_of_attention(node) for node in gm.graph.nodes)
            found.sites += lost
            found.refused[tidy(f"the graph is not normalized: {error}"), tidy(record.location)] += lost
            return
        names = Counter(node.name for node in sites(normal))
        found.sites += names.total()
        try:
            rewrite(normal, Options(), record)
            recovered = [*_all(normal, lambda node: is_call(node, ATTENTION.overload))]
            found.masks.update(describe(node) for node in recovered)
            lower(normal, record)
        except Exception as error:
            found.faults.append(f"{type(error).__name__}: {error}")
            return
        answers = [entry for entry in record.evidence if entry.rewrite == "rewrite-attention"]
        done = Counter(entry.anchor for entry in answers if entry.status is Status.APPLIED) & names
        found.recovered += done.total()
        found.refused.update(_reason(name, answers) for name in (names - done).elements())


def _reason(site: str, answers: list[Evidence]) -> tuple[str, str]:
    answer = next((entry for entry in answers if entry.anchor == site), None)
    if answer is None:
        return "no pass looked at it", "-"
    return tidy(answer.reason), tidy(answer.location)


def tidy(text: str) -> str:
    """Without what tells apart layers (`add_8`, a module's path) and machines (the folder of a file)."""
    text = re.sub(r"(?:/[^/\s():]+)+/(?=[^/\s]+\.py)", "", text)
    text = re.sub(r"\bl_\w+_(?:parameters|buffers)_(\w+?)_?\b", r"\1", text)
    return re.sub(r"\b([a-z][a-z_]*)_\d+\b", r"\1", text)


def sites(gm: fx.GraphModule) -> Iterator[fx.Node]:
    """The attention sites of a normalized graph."""
    return _all(gm, lambda node: is_call(node, SDPA) or (is_call(node, *SOFTMAXES) and _is_weight(node)))


def _all(gm: fx.GraphModule, wanted: Callable[[fx.Node], bool]) -> Iterator[fx.Node]:
    for module in gm.modules():
        if isinstance(module, fx.GraphModule):
            yield from filter(wanted, module.graph.nodes)


def _is_weight(softmax: fx.Node) -> bool:
    """The softmax is an operand of a matrix product, behind operations that keep it one."""
    seen, queue = {softmax}, [softmax]
    while queue:
        weights = queue.pop()
        for user in weights.users:
            if is_call(user, *PRODUCTS):
                return True
            if user not in seen and _carries(user, weights):
                seen.add(user)
                queue.append(user)
    return False


def _carries(node: fx.Node, weights: fx.Node) -> bool:
    """A gate of experts is multiplied too, by something larger than itself."""
    if is_call(node, aten.mul.Tensor, aten.mul_.Tensor) and shape(node) != shape(weights):
        return False
    if node.op != "call_function":
        return False
    if is_float_cast(node) or node.target is operator.getitem:
        return True
    return isinstance(node.target, torch._ops.OpOverload) and node.target._opname in _CARRIERS


def _is_call_of_attention(node: fx.Node) -> bool:
    """In Dynamo's graph, where a function is called by whatever name."""
    name = node.target if isinstance(node.target, str) else getattr(node.target, "__name__", "")
    return name in ("softmax", "scaled_dot_product_attention")


def describe(attention: fx.Node) -> str:
    """The mask of an attention op on one line: causal, none, a formula, or the reason why it is a tensor."""
    parts = [_mask(attention)]
    parts += [
        f"{name} {argument(attention, name)}" for name in ("score", "bias") if argument(attention, name)
    ]
    if argument(attention, "sinks") is not None:
        parts.append("sinks")
    return "; ".join(parts)


def _mask(attention: fx.Node) -> str:
    if argument(attention, "mask") or argument(attention, "bias"):
        text = str(argument(attention, "mask"))
        return "none" if text in ("", "True") else text
    if argument(attention, "is_causal"):
        return "causal"
    mask = argument(attention, "attn_mask")
    if mask is None:
        return "none"
    try:
        formula = recover(mask, attention).program
    except Unsupported as refusal:
        return tidy(f"tensor: {refusal}")
    return f"tensor: {formula} is not carried, see what recover-mask says"


def _count_inductor(gm: fx.GraphModule, example_inputs: Sequence[Any], found: Counts) -> None:
    """Inductor up to the end of its joint-graph passes, where its attention patterns are. Compiles no code.

    Its counter goes up each time that the replacement of a match is traced: twice in training.
    """
    from torch._dynamo.utils import counters
    from torch._inductor.compile_fx import compile_fx

    def uncompiled(graph: fx.GraphModule, inputs: Sequence[Any], **given: Any) -> Callable[..., Any]:
        del inputs, given
        return graph.forward

    values = [node.meta.get("example_value") for node in gm.graph.find_nodes(op="placeholder")]
    trains = torch.is_grad_enabled() and any(getattr(value, "requires_grad", False) for value in values)
    before = counters["inductor"]["fuse_attention"]
    try:
        compile_fx(copy.deepcopy(gm), example_inputs, inner_compile=uncompiled)  # type: ignore[arg-type]
    except Exception as error:
        found.faults.append(f"Inductor: {type(error).__name__}: {str(error).splitlines()[0][:200]}")
    found.inductor += (counters["inductor"]["fuse_attention"] - before) // (2 if trains else 1)
