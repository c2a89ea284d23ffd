"""``fxopt::packed_linear``: x @ w^T + bias with a quantized weight w, opaque to the host.

Hosts fold constants: the chain that widens a weight would be computed once, and the dense weight kept. An op
of its own has no such chain. What computes it on a processor is registered by
`fxopt.runtime.quantized_linear`; elsewhere it is the plain torch below.

    x           (..., K), floating
    codes, scales, offsets, columns, format, group_size    as `fxopt.ir.quantized_weight` has them
    bias        (N,) or None
    activation  "": x as it is; "int8", "fp8": x is rounded first, with a scale for each token

``fxopt::packed_product`` is the same without gradients: a formula in Python for them costs each call 12 us,
whether it is needed or not.

The gradient with respect to x is that of the product with w: rounding x counts as the identity (Bengio et
al., "Estimating or Propagating Gradients Through Stochastic Neurons", 2013, section 4: straight-through).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch.autograd import forward_ad
from torch.nn.functional import linear

from fxopt.ir.ops.op import NAMESPACE, define_op, without_autocast
from fxopt.ir.quantized_weight import QuantizedWeight
from fxopt.ir.weight_formats import FORMATS

OPERANDS = "Tensor codes, Tensor scales, Tensor? offsets, Tensor? columns"
SCHEMA = f"(Tensor x, {OPERANDS}, Tensor? bias, *, str format, int group_size, str activation) -> Tensor"
FORWARD, PRODUCT = f"packed_linear{SCHEMA}", f"packed_product{SCHEMA}"
BACKWARD = (
    f"packed_linear_backward(Tensor grad, {OPERANDS}, *, str format, int group_size, int in_features)"
    " -> Tensor"
)
_Maybe = torch.Tensor | None
Rounding = Callable[[torch.Tensor, str], torch.Tensor]


def per_token(x: torch.Tensor, activation: str) -> torch.Tensor:
    """x (..., K) of float32 or wider, rounded to 8 bits with a scale for each token; widened again."""
    if not activation:
        return x
    rounded, scale = round_tokens(x, activation)
    return rounded.to(x.dtype) * scale


def round_tokens(x: torch.Tensor, activation: str) -> tuple[torch.Tensor, torch.Tensor]:
    """Codes of 8 bits (..., K) and their scales (..., 1), of x of float32 or wider."""
    kind = FORMATS["int8" if activation == "int8" else "fp8_e4m3"]
    scale = x.abs().amax(-1, keepdim=True) / kind.largest
    scaled = x / torch.where(scale == 0, 1.0, scale)
    if activation == "int8":
        scaled = scaled.round()
    return scaled.clamp(-kind.largest, kind.largest).to(kind.storage), scale


def straight_through(x: torch.Tensor, activation: str) -> torch.Tensor:
    """`per_token`, which counts as the identity where it is differentiated."""
    return x + (per_token(x.detach(), activation) - x).detach() if activation else x


@without_autocast
def packed_linear(
    x: torch.Tensor,
    codes: torch.Tensor,
    scales: torch.Tensor,
    offsets: _Maybe,
    columns: _Maybe,
    bias: _Maybe,
    *,
    format: str,
    group_size: int,
    activation: str,
    rounded: Rounding = per_token,
) -> torch.Tensor:
    """The result (..., N), of the dtype of x. `rounded`: what is done to tokens."""
    weight = QuantizedWeight(FORMATS[format], x.shape[-1], group_size, codes, scales, offsets, columns)
    computed = torch.promote_types(x.dtype, torch.float32) if activation else x.dtype
    given = rounded(x.to(computed), activation)
    wide = linear(given, weight.dequantize(computed), None if bias is None else bias.to(computed))
    return wide.to(x.dtype)


def is_transformed() -> bool:
    """Whether this runs inside of a transform of `torch.func`, or is differentiated forward."""
    return forward_ad._current_level >= 0 or torch._C._functorch.peek_interpreter_stack() is not None


def differentiable(*operands: _Maybe, **attributes: Any) -> torch.Tensor:
    """`packed_linear` in ops that every transform of torch knows, with the gradient that is told above."""
    out: torch.Tensor = packed_linear(*operands, rounded=straight_through, **attributes)
    return out


@without_autocast
def packed_linear_backward(
    grad: torch.Tensor,
    codes: torch.Tensor,
    scales: torch.Tensor,
    offsets: _Maybe,
    columns: _Maybe,
    *,
    format: str,
    group_size: int,
    in_features: int,
) -> torch.Tensor:
    """The gradient with respect to x: grad @ w."""
    weight = QuantizedWeight(FORMATS[format], in_features, group_size, codes, scales, offsets, columns)
    return grad @ weight.dequantize(grad.dtype)


def _fake(x: torch.Tensor, codes: torch.Tensor, *_: Any, **__: Any) -> torch.Tensor:
    return x.new_empty((*x.shape[:-1], codes.shape[0]))


def _fake_backward(grad: torch.Tensor, *_: Any, in_features: int, **__: Any) -> torch.Tensor:
    return grad.new_empty((*grad.shape[:-1], in_features))


def _save(ctx: Any, inputs: Any, keyword_only_inputs: dict[str, Any], output: Any) -> None:
    x, *operands, bias = inputs
    ctx.save_for_backward(*operands)
    ctx.in_features = x.shape[-1]
    ctx.bias_dtype = None if bias is None else bias.dtype
    ctx.weight = {name: keyword_only_inputs[name] for name in ("format", "group_size")}


def _gradients(ctx: Any, grad: torch.Tensor) -> tuple[Any, ...]:
    of_x = of_bias = None
    if ctx.needs_input_grad[0]:
        backward = torch.ops.fxopt.packed_linear_backward
        of_x = backward(grad, *ctx.saved_tensors, **ctx.weight, in_features=ctx.in_features)
    if ctx.bias_dtype is not None and ctx.needs_input_grad[5]:
        of_bias = grad.flatten(0, -2).sum(0, dtype=torch.float32).to(ctx.bias_dtype)
    return of_x, None, None, None, None, of_bias


def register(library: torch.library.Library) -> None:
    """Make the op and its gradient known to torch's dispatcher."""
    define_op(library, FORWARD, packed_linear, _fake)
    define_op(library, PRODUCT, packed_linear, _fake)
    define_op(library, BACKWARD, packed_linear_backward, _fake_backward)
    torch.library.register_autograd(
        f"{NAMESPACE}::packed_linear", _gradients, setup_context=_save, lib=library
    )
