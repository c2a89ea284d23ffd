"""Products that are one op of a library, or of PyTorch: what weight they multiply with.

An op is known by its name, so that nothing has to be imported to ask. Arguments are read by their names
in the op's schema, those of bitsandbytes 0.50, optimum-quanto 0.2 and PyTorch 2.11 to 2.13.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import fx
from torch._ops import OpOverload

from fxopt.frontend.linear_site import Site
from fxopt.frontend.scaled_products import scaled_site
from fxopt.ir.facts import argument, is_cast, shape
from fxopt.ir.sources import CannotConvert, affine, bitsandbytes, quanto
from fxopt.ir.sources.found import Found
from fxopt.ir.sources.tinygemm import from_int4pack


def library_site(node: fx.Node) -> Site | None:
    """What a call of one of the known ops multiplies with; None for any other node.

    Raises:
        CannotConvert: it is a known op that is called in a way with no counterpart.
    """
    if node.op != "call_function" or not isinstance(node.target, OpOverload):
        return None
    known = _KNOWN.get(_name(node))
    return None if known is None else known(node)


def _name(node: fx.Node) -> str:
    return str(node.target._schema.name)  # type: ignore[union-attr]


def _arguments(node: fx.Node, *names: str) -> list[Any]:
    return [argument(node, name) for name in names]


def _gemm_4bit(node: fx.Node) -> Site:
    """bitsandbytes: NF4 and FP4, with scales that may be quantized."""
    x, packed, sizes, absmax, block, kind, bias = _arguments(
        node, "A", "B", "shapeB", "absmax", "blocksize", "quant_type", "bias"
    )
    nested = _arguments(node, "absmax_8bit", "absmax_code", "absmax_offset")
    weights = (packed, absmax, *(each for each in nested if each is not None))

    def convert(values: Any) -> Found:
        data, outer, *inner = values
        scales = bitsandbytes.nested_absmax(inner[0], inner[1], outer, inner[2], 256) if inner else outer
        return Found(bitsandbytes.from_4bit(data, sizes, scales, block, kind), f"bitsandbytes {kind}")

    return Site(node, x, bias, weights, convert, ("gemm_4bit", tuple(sizes), block, kind, len(weights)))


def _gemv_4bit(node: fx.Node) -> Site:
    """bitsandbytes: as above with scales as they are, or in the layout for CPUs."""
    x, packed, sizes, absmax, table, block = _arguments(
        node, "A", "B", "shapeB", "absmax", "code", "blocksize"
    )
    rows, columns = sizes
    for_cpu = shape(packed) == (rows, columns // 2) and shape(absmax) == (columns // block, rows)

    def convert(values: Any) -> Found:
        data, scales, values_of_codes = values
        kind = bitsandbytes.kind_of_table(values_of_codes)
        if for_cpu:
            return Found(
                bitsandbytes.from_cpu_4bit(data, scales, block, kind), f"bitsandbytes {kind} for CPUs"
            )
        return Found(bitsandbytes.from_4bit(data, sizes, scales, block, kind), f"bitsandbytes {kind}")

    key = ("gemv_4bit", rows, columns, block, for_cpu)
    product: Any = node.target

    def own(values: Any, given: torch.Tensor) -> torch.Tensor:
        data, scales, values_of_codes = values
        result: torch.Tensor = product(given, data, sizes, scales, values_of_codes, block)
        return result

    return Site(node, x, None, (packed, absmax, table), convert, key, own if for_cpu else None)


def _int8_scaled_mm(node: fx.Node) -> Site:
    """bitsandbytes: int8 weights, and activations that it rounds to int8 with a scale for each token."""
    codes, weight, scale, absmax, bias = _arguments(node, "A", "B", "row_stats", "col_stats", "bias")
    rounding = _same_call(codes, scale)
    if rounding is None or _name(rounding) != "bitsandbytes::int8_vectorwise_quant":
        raise CannotConvert("activations that are not rounded by int8_vectorwise_quant")
    x, threshold = _arguments(rounding, "A", "threshold")
    if threshold:
        raise CannotConvert(f"activations above {threshold} are multiplied apart")
    given = x.args[0] if is_cast(x) else x
    wanted = node.meta["val"].dtype
    if given.meta["val"].dtype != wanted:
        raise CannotConvert(f"a result of {wanted} of activations of {given.meta['val'].dtype}")

    def convert(values: Any) -> Found:
        return Found(bitsandbytes.from_int8(*values), "bitsandbytes int8", "int8")

    return Site(node, given, bias, (weight, absmax), convert, "int8_scaled_mm")


def _int8_mixed_scaled_mm(_: fx.Node) -> Site:
    """bitsandbytes: as above, and features above a threshold apart; the layer keeps which these are."""
    raise CannotConvert(
        "features are picked in each call, and kept by the layer: fxopt.prepare takes it over"
    )


def _same_call(codes: Any, scale: Any) -> fx.Node | None:
    """The call of which two nodes are the first and the second result."""
    sources = [each.args[0] for each in (codes, scale) if isinstance(each, fx.Node) and len(each.args) == 2]
    if len(sources) != 2 or sources[0] is not sources[1] or [codes.args[1], scale.args[1]] != [0, 1]:
        return None
    call = sources[0]
    return call if isinstance(call, fx.Node) and isinstance(call.target, OpOverload) else None


def _int4pack(node: fx.Node) -> Site:
    arguments: Any = node.args
    x, packed, group, both = arguments
    sizes = int(shape(both)[1]), int(shape(both)[0]) * group

    def convert(values: Any) -> Found:
        packed, both = values
        return Found(from_int4pack(packed, both, sizes, group), "PyTorch int4pack")

    return Site(node, x, None, (packed, both), convert, ("int4pack", group, sizes))


def _int8pack(node: fx.Node) -> Site:
    x, weight, scales = _arguments(node, "input" if "input" in _names(node) else "self", "mat2", "scales")

    def convert(values: Any) -> Found:
        codes, table = values
        return Found(affine.from_blocks(codes, table, (1, codes.shape[1])), "PyTorch int8pack")

    return Site(node, x, None, (weight, scales), convert, "int8pack")


def _names(node: fx.Node) -> list[str]:
    return [formal.name for formal in node.target._schema.arguments]  # type: ignore[union-attr]


def _qbytes_mm(node: fx.Node) -> Site:
    x, weight, scales = _arguments(node, "A", "B", "scales")
    if not x.meta["val"].is_floating_point() or x.meta["val"].element_size() == 1:
        raise CannotConvert(f"activations of {x.meta['val'].dtype}")

    def convert(values: Any) -> Found:
        codes, scale = values
        return Found(quanto.from_bytes(codes, scale, 0), "optimum-quanto bytes")

    return Site(node, x, None, (weight, scales), convert, "qbytes_mm")


_KNOWN: dict[str, Callable[[fx.Node], Site]] = {
    "bitsandbytes::gemm_4bit": _gemm_4bit,
    "bitsandbytes::gemv_4bit": _gemv_4bit,
    "bitsandbytes::int8_scaled_mm": _int8_scaled_mm,
    "bitsandbytes::int8_mixed_scaled_mm": _int8_mixed_scaled_mm,
    "aten::_weight_int4pack_mm": _int4pack,
    "aten::_weight_int4pack_mm_for_cpu": _int4pack,
    "aten::_weight_int8pack_mm": _int8pack,
    "aten::_scaled_mm": scaled_site,
    "aten::_scaled_mm_v2": scaled_site,
    "quanto::qbytes_mm": _qbytes_mm,
}
