"""What Dynamo needs to see layers of other libraries whole, where it is missing. Only where they are loaded.

- bitsandbytes' int8 layers pick the features that they multiply apart: results whose sizes depend on numbers.
  Dynamo breaks graphs there unless `capture_dynamic_output_shape_ops` is set. It is, while a function that
  fxopt compiles is called; other compiled functions keep the setting of the user.
- GPTQModel's ops for processors say nothing of the shapes of their results: Dynamo breaks graphs at each.

Called by `torch.compile(backend="fxopt")`. What neither helps is `fxopt.prepare`'s.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any

import torch

_GPTQ = "gptqmodel_int4_qzero_group_scaled_cpu"


def fix_libraries(compiler: Any) -> None:
    """Do what libraries that are loaded need; `compiler` is torch's wrapper of the backend."""
    if "bitsandbytes" in sys.modules:
        # torch enters it around each call of the compiled function: `torch._dynamo.optimize`.
        compiler.backend_ctx_ctor = _capturing
    if "gptqmodel" in sys.modules:
        for name, fake in _FAKES.items():
            _add_fake(name, fake)


def _capturing() -> AbstractContextManager[None]:
    import torch._dynamo.config as config

    patch: AbstractContextManager[None] = config.patch(capture_dynamic_output_shape_ops=True)
    return patch


def _add_fake(name: str, fake: Callable[..., Any]) -> None:
    """Unless the op is not there, or has one."""
    namespace, _, own = name.partition("::")
    if not hasattr(getattr(torch.ops, namespace), own):
        return
    known = torch._library.simple_registry.singleton.find(name).fake_impl
    if known.kernel is None and not torch._C._dispatch_has_kernel_for_dispatch_key(name, "Meta"):
        torch.library.register_fake(name, fake)


def _product(x: torch.Tensor, weight: torch.Tensor, *_: Any, **__: Any) -> torch.Tensor:
    """x (M, K), weight uint8 (N, K / 2)."""
    return x.new_empty((x.shape[0], weight.shape[0]))


def _packed(
    codes: torch.Tensor, zeros: torch.Tensor, out_features: int, in_features: int
) -> list[torch.Tensor]:
    """Codes uint8 (N, K / 2) and zero points uint8 (K / G, N)."""
    shapes = ((out_features, in_features // 2), (zeros.shape[0], out_features))
    return [codes.new_empty(shape, dtype=torch.uint8) for shape in shapes]


def _packed_gptq(
    codes: torch.Tensor, zeros: torch.Tensor, order: torch.Tensor, out_features: int, in_features: int
) -> list[torch.Tensor]:
    return _packed(codes, zeros, out_features, in_features)


# The ops of GPTQModel 7.7.
_FAKES: dict[str, Callable[..., Any]] = {
    f"{_GPTQ}::gemm_int4_qzero_group_scaled_cpu_forward": _product,
    f"{_GPTQ}::pack_gptq_int4": _packed_gptq,
    f"{_GPTQ}::pack_awq_int4": _packed,
}
