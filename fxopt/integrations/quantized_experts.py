"""Experts whose weights are quantized: what `fxopt.prepare` makes of transformers' modules of experts.

Such a module holds two stacks of matrices, (E, N, K) or (E, K, N), and says how they are used: the decorator
`use_experts_implementation` of transformers leaves `has_gate`, `is_transposed`, `has_bias`, and the gate's
function. That is what its forward is made of here, whatever the model.
"""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import nn

from fxopt.integrations.quantized_module import QuantizedLinear
from fxopt.ir.quantized_weight import QuantizedWeight

_FLOATS = (torch.float32, torch.bfloat16, torch.float16)


class QuantizedStack(QuantizedLinear):
    """E quantized matrices: x (S, K) and experts (S,) -> (S, N), of the dtype of x.

    They are stored below each other, as one weight (E N, K).
    """

    def __init__(self, weight: QuantizedWeight, activation: str, count: int) -> None:
        """Args:
        count: E.
        """
        self.count = count
        super().__init__(weight, activation, None)

    def _kept(self) -> dict[str, Any]:
        return super()._kept() | {"experts": self.count}

    def forward(self, x: torch.Tensor, experts: torch.Tensor) -> torch.Tensor:  # type: ignore[override]
        parts = (self.typed_codes, self.scales, self.offsets)
        out: torch.Tensor = torch.ops.fxopt.expert_linear(
            self.computed(x), experts, *parts, count=self.count, **self.attributes
        )
        return out

    def extra_repr(self) -> str:
        return f"experts={self.count}, {super().extra_repr()}"


def stack_names(module: nn.Module) -> tuple[str, ...]:
    """The parameters of a module of experts that are stacks of matrices; nothing where it is no such module.

    Before its weights are loaded, and after any of them is replaced, too.
    """
    known = ("has_gate", "has_bias", "is_transposed", "_apply_gate", "num_experts", "config")
    if any(not hasattr(module, name) for name in known) or hasattr(module, "weight_scale_inv"):
        return ()
    names = ("gate_up_proj" if module.has_gate else "up_proj", "down_proj")
    return names if all(_is_stack(getattr(module, name, None)) for name in names) else ()


def _is_stack(weight: Any) -> bool:
    dense = type(weight) is nn.Parameter and weight.dim() == 3 and weight.dtype in _FLOATS
    return dense or isinstance(weight, QuantizedStack)


class QuantizedExperts(nn.Module):
    """What is put in front of the class of a module of experts once its stacks are quantized.

    Tokens are multiplied with the weights of the experts that they are routed to, and summed with the
    router's weights, in the order and the dtypes of transformers' implementation for batched products.
    """

    def forward(self, hidden: torch.Tensor, chosen: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
        """Args:
        hidden: (T, D). chosen: (T, C) numbers of experts. weights: (T, C).

        Returns:
            (T, D), of the dtype of `hidden`.
        """
        module: Any = self
        tokens, slots = chosen.shape
        experts = chosen.reshape(-1)
        first = "gate_up_proj" if module.has_gate else "up_proj"
        wide = self._product(first, hidden.repeat_interleave(slots, 0), experts)
        inner = module._apply_gate(wide) if module.has_gate else module.act_fn(wide)
        out = self._product("down_proj", inner, experts)
        if getattr(module, "has_post_expert_norm", False):
            out = module.post_expert_norm(out)
        summed: torch.Tensor = (out * weights.reshape(-1, 1)).view(tokens, slots, -1).sum(1)
        return summed.to(hidden.dtype)

    def _product(self, name: str, x: torch.Tensor, experts: torch.Tensor) -> torch.Tensor:
        out: torch.Tensor = getattr(self, name)(x, experts)
        if not self.has_bias:
            return out
        # Experts of another rank have no bias here; their tokens have weight zero.
        inside = experts.clamp(0, getattr(self, name).count - 1)
        bias: torch.Tensor = getattr(self, f"{name}_bias")
        return out + bias[inside]

    def __reduce_ex__(self, _: Any) -> tuple[Any, ...]:
        """The class is made anew: it has no name that could be imported."""
        return _rebuilt, (type(self).__bases__[1],), self.__dict__


@functools.cache
def _class_for(kind: Any) -> Any:
    return type(f"Quantized{kind.__name__}", (QuantizedExperts, kind), {})


def _rebuilt(kind: type[nn.Module]) -> nn.Module:
    made = _class_for(kind)  # type: ignore[arg-type]
    module: nn.Module = made.__new__(made)
    return module


def put_stack(module: nn.Module, name: str, made: QuantizedStack) -> None:
    """Put a quantized stack in the place of the parameter `name` of a module of experts.

    With the last of them, the module computes with them.
    """
    delattr(module, name)  # a parameter is not replaced by a module
    setattr(module, name, made)
    names = stack_names(module)
    done = bool(names) and all(isinstance(getattr(module, each), QuantizedStack) for each in names)
    if done and not isinstance(module, QuantizedExperts):
        module.__class__ = _class_for(type(module))  # type: ignore[arg-type]
