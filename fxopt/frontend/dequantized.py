"""Products with a dense weight that the graph computes of codes, scales and zero points."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import fx

from fxopt.frontend.linear_site import Site
from fxopt.frontend.static_values import StaticValues
from fxopt.ir.facts import argument, aten, is_call, is_cast, rank, val
from fxopt.ir.sources import CannotConvert
from fxopt.ir.sources.decode import decode
from fxopt.ir.sources.found import Found

# How far the library's own arithmetic may be off, in units of rounding of the largest weight.
ROUNDINGS = 16
_FLOATS = (torch.float64, torch.float32, torch.bfloat16, torch.float16)


def dequantized_site(node: fx.Node, values: StaticValues) -> Site | None:
    """What a product multiplies with, if that is computed of static codes; None for any other node."""
    found = _operands(node)
    if found is None:
        return None
    x, weight, bias, transposed = found
    if weight not in values or rank(weight) != 2 or x in values:
        return None
    origins = values.origins(weight)
    if weight.op == "placeholder" or not any(val(each).dtype not in _FLOATS for each in origins):
        return None

    def convert(_: Any) -> Found:
        return Found(_decoded(values, weight, transposed), "a computed weight")

    part = values.part(weight)
    key = ("computed", transposed, *(_spelled(each, part) for each in part))
    return Site(node, x, bias, tuple(origins), convert, key)


def _spelled(node: fx.Node, part: list[fx.Node]) -> str:
    """What a node computes; others are named by their place."""
    place = {each: f"v{index}" for index, each in enumerate(part)}
    if node.op != "call_function":
        return f"{node.op} {tuple(val(node).shape)} {val(node).dtype}"
    return f"{node.target}{fx.node.map_arg((node.args, node.kwargs), place.__getitem__)}"


def _operands(node: fx.Node) -> tuple[fx.Node, fx.Node, fx.Node | None, bool] | None:
    """x, the weight, the bias, and whether the weight is (K, N)."""
    if is_call(node, aten.linear.default):
        x, weight = node.args[:2]
        return x, weight, argument(node, "bias"), False  # type: ignore[return-value]
    if is_call(node, aten.mm.default, aten.matmul.default):
        x, weight = node.args
        return x, weight, None, True  # type: ignore[return-value]
    if is_call(node, aten.addmm.default) and argument(node, "beta") == argument(node, "alpha") == 1:
        bias, x, weight = node.args[:3]
        return (x, weight, bias, True) if rank(bias) == 1 else None  # type: ignore[return-value,arg-type]
    return None


def _decoded(values: StaticValues, weight: fx.Node, transposed: bool) -> Any:
    part = values.part(weight)
    env = values.run(part)
    count = env[weight].numel()
    own = env[weight].t() if transposed else env[weight]
    reason = "no codes among what the weight is computed of"
    candidates = [node for node in reversed(part) if _may_be_codes(env[node], count)]
    # Codes less their zero points are whole numbers, too, and of more bits.
    for node in sorted(candidates, key=lambda each: not _has_4_bits(env[each])):
        try:
            found = decode(env[node].detach(), _evaluated(part, env, node, weight, transposed))
        except (CannotConvert, RuntimeError, IndexError) as refusal:
            reason = str(refusal)
            continue
        _check(found.dequantize(torch.float64), own)
        return found
    raise CannotConvert(reason)


def _may_be_codes(value: Any, count: int) -> bool:
    """Whole numbers of 8 bits, as many as the weight has, or float8."""
    if not isinstance(value, torch.Tensor) or value.numel() != count or not count or value.is_complex():
        return False
    if value.dtype is torch.float8_e4m3fn:
        return True
    if value.dtype is torch.bool or (value.is_floating_point() and value.element_size() == 1):
        return False
    lowest, highest = value.aminmax()
    if not -128 <= lowest <= highest <= 255:
        return False
    return not value.is_floating_point() or bool((value == value.round()).all())


def _has_4_bits(codes: torch.Tensor) -> bool:
    if codes.dtype is torch.float8_e4m3fn:
        return False
    lowest, highest = codes.aminmax()
    return bool((lowest >= 0 and highest <= 15) or (lowest >= -8 and highest <= 7))


def _evaluated(
    part: list[fx.Node], env: dict[fx.Node, Any], codes: fx.Node, weight: fx.Node, transposed: bool
) -> Callable[[torch.Tensor], torch.Tensor]:
    """The weight as a function of the codes, in float64."""
    after = part[_last_writer(part, codes) + 1 :]

    def dequantize(given: torch.Tensor) -> torch.Tensor:
        wide = given if any(_is_index(user, codes) for user in codes.users) else given.double()
        known = {codes: wide}
        for node in after:
            if node.op == "call_function" and any(each in known for each in node.all_input_nodes):
                known[node] = _run_wide(node, known, env)
        dense = known[weight].double()
        return dense.t() if transposed else dense

    return dequantize


def _last_writer(part: list[fx.Node], node: fx.Node) -> int:
    """The place of what is last to write to a node, or of the node itself."""
    views = {node}
    last = part.index(node)
    for place, each in enumerate(part):
        if each.op == "call_function" and each.args and each.args[0] in views:
            if each.target._schema.is_mutable:  # type: ignore[union-attr]
                last = place
            elif each.target.is_view:  # type: ignore[union-attr]
                views.add(each)
    return last


def _is_index(user: fx.Node, codes: fx.Node) -> bool:
    """Codes that are places in a table of values have to stay integers."""
    if is_call(user, aten.index.Tensor):
        return any(each is codes for each in user.args[1])  # type: ignore[union-attr]
    if is_call(user, aten.index_select.default, aten.gather.default, aten.embedding.default):
        return codes in user.args[1:]
    kept = is_cast(user) and not val(user).is_floating_point()
    return kept and any(_is_index(each, user) for each in user.users)


def _run_wide(node: fx.Node, known: dict[fx.Node, Any], env: dict[fx.Node, Any]) -> Any:
    """A node on float64: what else it reads is widened, and casts to other floating dtypes are left out."""

    def value(arg: fx.Node) -> Any:
        if arg in known:
            return known[arg]
        found = env[arg]
        return found.double() if found.is_floating_point() else found

    if is_cast(node) and val(node).dtype in _FLOATS:
        found = value(node.args[0])  # type: ignore[arg-type]
        return found.double()
    args, kwargs = fx.node.map_arg((node.args, node.kwargs), value)
    if kwargs.get("dtype") in _FLOATS:
        kwargs = {**kwargs, "dtype": torch.float64}
    return node.target(*args, **kwargs)  # type: ignore[operator]


def _check(found: torch.Tensor, own: torch.Tensor) -> None:
    """The weight is what the library's arithmetic gives, but for rounding."""
    limit = ROUNDINGS * torch.finfo(own.dtype).eps * float(own.double().abs().amax())
    off = float((found - own.double()).abs().amax())
    if not off <= limit:
        raise CannotConvert(f"a decoded weight that is off by {off:.1e}, {limit:.1e} would be rounding")
