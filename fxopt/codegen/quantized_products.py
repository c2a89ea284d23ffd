"""Linear layers with quantized weights, as what kernels are made of: products whose weights are codes.

Behind autograd a call of ``fxopt::packed_product`` is opaque. For kernels it becomes

    dequantized(codes, ...) -> the right operand of a product -> bias

so that the product's kernel widens codes in registers, together with what is in front of the product and
behind it, as of any other. Scales that a row of the weight has alone come behind a product of the codes
themselves, and so do those of tokens that are rounded to 8 bits. A product with many rows that the library
multiplies faster (`fxopt.codegen.choose_products`) leaves a kernel that writes the dense weight once.
"""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

import torch
from torch import fx
from torch._subclasses import FakeTensorMode

from fxopt.codegen.product_operands import MOST_ROWS
from fxopt.ir.contract import Evidence, Status
from fxopt.ir.cost import hint
from fxopt.ir.facts import argument, location, val
from fxopt.ir.ops import register_ops
from fxopt.ir.ops.code_products import CODES, PRODUCT, ROUNDED, is_op
from fxopt.ir.propagate import evaluate, fake_mode_of
from fxopt.ir.quantized_weight import BLOCK
from fxopt.ir.sizes import can_compute, size_node, size_of
from fxopt.ir.weight_formats import FORMATS, Format

aten, prims = torch.ops.aten, torch.ops.prims

NAME = "emit-quantized-linears"
# On a node that multiplies or widens codes: the names of the calls that it is of.
OF_CALLS = "fxopt_quantized_calls"
_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
_CALLS = ("packed_product", "packed_linear")
_OPERANDS = ("x", "codes", "scales", "offsets", "columns", "bias")


def expand_quantized(
    gm: fx.GraphModule, devices: frozenset[str], leave: Mapping[str, str] = MappingProxyType({})
) -> list[Evidence]:
    """Take apart the calls on `devices` that kernels can compute; which, and why not others.

    Args:
        leave: calls that stay as they are, by their names, and why.
    """
    register_ops()
    mode = fake_mode_of(gm.graph)
    calls = [node for node in gm.graph.nodes if any(is_op(node.target, name) for name in _CALLS)]
    own = [node for node in calls if val(node).device.type in devices]
    if mode is None or not own:
        return []
    evidence, writer = [], _Writer(gm, mode)
    for node in own:
        reason = _obstacle(node)
        status = Status.MISS if reason else Status.APPLIED
        if not reason and node.name in leave:
            status, reason = Status.UNPROFITABLE, leave[node.name]
        elif not reason:
            reason = _replace(writer, node)
        evidence.append(Evidence(NAME, node.name, location(node), status, reason))
    gm.graph.eliminate_dead_code()
    gm.graph.lint()
    gm.recompile()
    return evidence


def _obstacle(node: fx.Node) -> str:
    """Why kernels do not compute a call; empty if they do."""
    x, codes, scales = (val(argument(node, name)) for name in ("x", "codes", "scales"))
    kind, group = FORMATS[argument(node, "format")], argument(node, "group_size")
    activation, columns = argument(node, "activation"), x.shape[-1]
    if x.dtype not in _DTYPES:
        return f"kernels are for {', '.join(map(str, _DTYPES))}, not {x.dtype}"
    if not isinstance(columns, int) or any(hint(size) == 0 for size in (*x.shape, *codes.shape)):
        return "no columns, rows or tokens, or a number of columns that changes"
    if kind.bits == 4 and columns % BLOCK:
        return f"wanted a multiple of {BLOCK} columns, two of whose codes share a byte, saw {columns}"
    alone = scales.shape[1] == 1
    if not alone and kind.bits == 4 and group % (BLOCK // 2):
        return f"wanted groups of a multiple of {BLOCK // 2} columns, saw {group}"
    plain = alone and argument(node, "offsets") is None
    if activation and not (plain and kind.name == {"int8": "int8", "fp8": "fp8_e4m3"}[activation]):
        return f"tokens are rounded to {activation}, weights to {kind.name} in groups or with offsets"
    rows = [size_of(size) for size in x.shape[:-1]]
    if not all(can_compute(size, node.graph) for size in rows):
        return "no input of the graph has a size of its tokens"
    return ""


def _replace(writer: _Writer, node: fx.Node) -> str:
    """Put products in the place of a call; how, in words."""
    x, codes, scales, offsets, columns, bias = (argument(node, name) for name in _OPERANDS)
    kind, activation = FORMATS[argument(node, "format")], argument(node, "activation")
    value, depth = val(x), val(x).shape[-1]
    writer.before(node)
    tokens = x if value.dim() == 2 else writer.call(aten.reshape.default, x, [-1, depth])
    if columns is not None:
        tokens = writer.call(aten.index_select.default, tokens, 1, columns)
    few, single = hint(val(tokens).shape[0]) <= MOST_ROWS, val(tokens).shape[0] == 1
    parts = {"codes": writer.bits(codes), "kind": kind, "group": argument(node, "group_size")}
    if activation:
        wide = _of_rounded(writer, tokens, parts, scales, activation, single)
    elif few and val(scales).shape[1] == 1 and offsets is None:
        wide = _scaled_behind(writer, tokens, parts, scales, single)
    else:
        wide = _scaled_in_front(writer, tokens, parts, (scales, offsets), bias, few)
        bias = bias if few else None
    if bias is not None:
        wide = writer.call(aten.add.Tensor, wide, writer.to(bias, val(wide).dtype))
    out = writer.to(wide, value.dtype)
    if value.dim() != 2:
        out = writer.call(aten.reshape.default, out, [*writer.sizes(value.shape[:-1]), val(out).shape[-1]])
    out.meta = {**node.meta, "val": out.meta["val"]}
    node.replace_all_uses_with(out)
    node.graph.erase_node(node)
    return _how(kind, argument(node, "group_size"), depth, activation, few)


def _how(kind: Format, group: int, depth: int, activation: str, few: bool) -> str:
    of = f" in groups of {group}" if group < depth else ""
    tokens = f", tokens rounded to {activation}" if activation else ""
    if few:
        return f"{kind.name}{of}{tokens}: codes are widened in registers of the product's kernel"
    how = "multiplied as bytes" if activation == "int8" else "widened in registers, or once for the library"
    return f"{kind.name}{of}{tokens}: codes are {how}, by whichever is chosen for the product"


def _scaled_behind(
    writer: _Writer, tokens: fx.Node, parts: dict[str, Any], scales: fx.Node, single: bool
) -> fx.Node:
    """A row of the weight has one scale: codes are multiplied, and the sum is scaled."""
    dtype = torch.float32 if single else val(tokens).dtype
    weight = writer.weight(**parts, dtype=dtype)
    wide = writer.product(writer.to(tokens, dtype), weight)
    return writer.scaled(wide, scales)


def _scaled_in_front(
    writer: _Writer,
    tokens: fx.Node,
    parts: dict[str, Any],
    of_groups: tuple[fx.Node, fx.Node | None],
    bias: fx.Node | None,
    few: bool,
) -> fx.Node:
    """Weights in the dtype of the product. One row is multiplied in float32: there is nothing to round for.

    The product of many rows, which may be the library's, has the bias.
    """
    single = val(tokens).shape[0] == 1
    dtype = torch.float32 if single else val(tokens).dtype
    weight = writer.weight(**parts, scales=of_groups[0], offsets=of_groups[1], dtype=dtype)
    if few:
        return writer.product(writer.to(tokens, dtype), weight)
    if bias is None:
        return writer.call(aten.mm.default, tokens, writer.turned(weight))
    return writer.call(aten.addmm.default, writer.to(bias, dtype), tokens, writer.turned(weight))


def _of_rounded(
    writer: _Writer, tokens: fx.Node, parts: dict[str, Any], scales: fx.Node, activation: str, single: bool
) -> fx.Node:
    """Tokens rounded to 8 bits, with a scale each, as `fxopt.ir.ops.packed_linear.round_tokens` does."""
    largest = parts["kind"].largest  # tokens are rounded to what the weight is made of
    wide = writer.to(tokens, torch.float32)
    top = writer.call(aten.amax.default, writer.call(aten.abs.default, wide), [-1], True)
    scale = writer.call(aten.div.Tensor, top, largest)
    is_zero = writer.to(writer.call(aten.eq.Scalar, scale, 0), torch.float32)
    scaled = writer.call(aten.div.Tensor, wide, writer.call(aten.add.Tensor, scale, is_zero))
    if activation == "int8":
        scaled = writer.call(aten.round.default, scaled)
    codes = writer.call(aten.clamp.default, scaled, -largest, largest)
    if activation == "int8":
        found = writer.product(writer.to(codes, torch.int8), parts["codes"])
    else:
        # All numbers of e4m3 are numbers of float16.
        dtype = torch.float32 if single else torch.float16
        rounded = writer.call(writer.op(ROUNDED), codes)
        found = writer.product(writer.to(rounded, dtype), writer.weight(**parts, dtype=dtype))
    by_token = writer.call(aten.mul.Tensor, writer.to(found, torch.float32), scale)
    return writer.scaled(by_token, scales)


class _Writer:
    """Adds calls in front of a node, each once: layers that read one tensor share what is made of it."""

    def __init__(self, gm: fx.GraphModule, mode: FakeTensorMode) -> None:
        self.gm, self.graph, self.mode = gm, gm.graph, mode
        self._made: dict[str, fx.Node] = {}
        self._tables: dict[tuple[Any, ...], fx.Node] = {}

    def before(self, node: fx.Node) -> None:
        """From now on calls stand in front of `node`, and come from its source line."""
        self.place = node

    def op(self, name: str) -> Any:
        return getattr(torch.ops.fxopt, name).default

    def call(self, target: Any, *args: Any) -> fx.Node:
        key = repr((target, args))
        if key not in self._made:
            with self.graph.inserting_before(self.place):
                made = self.graph.call_function(target, args)
            made.meta["val"] = evaluate(made, self.mode)
            made.meta["stack_trace"] = self.place.meta.get("stack_trace")
            self._made[key] = made
        if is_op(target, CODES) or is_op(target, PRODUCT):
            self._made[key].meta.setdefault(OF_CALLS, set()).add(self.place.name)
        return self._made[key]

    def to(self, node: fx.Node, dtype: torch.dtype) -> fx.Node:
        same = val(node).dtype == dtype
        return node if same else self.call(prims.convert_element_type.default, node, dtype)

    def bits(self, codes: fx.Node) -> fx.Node:
        """Codes of e4m3 as bytes: not every GPU has the type."""
        is_float = val(codes).dtype.is_floating_point
        return self.call(aten.view.dtype, codes, torch.uint8) if is_float else codes

    def weight(
        self,
        codes: fx.Node,
        kind: Format,
        group: int,
        dtype: torch.dtype,
        scales: fx.Node | None = None,
        offsets: fx.Node | None = None,
    ) -> fx.Node:
        table = self.table(kind, val(codes).device)
        columns = val(codes).shape[1] * (2 if kind.bits == 4 else 1)
        return self.call(self.op(CODES), codes, scales, offsets, table, columns, group, kind.bits, dtype)

    def table(self, kind: Format, device: torch.device) -> fx.Node | None:
        """The numbers that codes stand for, as a constant of the graph; None for integers and e4m3."""
        if not kind.values or kind.name == "int4":
            return None
        key = (kind.name, device)
        if key not in self._tables:
            name = f"fxopt_values_{kind.name}_{len(self._tables)}"
            self.gm.register_buffer(name, kind.table.to(device))
            first = next(iter(self.graph.nodes))
            with self.graph.inserting_before(first):
                self._tables[key] = self.graph.get_attr(name)
            with self.mode:
                self._tables[key].meta["val"] = torch.empty(len(kind.values), device=device)
        return self._tables[key]

    def turned(self, weight: fx.Node) -> fx.Node:
        return self.call(aten.permute.default, weight, [1, 0])

    def product(self, left: fx.Node, weight: fx.Node) -> fx.Node:
        return self.call(self.op(PRODUCT), left, self.turned(weight))

    def scaled(self, wide: fx.Node, scales: fx.Node) -> fx.Node:
        """By the scale of each row of the weight (N, 1)."""
        of_rows = self.to(self.call(aten.reshape.default, scales, [val(scales).shape[0]]), torch.float32)
        return self.call(aten.mul.Tensor, wide, of_rows)

    def sizes(self, sizes: Any) -> list[Any]:
        with self.graph.inserting_before(self.place):
            found = [size_node(size_of(size), self.graph) for size in sizes]
        for node, size in zip(found, sizes, strict=True):
            if isinstance(node, fx.Node):
                node.meta.setdefault("val", size)
        return found
